"""Pictures, drawn on the Axes that a caller hands in. No files, no figures made, no torch.

Each function takes one of the study's tables (see `presentation.tables`), of one model or of several, and writes the
units on its axes. One-signed figures are coloured by one sequential map that is monotonic in lightness, so that they
read the same in grey; lines differ in colour, dash and marker. Intervals are 95 %, over prompts.
"""

from probekit.lens.statistics import Statistic
from probekit.presentation.plots.glyphs import drawable, families, plain
from probekit.presentation.plots.grids import (
    NUMBERS,
    acceptance_grid,
    speedup_surface,
    tokens_per_round_grid,
    write_numbers,
)
from probekit.presentation.plots.layers import agreement_by_layer, by_layer, echo_by_layer, entropy_and_kl
from probekit.presentation.plots.lens import STATISTICS, lens_table
from probekit.presentation.plots.rounds import (
    COMPARED,
    predicted_against_measured,
    run_lengths_against_geometric,
    trace_against_sweep,
)
from probekit.presentation.plots.style import FAINT, INK, PALETTE, SEQUENTIAL, STYLE, one_legend

__all__ = [
    "COMPARED", "FAINT", "INK", "NUMBERS", "PALETTE", "SEQUENTIAL", "STATISTICS", "STYLE", "Statistic",
    "acceptance_grid", "agreement_by_layer", "by_layer", "drawable", "echo_by_layer", "entropy_and_kl", "families",
    "lens_table", "one_legend", "plain", "predicted_against_measured", "run_lengths_against_geometric",
    "speedup_surface", "tokens_per_round_grid", "trace_against_sweep", "write_numbers",
]  # fmt: skip
