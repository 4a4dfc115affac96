"""How often a layer says the token that was just read, for both lenses, with 95 % bands over prompts."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.layer_figures import echo
from probekit.presentation.paper.look import Page
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return echo(study, page)


if __name__ == "__main__":
    alone(__file__)
