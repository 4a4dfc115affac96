"""Entropy of the final-norm lens, and its divergence from the model, by layer, with 95 % bands over prompts."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from figures.style import TWO_COLUMNS, canvas
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder) -> Figure:
    layers = study.table("layers").query("lens == 'final-norm'")
    figure = canvas(TWO_COLUMNS, 2.4)
    entropy, divergence = figure.subplots(1, 2)
    plots.entropy_and_kl(entropy, divergence, layers)
    entropy.set_title("(a) entropy")
    divergence.set_title("(b) divergence from the model")
    plots.one_legend(figure, [entropy, divergence])
    return figure


if __name__ == "__main__":
    alone(__file__)
