"""Where in its texts an oracle would exit: the layer that drafts in each round of the quickest path."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.way_figures import oracle_map
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return oracle_map(study, page)


if __name__ == "__main__":
    alone(__file__)
