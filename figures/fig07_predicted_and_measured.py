"""The prediction against the running decoder: rounds, acceptance rate and speedup of every cell that was run."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.round_figures import predicted_and_measured
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder, page: Page) -> Figure:
    return predicted_and_measured(study, page)


if __name__ == "__main__":
    alone(__file__)
