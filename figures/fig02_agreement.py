"""Agreement with the model by layer, for the final-norm and the raw lens, with 95 % bands over prompts."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.layer_figures import agreement
from probekit.presentation.paper.look import Page
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return agreement(study, page)


if __name__ == "__main__":
    alone(__file__)
