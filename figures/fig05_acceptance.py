"""Acceptance rate and tokens per round, predicted from one trace, over exit layer and draft length."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.round_figures import acceptance
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return acceptance(study, page)


if __name__ == "__main__":
    alone(__file__)
