"""Predicted speedup over exit layer and draft length, with the chosen pair; a line parts gain from loss."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.round_figures import speedup
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return speedup(study, page)


if __name__ == "__main__":
    alone(__file__)
