"""Figures by layer: agreement, echo, entropy and KL."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import PALETTE, nothing_to_show, untitled


def agreement_by_layer(ax: Axes, layers: pd.DataFrame) -> None:
    """Share of generated positions where the lens has the model's token, by layer, with bands.

    layers: columns model, lens, layer, agreement, agreement_low, agreement_high; one lens or both.
    """
    by_layer(ax, layers, "agreement", "agreement (share of tokens)")
    if ax.lines:
        ax.set_ylim(-0.02, 1.02)
        ax.set_yticks(np.linspace(0, 1, 6))


def echo_by_layer(ax: Axes, layers: pd.DataFrame) -> None:
    """Share of generated positions where the lens has the token that was just read, by layer, with bands."""
    by_layer(ax, layers, "echo", "echo (share of tokens)")
    if ax.lines:
        top = max(0.1, *(float(layers[column].max()) for column in ("echo", "echo_high") if column in layers))
        ax.set_ylim(-0.02 * top, 1.05 * top)


def entropy_and_kl(entropy: Axes, divergence: Axes, layers: pd.DataFrame) -> None:
    """Mean entropy of the lens, and its mean KL divergence from the model, in nats, by layer, with bands."""
    by_layer(entropy, layers, "entropy", "entropy of the lens (nats)")
    by_layer(divergence, layers, "kl", "KL(model ‖ lens) (nats)")
    for ax in (entropy, divergence):
        ax.set_ylim(bottom=0)


def by_layer(ax: Axes, layers: pd.DataFrame, statistic: str, label: str) -> None:
    """One curve for each model and lens, with a band where `<statistic>_low` and `_high` are there.

    Models of different depth are drawn over the share of their depth.
    """
    frame = layers.dropna(subset=[statistic]).copy()
    if frame.empty:
        nothing_to_show(ax, f"no {statistic} in this study")
        return
    depths = frame.groupby("model")["layer"].transform("max")
    relative = depths.nunique() > 1
    frame["depth"] = frame["layer"] / depths if relative else frame["layer"]
    frame["model"] = frame["model"].map(plain)
    several, lenses = frame["model"].nunique() > 1, frame["lens"].nunique() > 1
    hue = "model" if several or not lenses else "lens"
    style = "lens" if lenses else hue
    names = list(dict.fromkeys(frame[hue]))
    palette = dict(zip(names, sns.color_palette(PALETTE, len(names)), strict=True))
    sns.lineplot(
        data=frame, x="depth", y=statistic, hue=hue, style=style, markers=True, dashes=True, errorbar=None,
        palette=palette, ax=ax, markeredgewidth=0,
    )  # fmt: skip
    if {f"{statistic}_low", f"{statistic}_high"} <= set(frame.columns):
        for _, group in frame.groupby(["model", "lens"], sort=False):
            low, high = (group[f"{statistic}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
            colour = palette[group[hue].iloc[0]]
            ax.fill_between(group["depth"].to_numpy(), low, high, color=colour, alpha=0.22, linewidth=0)
    untitled(ax)
    ax.set_xlabel("layer / depth" if relative else "layer (0: embedding, last: model)")
    ax.set_ylabel(label)
    if not relative:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.margins(x=0.02)
