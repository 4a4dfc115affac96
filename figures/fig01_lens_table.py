"""What every layer would say: the lens table of one text, for each model of the study."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from probekit.presentation.paper.layer_figures import lens_tables
from probekit.presentation.paper.look import Page
from probekit.presentation.study_folder import StudyFolder

PROMPT = 0
POSITIONS = 13


def draw(study: StudyFolder, page: Page) -> Figure:
    return lens_tables(study, page, prompt=PROMPT, positions=POSITIONS)


if __name__ == "__main__":
    alone(__file__)
