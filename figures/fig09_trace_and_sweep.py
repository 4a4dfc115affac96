"""What it costs to know the cells: running them one after the other, or one trace. Dashed: extrapolated."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.round_figures import trace_and_sweep
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return trace_and_sweep(study, page)


if __name__ == "__main__":
    alone(__file__)
