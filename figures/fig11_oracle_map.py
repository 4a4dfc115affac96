"""Where in its texts an oracle would exit: the layer that drafts in each round of the quickest path."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from figures.making import alone
from figures.panels import of_models
from probekit.choice.rank import oracle_of
from probekit.costs.profile import Costs
from probekit.drafting.drafters import traced_drafters
from probekit.prediction.replay import replay
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder
from probekit.traces.trace import Trace

TEXTS = 12


def draw(study: StudyFolder) -> Figure:
    figure, axes = of_models(study, height=2.3)
    deepest = max(study.trace(model).depth for model in study.models) - 1
    for ax, model in zip(axes, study.models, strict=True):
        costs = Costs.from_json(study.entry(model)["choice"]["costs"])
        shown = plots.exit_map(ax, _rounds(study.trace(model), costs), deepest)
        if ax is not axes[0]:
            ax.set_ylabel("")
    bar = figure.colorbar(shown, ax=list(axes), shrink=0.8, pad=0.01)
    step = max(1, deepest // 6)
    bar.set_ticks(list(range(1, deepest + 1, step)))
    bar.set_label("exit layer that drafts; grey: none")
    return figure


def _rounds(trace: Trace, costs: Costs) -> pd.DataFrame:
    """The oracle's rounds along the first texts; none on text that is not greedy."""
    columns = ["prompt", "start", "emitted", "exit_layer"]
    if trace.manifest.settings.text != "greedy":
        return pd.DataFrame(columns=columns)
    some = trace.select(trace.prompts[:TEXTS])
    rows = traced_drafters(some, draft_model=False, draft_rows=costs.draft_head.rows)
    way = oracle_of(some, rows, costs, costs.longest_draft).way
    if way is None:
        return pd.DataFrame(columns=columns)
    layers = [*(key.exit_layer for key in way.keys), plots.NO_EXIT]  # nobody's turn is the last
    return pd.DataFrame(
        [
            (prompt, start, emitted, layers[turn] if length else plots.NO_EXIT)
            for prompt, own in zip(some.prompts, replay(some, way).rounds, strict=True)
            for start, emitted, turn, length in zip(own.start, own.emitted, own.way, own.length, strict=True)
        ],
        columns=columns,
    )


if __name__ == "__main__":
    alone(__file__)
