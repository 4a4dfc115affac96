"""Ways of drafting: what each rung of the ladder gains, and where in a text an oracle would exit."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.ticker import MaxNLocator

from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import SEQUENTIAL, colormap, faint, ground_of, nothing_to_show

NO_EXIT = -1
"""In place of an exit layer: a round without drafts."""
FARTHEST = 2.0  # of the greatest speedup: where intervals end that would push all points together
_LETTERS = 30  # of a way's name: a tree's shape may have a branch for each of its levels
_NOTHING = "#d9d9d9"


@plot("rung", "way", "speedup", "speedup_low", "speedup_high")
def ladder(rungs: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A point for each rung, from plain decoding at the bottom to the oracle at the top, with 95 % intervals.

    An interval that reaches beyond twice the greatest speedup ends there in an arrow, so that the points stay apart.

    rungs: columns rung, way (what it is there), speedup, speedup_low, speedup_high (may be NaN); the lowest first.
    """
    ax = axes_or_current(ax)
    if rungs.empty:
        nothing_to_show(ax, "nothing was ranked")
        return ax
    heights, colour, pale = np.arange(len(rungs)), sns.color_palette(n_colors=1)[0], faint(ax)
    small = 0.8 * matplotlib.rcParams["font.size"]
    speedup, low, high = (rungs[name].to_numpy(dtype=float) for name in ("speedup", "speedup_low", "speedup_high"))
    ends = np.where(np.isfinite(high), high, speedup)
    beyond = ends > FARTHEST * speedup.max()
    ends = np.where(beyond, FARTHEST * speedup.max(), ends)
    ax.hlines(heights, np.where(np.isfinite(low), low, speedup), ends, color=colour, linewidth=1.6, alpha=0.5)
    for height, (gain, end, way) in enumerate(zip(speedup, ends, rungs["way"], strict=True)):
        ax.annotate(
            f"{gain:.2f}", (end, height), xytext=(5, 0), textcoords="offset points", va="center", fontsize=small,
            bbox={"facecolor": ground_of(ax), "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
        if way:
            shortened = way if len(way) <= _LETTERS else f"{way[: _LETTERS - 1]}…"
            ax.annotate(
                plain(shortened), (1.0, height - 0.34), xytext=(3, 0), textcoords="offset points", va="center",
                color=pale, fontsize=0.85 * small,
            )  # fmt: skip
    ax.scatter(ends[beyond], heights[beyond], s=16, color=colour, marker=">", linewidths=0)
    ax.scatter(speedup, heights, s=20, color=colour, zorder=3)
    ax.axvline(1.0, color=pale, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
    ax.set_yticks(heights, [plain(rung) for rung in rungs["rung"]])
    ax.grid(visible=False, axis="y")
    reach = float(ends.max())
    least = min(1.0, float(np.fmin(low, speedup).min()))
    ax.set_xlim(least - 0.06 * (reach - least + 0.1), reach + 0.3 * (reach - least + 0.1))  # room for the numbers
    ax.set_ylim(-0.8, len(rungs) - 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel(plain("predicted speedup (×)"))
    return ax


@plot("prompt", "start", "emitted", "exit_layer")
def exit_map(
    rounds: pd.DataFrame, exits: int | None = None, *, ax: Axes | None = None, empty: str = "no text has a round"
) -> Axes:
    """Each text a line, each round a bar as long as the tokens that it emits, coloured by the exit that drafts.

    rounds: columns prompt, start, emitted, exit_layer (NO_EXIT: no drafts, light grey). exits: the last exit layer;
    by default the last that drafts. `exit_colours(exits)` is what a colour bar needs. empty: why there may be none.
    """
    ax = axes_or_current(ax)
    if rounds.empty:
        nothing_to_show(ax, empty)
        return ax
    mappable = exit_colours(max(1, int(rounds["exit_layer"].max())) if exits is None else exits)
    lines = {prompt: line for line, prompt in enumerate(dict.fromkeys(rounds["prompt"]))}
    for prompt, own in rounds.groupby("prompt", sort=False):
        spans = list(zip(own["start"] - 0.5, own["emitted"], strict=True))
        colours = [_NOTHING if layer == NO_EXIT else mappable.to_rgba(layer) for layer in own["exit_layer"]]
        ax.broken_barh(spans, (lines[prompt] - 0.4, 0.8), facecolors=colours, edgecolor=ground_of(ax), linewidth=0.4)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.set_xlim(0.0, float((rounds["start"] + rounds["emitted"]).max()))
    ax.set_yticks(list(lines.values()), [str(prompt) for prompt in lines])
    ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.grid(visible=False)
    ax.set_xlabel("output position (tokens)")
    ax.set_ylabel("text")
    return ax


def exit_colours(exits: int) -> ScalarMappable:
    """A colour for each exit layer, 1..exits."""
    return ScalarMappable(BoundaryNorm(np.arange(0.5, max(2, exits) + 1.0), 256), colormap(SEQUENTIAL))
