"""How long agreement lasts, against the geometric law that independent agreements would follow."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from figures.panels import of_models
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder

EXITS = 3


def draw(study: StudyFolder) -> Figure:
    figure, axes = of_models(study, height=2.2, share_y=True)
    for ax, model in zip(axes, study.models, strict=True):
        runs = study.of("run_lengths", model)
        exits = _spread(sorted(set(runs["exit_layer"])))
        plots.run_lengths_against_geometric(ax, runs[runs["exit_layer"].isin(exits)])
        if ax is not axes[0]:
            ax.set_ylabel("")
    plots.one_legend(figure, axes)
    return figure


def _spread(exits: list[int]) -> list[int]:
    """A quarter, a half and three quarters of the way through the exits."""
    last = len(exits) - 1
    return list(dict.fromkeys(exits[round(last * place / (EXITS + 1))] for place in range(1, EXITS + 1)))


if __name__ == "__main__":
    alone(__file__)
