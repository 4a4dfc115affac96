"""How much of "early layers are gibberish" is the missing norm?

    python analyses/02_norm_or_raw.py [MODEL ...] -o build/analyses

The raw lens is head(h), as tutorials have it; the final-norm lens is head(norm(h)), as an early exit drafts. Gibberish
and agreement of both on the same text, and the share of the raw lens's gibberish that is gone with the norm.
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
import typer
from matplotlib.figure import Figure
from workbench import OUTPUT, PROMPTS, TOKENS, TRACES, Device, Limit, Models, Output, Tokens, Traces, bench, figure

from probekit.presentation.plots import PALETTE, plain
from probekit.tying.shares import norm_or_raw
from probekit.tying.text_kinds import before_loops

NAME = "02_norm_or_raw"
INTERVALS = ("missing_norm", "agreement_gain")
PLAIN = ("gibberish_raw", "gibberish_norm", "agreement_raw", "agreement_norm")


def main(
    models: Models = None, output: Output = OUTPUT, traces: Traces = TRACES, prompts: Limit = PROMPTS,
    max_new_tokens: Tokens = TOKENS, device: Device = None,
) -> None:  # fmt: skip
    """How much of "early layers are gibberish" is the missing norm?"""
    with bench(models, output, traces, prompts, max_new_tokens, device) as work:
        parts = []
        for loaded in work.loaded():
            trace = work.trace(loaded)
            parts += [norm_or_raw(trace).assign(loops="with"), norm_or_raw(before_loops(trace)).assign(loops="without")]
        table = long(pd.concat(parts, ignore_index=True))
        work.write(NAME, main.__doc__ or "", table, draw(table))


def long(wide: pd.DataFrame) -> pd.DataFrame:
    """Columns model, loops, layers (a layer, or a range of them), quantity, value, low, high."""
    parts = []
    for name in (*PLAIN, *INTERVALS):
        rows = wide[["model", "loops", "layers"]].assign(quantity=name.replace("_", " "), value=wide[name])
        ends = {end: wide[f"{name}_{end}"] if name in INTERVALS else float("nan") for end in ("low", "high")}
        parts.append(rows.assign(**ends))
    return pd.concat(parts, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Gibberish of both lenses by layer above, agreement below; one column for each model."""
    names = list(dict.fromkeys(table["model"]))
    drawn, axes = figure(len(names), 2)
    colours = dict(zip(("raw", "norm"), sns.color_palette(PALETTE, 2), strict=True))
    by_layer = table[table["layers"].str.isdigit() & (table["loops"] == "with")].astype({"layers": int})
    for column, name in enumerate(names):
        for row, quantity in enumerate(("gibberish", "agreement")):
            ax = axes[row][column]
            for lens, style in (("raw", "--"), ("norm", "-")):
                curve = by_layer[(by_layer["model"] == name) & (by_layer["quantity"] == f"{quantity} {lens}")]
                label = "final-norm lens" if lens == "norm" else "raw lens"
                ax.plot(curve["layers"], curve["value"], style, color=colours[lens], label=label)
            ax.set(ylim=(-0.02, 1.02), xlabel="layer", title=plain(name) if row == 0 else "")
            if column == 0:
                ax.set_ylabel(f"{quantity} (share of tokens)")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


if __name__ == "__main__":
    typer.run(main)
