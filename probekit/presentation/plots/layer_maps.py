"""What maps of layer by position share: colours on both sides of 0, layers upwards, columns named after tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colors
from matplotlib.axes import Axes

from probekit.presentation.plots.glyphs import drawable, token_ticks
from probekit.presentation.plots.style import colormap, faint, label_points, points_of
from probekit.presentation.tokens import clipped


def signed_map(
    grid: pd.DataFrame, texts: Sequence[str], ax: Axes, high: float | None, cmap: str | colors.Colormap, label: str,
    prompt: int = 0,
) -> Axes:  # fmt: skip
    """A grid (layers, positions) with the least layer at the bottom.

    texts: of the tokens that are read, one a column. high: where the colours end, on both sides of 0; None: the data's
    reach. cmap: a diverging one. label: of the y axis. prompt: so many columns at the left are of the prompt: a line
    parts them from the continuation, and their tokens are pale.
    """
    reach = high or float(np.nanmax(np.abs(grid.to_numpy()), initial=0.0)) or 1.0
    shades = colors.ListedColormap(colormap(cmap)(np.linspace(0.06, 0.94, 256)))
    sns.heatmap(grid, cmap=shades, vmin=-reach, vmax=reach, cbar=False, ax=ax, linewidths=0)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.minorticks_off()
    step = max(1, math.ceil(1.1 * label_points() / (points_of(ax)[1] / len(grid))))  # names that do not touch
    ticks = range(0, len(grid), step)
    ax.set_yticks([place + 0.5 for place in ticks], [str(grid.index[place]) for place in ticks], rotation=0)
    ink, pale = matplotlib.rcParams["xtick.color"], faint(ax)
    inks = [pale if place < prompt else ink for place in range(len(texts))]
    token_ticks(ax, [clipped(text, 9, drawable) for text in texts], inks if prompt else None)
    if 0 < prompt < len(texts):
        ax.axvline(prompt, color=matplotlib.rcParams["text.color"], linewidth=0.8)
    ax.set_xlabel("token that is read")
    ax.set_ylabel(label)
    return ax
