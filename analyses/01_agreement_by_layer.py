"""From which layer on does the lens know the answer, and what does it say before?

    python analyses/01_agreement_by_layer.py [MODEL ...] -o build/analyses

At each (layer, position) of the model's own greedy text the lens agrees with the model, echoes the token that was read,
names one of the model's 50 most probable tokens, or is gibberish. Shares by layer, the depth of half agreement and the
valley between echo and answer, each with and without looping text.
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
import typer
import workbench
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.prediction.intervals import Estimate, Share
from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import PALETTE
from probekit.traces.trace import Trace
from probekit.tying.shares import CLASSES, class_shares, half_agreement, layer_means, valley
from probekit.tying.text_kinds import looped_tokens

NAME = "01_agreement_by_layer"


@analysis
def main(work: Bench) -> None:
    """From which layer on does the lens know the answer, and what does it say before?"""
    parts = []
    for loaded in work.loaded():
        parts += [rows_of(trace, loops) for loops, trace in workbench.with_and_without_loops(work.trace(loaded))]
    table = pd.concat(parts, ignore_index=True)
    work.write(NAME, table, draw(table))


def rows_of(trace: Trace, loops: str) -> pd.DataFrame:
    """Columns model, loops, layer (missing for figures of the whole curve), quantity, value, low, high."""
    shares = class_shares(trace)
    curves = {name: shares.at(index) for index, name in enumerate(CLASSES)}
    curves |= {
        "echo": layer_means(trace, "echo"),
        "entropy": layer_means(trace, "entropy"),
        "kl": layer_means(trace, "kl"),
    }
    parts = [curve_rows(name, share) for name, share in curves.items()]
    half, shape, looped = half_agreement(trace), valley(trace), looped_tokens(trace)
    figures = {
        "half agreement": half,
        "half agreement, share of depth": Estimate(*(figure / trace.depth for figure in half)),
        "valley floor": shape.floor,
        "valley layer": shape.layer,
        "valley drop": shape.drop,
        "looped tokens": Estimate(float(looped.values), *map(float, looped.interval())),
    }
    parts.append(pd.DataFrame([{"quantity": name, **found._asdict()} for name, found in figures.items()]))
    frame = pd.concat(parts, ignore_index=True)
    frame.insert(0, "model", trace.manifest.model.name)
    frame.insert(1, "loops", loops)
    return frame.astype({"layer": "Int64"})


def curve_rows(name: str, share: Share) -> pd.DataFrame:
    low, high = share.interval()
    values = {"value": share.values, "low": low, "high": high}
    return pd.DataFrame({"layer": range(len(share.values)), "quantity": name, **values})


def draw(table: pd.DataFrame) -> Figure:
    """Shares of the four classes by layer, one panel for each model; the depth of half agreement with its interval."""
    names = list(dict.fromkeys(table["model"]))
    drawn, axes = workbench.figure(len(names), beside=1.2)
    colours = dict(zip(CLASSES, sns.color_palette(PALETTE), strict=False))
    for ax, name in zip(axes[0], names, strict=True):
        rows = table[table["model"] == name].astype({"layer": float})
        for kind in CLASSES:
            of_kind = rows[rows["quantity"] == kind]
            workbench.curve(ax, of_kind[of_kind["loops"] == "with"], "layer", colours[kind], kind)
            cut = of_kind[of_kind["loops"] == "without"]
            ax.plot(cut["layer"], cut["value"], ":", color=colours[kind], linewidth=0.8)
        half = rows[(rows["quantity"] == "half agreement") & (rows["loops"] == "with")].iloc[0]
        ends = [[half["value"] - half["low"]], [half["high"] - half["value"]]]
        ax.errorbar(half["value"], 0.5, xerr=ends, fmt="o", color="black", capsize=2, elinewidth=1, zorder=3,
                    label="half agreement")  # fmt: skip
        ax.plot([], [], ":", color="grey", linewidth=0.8, label="without loops")
        ax.set(title=plain(name), xlabel="layer (0: embedding)", ylim=(-0.02, 1.02))
        workbench.whole_numbers(ax)
    axes[0][0].set_ylabel("share of generated tokens")
    workbench.legend_beside(axes[0][-1], title="the lens")
    return drawn


if __name__ == "__main__":
    typer.run(main)
