"""How long agreement lasts, against the geometric law that independent agreements would follow."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.round_figures import run_lengths
from probekit.presentation.study_folder import StudyFolder

EXITS = 3


def draw(study: StudyFolder, page: Page) -> Figure:
    return run_lengths(study, page, exits=EXITS)


if __name__ == "__main__":
    alone(__file__)
