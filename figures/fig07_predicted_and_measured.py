"""The prediction against the running decoder: rounds, acceptance rate and speedup of every cell that was run."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from figures.style import TWO_COLUMNS, canvas
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder) -> Figure:
    validation = study.table("validation")
    figure = canvas(TWO_COLUMNS, 2.5, layout="compressed")
    axes = figure.subplots(1, len(plots.COMPARED))
    for ax, quantity, letter in zip(axes, plots.COMPARED, "abc", strict=True):
        plots.predicted_against_measured(ax, validation, quantity)
        ax.set_title(f"({letter}) {plots.COMPARED[quantity][2].split(' (')[0]}")
    plots.one_legend(figure, axes)
    return figure


if __name__ == "__main__":
    alone(__file__)
