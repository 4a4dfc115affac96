"""What each kind of drafting gains: from plain decoding over fixed pairs, policies, lookups and trees to the oracle."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from figures.panels import of_models
from probekit.choice.rank import rank
from probekit.costs.profile import Costs
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder) -> Figure:
    figure, axes = of_models(study, height=2.6)
    for ax, model in zip(axes, study.models, strict=True):
        costs = Costs.from_json(study.entry(model)["choice"]["costs"])
        lengths = [length for length in study.summary["settings"]["draft_lengths"] if length <= costs.longest_draft]
        plots.ladder(ax, rank(study.trace(model), costs, draft_lengths=lengths).ladder())
    rungs = [[label.get_text() for label in ax.get_yticklabels()] for ax in axes]
    if all(each == rungs[0] for each in rungs):
        for ax in axes[1:]:
            ax.set_yticklabels([])
    return figure


if __name__ == "__main__":
    alone(__file__)
