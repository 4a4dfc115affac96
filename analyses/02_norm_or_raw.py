"""How much of "early layers are gibberish" is the missing norm?

    python analyses/02_norm_or_raw.py [MODEL ...] -o build/analyses

The raw lens is head(h), as tutorials have it; the final-norm lens is head(norm(h)), as an early exit drafts. Gibberish
and agreement of both on the same text, and the share of the raw lens's gibberish that is gone with the norm.
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
import typer
import workbench
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import PALETTE
from probekit.tying.shares import norm_or_raw

NAME = "02_norm_or_raw"
FIGURES = ("gibberish_raw", "gibberish_norm", "missing_norm", "agreement_raw", "agreement_norm", "agreement_gain")


@analysis
def main(work: Bench) -> None:
    """How much of "early layers are gibberish" is the missing norm?"""
    parts = []
    for loaded in work.loaded():
        for loops, trace in workbench.with_and_without_loops(work.trace(loaded)):
            parts.append(norm_or_raw(trace).assign(loops=loops))
    table = long(pd.concat(parts, ignore_index=True))
    work.write(NAME, table, draw(table))


def long(wide: pd.DataFrame) -> pd.DataFrame:
    """Columns model, loops, layers (a layer, or a range of them), quantity, value, low, high."""
    keys = wide[["model", "loops", "layers"]]
    return pd.concat(
        [
            keys.assign(
                quantity=name.replace("_", " "), value=wide[name], low=wide[f"{name}_low"], high=wide[f"{name}_high"]
            )
            for name in FIGURES
        ],
        ignore_index=True,
    )


def draw(table: pd.DataFrame) -> Figure:
    """Gibberish of both lenses by layer above, agreement below; one column for each model."""
    names = list(dict.fromkeys(table["model"]))
    drawn, axes = workbench.figure(len(names), 2, beside=1.8)
    raw, norm = sns.color_palette(PALETTE, 2)
    by_layer = table[table["layers"].str.isdigit() & (table["loops"] == "with")].astype({"layers": int})
    for column, name in enumerate(names):
        for row, quantity in enumerate(("gibberish", "agreement")):
            ax = axes[row][column]
            rows = by_layer[by_layer["model"] == name]
            for lens, label, colour, style in (("raw", "raw lens, head(h)", raw, "--"),
                                               ("norm", "final-norm lens, head(norm(h))", norm, "-")):  # fmt: skip
                workbench.curve(ax, rows[rows["quantity"] == f"{quantity} {lens}"], "layers", colour, label, ls=style)
            ax.set(ylim=(-0.02, 1.02), title=plain(name) if row == 0 else "")
            workbench.whole_numbers(ax)
            if column == 0:
                ax.set_ylabel(f"{quantity} (share of tokens)")
        axes[1][column].set_xlabel("layer (0: embedding)")
    workbench.legend_beside(axes[0][-1])
    return drawn


if __name__ == "__main__":
    typer.run(main)
