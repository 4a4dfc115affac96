"""The paper's figures: each a name, what draws it, its caption, and what it is to a reader who cannot see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from probekit.presentation.paper import (
    captions,
    layer_figures,
    probing_captions,
    probing_figures,
    round_figures,
    way_figures,
)
from probekit.presentation.paper.look import Page
from probekit.presentation.study_folder import StudyFolder

Draw = Callable[[StudyFolder, Page], Figure]


@dataclass(frozen=True)
class PaperFigure:
    """draw: from a study and a page to the figure. caption, alt: from a study to plain text.

    needs: the one of MORE_TABLES that it is drawn from; a study without it does without the figure.
    """

    draw: Draw
    caption: captions.Words
    alt: captions.Words
    needs: str | None = None


FIGURES: Mapping[str, PaperFigure] = {
    "fig01_lens_table": PaperFigure(
        layer_figures.lens_tables, captions.of_lens_tables, captions.alt_of_lens_tables
    ),
    "fig02_agreement": PaperFigure(layer_figures.agreement, captions.of_agreement, captions.alt_of_agreement),
    "fig03_echo": PaperFigure(layer_figures.echo, captions.of_echo, captions.alt_of_echo),
    "fig04_entropy_and_kl": PaperFigure(
        layer_figures.entropy_and_kl, captions.of_entropy_and_kl, captions.alt_of_entropy_and_kl
    ),
    "fig05_acceptance": PaperFigure(round_figures.acceptance, captions.of_acceptance, captions.alt_of_acceptance),
    "fig06_speedup": PaperFigure(round_figures.speedup, captions.of_speedup, captions.alt_of_speedup),
    "fig07_predicted_and_measured": PaperFigure(
        round_figures.predicted_and_measured, captions.of_predicted_and_measured, captions.alt_of_predicted_and_measured
    ),
    "fig08_run_lengths": PaperFigure(round_figures.run_lengths, captions.of_run_lengths, captions.alt_of_run_lengths),
    "fig09_trace_and_sweep": PaperFigure(
        round_figures.trace_and_sweep, captions.of_trace_and_sweep, captions.alt_of_trace_and_sweep
    ),
    "fig10_ladder": PaperFigure(way_figures.ladder, captions.of_ladder, captions.alt_of_ladder),
    "fig11_oracle_map": PaperFigure(way_figures.oracle_map, captions.of_oracle_map, captions.alt_of_oracle_map),
    "fig12_probes": PaperFigure(
        probing_figures.probes, probing_captions.of_probes, probing_captions.alt_of_probes, "probes"
    ),
    "fig13_attribution": PaperFigure(
        probing_figures.attribution, probing_captions.of_attribution, probing_captions.alt_of_attribution, "attribution"
    ),
}  # fmt: skip
"""In the order of the paper."""
