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
from matplotlib.figure import Figure
from workbench import OUTPUT, PROMPTS, TOKENS, TRACES, Device, Limit, Models, Output, Tokens, Traces, bench, figure

from probekit.presentation.plots import plain
from probekit.tracing.traces import Trace
from probekit.tying.pooling import Estimate, Share
from probekit.tying.shares import CLASSES, class_shares, half_agreement, layer_means, valley
from probekit.tying.text_kinds import before_loops, looped_share

NAME = "01_agreement_by_layer"


def main(
    models: Models = None, output: Output = OUTPUT, traces: Traces = TRACES, prompts: Limit = PROMPTS,
    max_new_tokens: Tokens = TOKENS, device: Device = None,
) -> None:  # fmt: skip
    """From which layer on does the lens know the answer, and what does it say before?"""
    with bench(models, output, traces, prompts, max_new_tokens, device) as work:
        parts = []
        for loaded in work.loaded():
            trace = work.trace(loaded)
            parts += [rows_of(trace, "with"), rows_of(before_loops(trace), "without")]
        table = pd.concat(parts, ignore_index=True)
        work.write(NAME, main.__doc__ or "", table, draw(table))


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
    half, shape = half_agreement(trace), valley(trace)
    figures = {
        "half agreement": half,
        "half agreement, share of depth": Estimate(*(figure / trace.depth for figure in half)),
        "valley floor": shape.floor,
        "valley layer": shape.layer,
        "valley drop": shape.drop,
        "looped tokens": Estimate(looped_share(trace), float("nan"), float("nan")),
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
    """Stacked shares by layer, one panel for each model; the depth of half agreement with its interval above."""
    names = list(dict.fromkeys(table["model"]))
    drawn, axes = figure(len(names))
    colours = sns.color_palette("mako_r", len(CLASSES))
    for ax, name in zip(axes[0], names, strict=True):
        rows = table[(table["model"] == name) & (table["loops"] == "with")]
        shares = rows[rows["quantity"].isin(CLASSES)].pivot(index="layer", columns="quantity", values="value")
        ax.stackplot(
            shares.index.to_numpy(int), shares[list(CLASSES)].T.to_numpy(float), labels=CLASSES, colors=colours[::-1]
        )
        half = rows[rows["quantity"] == "half agreement"].iloc[0]
        ax.errorbar(
            half["value"], 0.5, xerr=[[half["value"] - half["low"]], [half["high"] - half["value"]]], fmt="o",
            color="white", ecolor="white", markersize=3, capsize=2, elinewidth=1,
        )  # fmt: skip
        ax.set(title=plain(name), xlabel="layer (0: embedding, last: model)", ylim=(0, 1), xlim=(0, shares.index.max()))
    axes[0][0].set_ylabel("share of generated tokens")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


if __name__ == "__main__":
    typer.run(main)
