"""What the residual stream knows, by layer: whether a draft is accepted, and the model's token, beside the lens."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.probing_figures import probes
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return probes(study, page)


if __name__ == "__main__":
    alone(__file__)
