"""Pictures of the study's tables, called as in seaborn: `agreement_by_layer(layers, ax=ax)` returns the Axes.

Each function takes first one of the study's tables (see `presentation.tables`), of one model or of several, or what
has `to_pandas`; then `ax=`, pyplot's current Axes by default. It writes the units on its axes, and no files. The look
is that of matplotlib's settings (`rcParams`, a seaborn theme, a style sheet); `STYLE` is the project's own, for
`matplotlib.rc_context`. Shares and counts are coloured by one sequential map that is monotonic in lightness, so that
they read the same in grey; speedups by one diverging map whose middle is 1: red loses, blue gains. Lines differ in
colour, dash and marker. Intervals are 95 %, over prompts. Nothing here imports torch.
"""

from probekit.lens.statistics import Statistic
from probekit.presentation.plots.attribution import attribution_map
from probekit.presentation.plots.calling import colours_of, one_bar
from probekit.presentation.plots.glyphs import drawable, families, plain
from probekit.presentation.plots.grids import (
    NUMBERS,
    acceptance_grid,
    speedup_surface,
    tokens_per_round_grid,
    write_numbers,
)
from probekit.presentation.plots.layers import (
    agreement_by_layer,
    by_layer,
    echo_by_layer,
    entropy_and_kl,
    entropy_by_layer,
    kl_by_layer,
)
from probekit.presentation.plots.lens import STATISTICS, lens_table
from probekit.presentation.plots.patches import patch_map
from probekit.presentation.plots.probes import probes_by_layer
from probekit.presentation.plots.rounds import (
    COMPARED,
    acceptance_by_position,
    predicted_against_measured,
    run_lengths_against_geometric,
    trace_against_sweep,
)
from probekit.presentation.plots.style import DIVERGING, FAINT, INK, PALETTE, SEQUENTIAL, STYLE, one_legend
from probekit.presentation.plots.ways import NO_EXIT, exit_colours, exit_map, ladder

__all__ = [
    "COMPARED", "DIVERGING", "FAINT", "INK", "NO_EXIT", "NUMBERS", "PALETTE", "SEQUENTIAL", "STATISTICS", "STYLE",
    "Statistic", "acceptance_by_position", "acceptance_grid", "agreement_by_layer", "attribution_map", "by_layer",
    "colours_of", "drawable", "echo_by_layer", "entropy_and_kl", "entropy_by_layer", "exit_colours", "exit_map",
    "families", "kl_by_layer", "ladder", "lens_table", "one_bar", "one_legend", "patch_map", "plain",
    "predicted_against_measured", "probes_by_layer", "run_lengths_against_geometric", "speedup_surface",
    "tokens_per_round_grid", "trace_against_sweep", "write_numbers",
]  # fmt: skip
