"""Predicted against measured, run lengths, and what a trace costs beside a sweep."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from probekit.errors import InputError
from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import faint, ground_of, nothing_to_show, palette, untitled

COMPARED = {
    "rounds": ("predicted_rounds", "measured_rounds", "rounds (count)"),
    "acceptance_rate": ("predicted_acceptance_rate", "measured_acceptance_rate", "acceptance rate"),
    "speedup": ("speedup_predicted", "speedup_measured", "speedup (×)"),
}
"""What `predicted_against_measured` can show: the two columns, and the quantity with its unit."""


@plot("model")
def predicted_against_measured(validation: pd.DataFrame, quantity: str = "rounds", *, ax: Axes | None = None) -> Axes:
    """One point for each cell that was run, against the diagonal, with bars where something is uncertain.

    validation: columns model and those that `COMPARED` names. Bars are drawn of a measured speedup (its _20 and _80,
        quantiles of repeated timings), and of counts of sampled text (_low and _high, 95 % intervals over prompts).
        Rounds of greedy text (`rounds_equal` is there) are predicted exactly and have none.
    """
    ax = axes_or_current(ax)
    if quantity not in COMPARED:
        raise InputError(f"quantity is {quantity!r}; expected one of {', '.join(COMPARED)}.")
    here, there, label = COMPARED[quantity]
    frame = validation.dropna(subset=[here, there]).copy() if {here, there} <= set(validation.columns) else None
    if frame is None or frame.empty:
        nothing_to_show(ax, f"no {label} was measured")
        return ax
    frame["model"] = frame["model"].map(plain)
    colours = palette(list(dict.fromkeys(frame["model"])))
    bars = _spread(frame, there)
    for name, group in frame.assign(below=bars[0], above=bars[1]).groupby("model", sort=False):
        unsure = group[(group["below"] > 0) | (group["above"] > 0)]
        ax.errorbar(
            unsure[here], unsure[there], yerr=unsure[["below", "above"]].to_numpy(dtype=float).T, fmt="none",
            ecolor=(*colors.to_rgb(colours[name]), 0.45), elinewidth=0.7, zorder=1,
        )  # fmt: skip
    size = 6.3 * matplotlib.rcParams["lines.markersize"]
    sns.scatterplot(
        data=frame, x=here, y=there, hue="model", style="model", palette=colours, s=size, linewidth=0.4,
        edgecolor=ground_of(ax), ax=ax, zorder=2,
    )  # fmt: skip
    untitled(ax)
    measured = frame[there].to_numpy(dtype=float)
    reach = np.concatenate([frame[here].to_numpy(dtype=float), measured - bars[0], measured + bars[1]])
    margin = 0.06 * (reach.max() - reach.min() or abs(reach.max()) or 1.0)
    ends = reach.min() - margin, reach.max() + margin
    ax.plot(ends, ends, color=faint(ax), linewidth=0.8, linestyle=(0, (4, 2)), marker="", zorder=0)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5))
    ax.set_xlabel(plain(f"predicted {label}"))
    ax.set_ylabel(plain(f"measured {label}"))
    return ax


def _spread(frame: pd.DataFrame, column: str) -> np.ndarray:
    """(2, rows): how far bars reach below and above; 0 where there are none."""
    none = np.zeros((2, len(frame)))
    for below, above in (("_low", "_high"), ("_20", "_80")):
        if {column + below, column + above} <= set(frame.columns):
            middle, low, high = (frame[column + end].to_numpy(dtype=float) for end in ("", below, above))
            bars = np.nan_to_num(np.maximum(0.0, np.stack([middle - low, high - middle])))
            exact = below == "_low" and "rounds_equal" in frame
            return np.where(frame["rounds_equal"].notna(), 0.0, bars) if exact else bars
    return none


@plot("exit_layer", "run", "at_least", "at_least_low", "at_least_high", "geometric_at_least")
def run_lengths_against_geometric(runs: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Runs of at least r agreements, by r, with bars; the line is what independent agreements would give.

    runs: columns exit_layer, run, at_least, at_least_low, at_least_high, geometric_at_least; one model, a few exits.
    """
    ax = axes_or_current(ax)
    frame = runs[(runs["at_least"] > 0) | (runs["geometric_at_least"] >= 0.5)]
    if frame.empty:
        nothing_to_show(ax, "no exit agrees with the model anywhere" if len(runs) else "no run was counted")
        return ax
    colours = palette(list(dict.fromkeys(frame["exit_layer"])))
    law_look: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (4, 2)), "marker": ""}
    for place, (exit_layer, group) in enumerate(frame.groupby("exit_layer", sort=False)):
        seen = group[group["at_least"] > 0]
        count = seen["at_least"].to_numpy(dtype=float)
        low = np.nan_to_num(seen["at_least_low"].to_numpy(dtype=float), nan=0.0)
        high = np.where(seen["at_least_high"].isna(), count, seen["at_least_high"].to_numpy(dtype=float))
        ax.errorbar(
            seen["run"], count, yerr=np.maximum(0.0, [count - np.maximum(low, 0.5), high - count]),
            fmt=("o", "s", "^", "D", "v")[place % 5], markersize=0.75 * matplotlib.rcParams["lines.markersize"],
            color=colours[exit_layer], elinewidth=0.5, markeredgewidth=0, label=f"exit {exit_layer}", zorder=2,
        )  # fmt: skip
        law = group[group["geometric_at_least"] >= 0.5]
        ax.plot(law["run"], law["geometric_at_least"], color=colours[exit_layer], **law_look)
    ax.plot([], [], color=faint(ax), **law_look, label="geometric law")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.set_xlabel("run length r (tokens)")
    ax.set_ylabel("runs of at least r (count)")
    ax.legend()
    return ax


