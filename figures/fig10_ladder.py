"""What each kind of drafting gains: from plain decoding over fixed pairs, policies, lookups and trees to the oracle."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.way_figures import ladder
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return ladder(study, page)


if __name__ == "__main__":
    alone(__file__)
