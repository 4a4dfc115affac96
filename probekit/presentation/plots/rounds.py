"""Predicted against measured, run lengths, and what a trace costs beside a sweep."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import FAINT, INK, PALETTE, nothing_to_show, untitled

COMPARED = {
    "rounds": ("predicted_rounds", "measured_rounds", "rounds (count)"),
    "acceptance_rate": ("predicted_acceptance_rate", "measured_acceptance_rate", "acceptance rate"),
    "speedup": ("speedup_predicted", "speedup_measured", "speedup (×)"),
}
"""What `predicted_against_measured` can show: the two columns, and the quantity with its unit."""


def predicted_against_measured(ax: Axes, validation: pd.DataFrame, quantity: str) -> None:
    """One point for each cell that was run, against the diagonal, with bars.

    validation: columns model, those that `COMPARED` names, and for the bars their _low and _high (95 % intervals), or
        their _20 and _80 (quantiles of repeated timings).
    """
    here, there, label = COMPARED[quantity]
    frame = validation.dropna(subset=[here, there]).copy() if {here, there} <= set(validation.columns) else None
    if frame is None or frame.empty:
        nothing_to_show(ax, f"no {label} was measured")
        return
    frame["model"] = frame["model"].map(plain)
    names = list(dict.fromkeys(frame["model"]))
    palette = dict(zip(names, sns.color_palette(PALETTE, len(names)), strict=True))
    for name, group in frame.groupby("model", sort=False):
        ax.errorbar(
            group[here], group[there], xerr=_spread(group, here), yerr=_spread(group, there), fmt="none",
            ecolor=(*palette[str(name)], 0.45), elinewidth=0.7, zorder=1,
        )  # fmt: skip
    sns.scatterplot(
        data=frame, x=here, y=there, hue="model", style="model", palette=palette, s=22, linewidth=0.4,
        edgecolor="white", ax=ax, zorder=2,
    )  # fmt: skip
    untitled(ax)
    drawn = [column for column in frame.columns if column.startswith((here, there))]
    reach = frame[drawn].to_numpy(dtype=float)
    reach = reach[np.isfinite(reach)]
    margin = 0.06 * (reach.max() - reach.min() or abs(reach.max()) or 1.0)
    ends = reach.min() - margin, reach.max() + margin
    ax.plot(ends, ends, color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5))
    ax.set_xlabel(f"predicted {label}")
    ax.set_ylabel(f"measured {label}")


def _spread(frame: pd.DataFrame, column: str) -> np.ndarray | None:
    """(2, rows): how far bars reach below and above, or None without such columns."""
    for below, above in (("_low", "_high"), ("_20", "_80")):
        if {column + below, column + above} <= set(frame.columns):
            middle, low, high = (frame[column + end].to_numpy(dtype=float) for end in ("", below, above))
            return np.nan_to_num(np.maximum(0.0, np.stack([middle - low, high - middle])))
    return None


def run_lengths_against_geometric(ax: Axes, runs: pd.DataFrame) -> None:
    """Runs of at least r agreements, by r, with bars; the line is what independent agreements would give.

    runs: columns exit_layer, run, at_least, at_least_low, at_least_high, geometric_at_least; one model, a few exits.
    """
    frame = runs[(runs["at_least"] > 0) | (runs["geometric_at_least"] >= 0.5)]
    if frame.empty:
        nothing_to_show(ax, "no run was counted")
        return
    exits = list(dict.fromkeys(frame["exit_layer"]))
    palette = sns.color_palette(PALETTE, len(exits))
    for place, (exit_layer, group) in enumerate(frame.groupby("exit_layer", sort=False)):
        seen = group[group["at_least"] > 0]
        count = seen["at_least"].to_numpy(dtype=float)
        low = np.nan_to_num(seen["at_least_low"].to_numpy(dtype=float), nan=0.0)
        high = np.where(seen["at_least_high"].isna(), count, seen["at_least_high"].to_numpy(dtype=float))
        ax.errorbar(
            seen["run"], count, yerr=np.maximum(0.0, [count - np.maximum(low, 0.5), high - count]),
            fmt=("o", "s", "^", "D", "v")[place % 5], markersize=2.6, color=palette[place], elinewidth=0.5,
            markeredgewidth=0, label=f"exit {exit_layer}", zorder=2,
        )  # fmt: skip
        law = group[group["geometric_at_least"] >= 0.5]
        ax.plot(law["run"], law["geometric_at_least"], color=palette[place], linewidth=1.0, linestyle=(0, (4, 2)))
    ax.plot([], [], color=FAINT, linewidth=1.0, linestyle=(0, (4, 2)), label="geometric law")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.set_xlabel("run length r (tokens)")
    ax.set_ylabel("runs of at least r (count)")
    ax.legend()


def trace_against_sweep(ax: Axes, sweep: pd.DataFrame) -> None:
    """Seconds to know the acceptance of 1, 2, .. cells: by running them one after the other, and by one trace.

    sweep: columns cells, seconds (cumulative), source: "trace", "measured" or "extrapolated"; one model.
    """
    run, blue = sns.color_palette(PALETTE)[1], sns.color_palette(PALETTE)[0]
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
            arrowprops={"arrowstyle": "<->", "color": FAINT, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 1},
        )  # fmt: skip
        ax.annotate(
            f"{last['seconds'] / flat:.0f}×", (last["cells"], math.sqrt(last["seconds"] * flat)), ha="right",
            va="center", xytext=(-3, 0), textcoords="offset points", fontsize=7, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
