"""Entropy of the final-norm lens, and its divergence from the model, by layer, with 95 % bands over prompts."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.layer_figures import entropy_and_kl
from probekit.presentation.paper.look import Page
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return entropy_and_kl(study, page)


if __name__ == "__main__":
    alone(__file__)
