"""How often a layer says the token that was just read, for both lenses, with 95 % bands over prompts."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from figures.panels import by_lens
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder) -> Figure:
    return by_lens(study.table("layers"), plots.echo_by_layer)


if __name__ == "__main__":
    alone(__file__)
