"""Which layers wrote what the model says: the share of each attention and MLP in the logit, along one text."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.probing_figures import attribution
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return attribution(study, page)


if __name__ == "__main__":
    alone(__file__)
