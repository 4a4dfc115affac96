"""Figures by layer: agreement, echo, entropy and KL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from probekit.errors import InputError
from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import nothing_to_show, palette, untitled

_KEYS = ("model", "lens", "layer")


@plot(*_KEYS, "agreement")
def agreement_by_layer(layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of generated positions where the lens has the model's token, by layer, with bands.

    layers: columns model, lens, layer, agreement, agreement_low, agreement_high; one lens or both.
    """
    ax = by_layer(layers, "agreement", "agreement (share of tokens)", ax=ax)
    if ax.lines:
        ax.set_ylim(-0.02, 1.02)
        ax.set_yticks(np.linspace(0, 1, 6))
    return ax


@plot(*_KEYS, "echo")
def echo_by_layer(layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of generated positions where the lens has the token that was just read, by layer, with bands."""
    ax = by_layer(layers, "echo", "echo (share of tokens)", ax=ax)
    if ax.lines:
        top = max(0.1, *(float(layers[column].max()) for column in ("echo", "echo_high") if column in layers))
        ax.set_ylim(-0.02 * top, 1.05 * top)
    return ax


@plot(*_KEYS, "entropy")
def entropy_by_layer(layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Mean entropy of the lens in nats, by layer, with bands."""
    ax = by_layer(layers, "entropy", "entropy of the lens (nats)", ax=ax)
    ax.set_ylim(bottom=0)
    return ax


@plot(*_KEYS, "kl")
def kl_by_layer(layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Mean KL divergence of the lens from the model in nats, by layer, with bands."""
    ax = by_layer(layers, "kl", "KL(model ‖ lens) (nats)", ax=ax)
    ax.set_ylim(bottom=0)
    return ax


def entropy_and_kl(
    layers: pd.DataFrame | Axes, *old: Axes | pd.DataFrame, axes: Sequence[Axes] | None = None
) -> tuple[Axes, Axes]:
    """`entropy_by_layer` and `kl_by_layer` on two Axes, by default those of a new figure of pyplot's.

    The order of before, `entropy_and_kl(entropy, divergence, layers)`, still works.
    """
    if isinstance(layers, Axes):
        if len(old) != 2 or not isinstance(old[1], pd.DataFrame):
            raise InputError("entropy_and_kl needs a table.", "Call it as entropy_and_kl(layers, axes=(one, other)).")
        axes, layers = (layers, axes_or_current(old[0])), old[1]  # type: ignore[arg-type]
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, layout="constrained")[1]
    entropy, divergence = axes
    return entropy_by_layer(layers, ax=entropy), kl_by_layer(layers, ax=divergence)


@plot(*_KEYS)
def by_layer(layers: pd.DataFrame, statistic: str, label: str | None = None, *, ax: Axes | None = None) -> Axes:
    """One curve for each model and lens, with a band where `<statistic>_low` and `_high` are there.

    Models of different depth are drawn over the share of their depth. label: of the y axis, the statistic's name by
    default. Colours are those of the current cycle.
    """
    ax = axes_or_current(ax)
    if statistic not in layers:
        raise InputError(f"the table for by_layer has no column {statistic}.", f"It has {', '.join(layers.columns)}.")
    frame = layers.dropna(subset=[statistic]).copy()
    if frame.empty:
        nothing_to_show(ax, f"no {statistic} in this study")
        return ax
    depths = frame.groupby("model")["layer"].transform("max")
    relative = depths.nunique() > 1
    frame["depth"] = frame["layer"] / depths if relative else frame["layer"]
    frame["model"] = frame["model"].map(plain)
    several, lenses = frame["model"].nunique() > 1, frame["lens"].nunique() > 1
    hue = "model" if several or not lenses else "lens"
    style = "lens" if lenses else hue
    colours = palette(list(dict.fromkeys(frame[hue])))
    sns.lineplot(
        data=frame, x="depth", y=statistic, hue=hue, style=style, markers=True, dashes=True, errorbar=None,
        palette=colours, ax=ax, markeredgewidth=0,
    )  # fmt: skip
    if {f"{statistic}_low", f"{statistic}_high"} <= set(frame.columns):
        for _, group in frame.groupby(["model", "lens"], sort=False):
            low, high = (group[f"{statistic}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
            colour = colours[group[hue].iloc[0]]
            ax.fill_between(group["depth"].to_numpy(), low, high, color=colour, alpha=0.22, linewidth=0)
    untitled(ax)
    ax.set_xlabel(plain("layer / depth" if relative else "layer (0: embedding, last: model)"))
    ax.set_ylabel(plain(label or statistic.replace("_", " ")))
    if not relative:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.margins(x=0.02)
    return ax