@plot("cells", "seconds", "source")
def trace_against_sweep(sweep: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Seconds to know the acceptance of 1, 2, .. cells: by running them one after the other, and by one trace.

    sweep: columns cells, seconds (cumulative), source: "trace", "measured" or "extrapolated"; one model.
    """
    ax = axes_or_current(ax)
    if sweep.empty:
        nothing_to_show(ax, "no cell has a speedup in this study")
        return ax
    blue, run = sns.color_palette(n_colors=2)
    by_running = sweep[sweep["source"] != "trace"].sort_values("cells")
    by_trace = sweep[sweep["source"] == "trace"].sort_values("cells")
    measured = by_running[by_running["source"] == "measured"]
    guessed = by_running[by_running["cells"] >= (measured["cells"].max() if len(measured) else 0)]
    drawn = (
        (measured, "each cell run", {"color": run, "marker": "o", "markeredgewidth": 0}),
        (guessed, "each cell run (extrapolated)", {"color": run, "linestyle": (0, (3, 2))}),
        (by_trace, "one trace", {"color": blue, "linewidth": 1.8}),
    )
    for part, name, look in drawn:
        if len(part):
            sns.lineplot(data=part, x="cells", y="seconds", label=name, errorbar=None, ax=ax, **look)
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    ax.set_xlabel("cells (E, K) known")
    ax.set_ylabel("time (s)")
    if len(by_running) and len(by_trace):
        last, flat = by_running.iloc[-1], float(by_trace["seconds"].iloc[-1])
        ax.annotate(
            "", (last["cells"], last["seconds"]), (last["cells"], flat),
            arrowprops={"arrowstyle": "<->", "color": faint(ax), "linewidth": 0.7, "shrinkA": 1, "shrinkB": 1},
        )  # fmt: skip
        ax.annotate(
            plain(f"{last['seconds'] / flat:.0f}×"), (last["cells"], math.sqrt(last["seconds"] * flat)), ha="right",
            va="center", xytext=(-3, 0), textcoords="offset points",
            fontsize=matplotlib.rcParams["ytick.labelsize"],
            bbox={"facecolor": ground_of(ax), "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    return ax


@plot("position", "kind", "rate")
def acceptance_by_position(positions: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of drafts accepted at each place of a round: of all rounds, and of those that accepted all before it.

    positions: columns position (1 is a round's first draft), kind (unconditional, conditional) and rate; rates that
        nobody saw are missing.
    """
    ax = axes_or_current(ax)
    frame = positions.dropna(subset=["rate"]).copy()
    if frame.empty:
        nothing_to_show(ax, "no round drafted anything")
        return ax
    frame["kind"] = frame["kind"].map(plain)
    sns.lineplot(
        data=frame, x="position", y="rate", hue="kind", style="kind", markers=True, errorbar=None,
        palette=palette(list(dict.fromkeys(frame["kind"]))), ax=ax,
    )  # fmt: skip
    untitled(ax)
    ax.set_ylim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(plain("place in the draft (tokens)"))
    ax.set_ylabel(plain("accepted (share)"))
    return ax
