"""The lens table: layer by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colors
from matplotlib.axes import Axes

from probekit.errors import InputError
from probekit.lens.statistics import COLOURED as STATISTICS
from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.glyphs import drawable, families, plain, token, token_ticks
from probekit.presentation.plots.style import (
    SEQUENTIAL,
    faint,
    ground_of,
    ink_on,
    nothing_to_show,
    points,
    points_of,
)
from probekit.presentation.tokens import clipped, shown


@plot("position", "generated", "input", "layer", "token", "agrees")
def lens_table(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    statistic: str = "probability",
    every: int = 1,
    font_size: float | None = None,
    high: float | None = None,
) -> Axes:
    """Layer by position, bottom to top: the top token in each cell, coloured by one statistic.

    Layer 0 is the embedding, the last row, set apart, the model itself. A dot marks the cells that have the model's
    token. Columns of the prompt are grey. Call it when the Axes have their place: tokens are cut to the cells' width.

    Parameters
    ----------
    table: columns position, generated, input, layer, token, agrees, and the statistic; a row for each layer and
        position of one text and one lens.
    every: show each n-th layer, and always the model.
    font_size: of the tokens, in points; three quarters of `font.size` by default.
    high: upper end of the colours, to share it between tables; of the data (or 1) by default.

    `plots.colours_of(ax)` is what a colour bar needs. Raises InputError for a statistic that the table has not.
    """
    ax = axes_or_current(ax)
    if statistic not in STATISTICS or statistic not in table:
        offered = ", ".join(name for name in STATISTICS if name in table)
        raise InputError(f"statistic is {statistic!r}; this table has {offered or 'none'}.")
    if table.empty:
        nothing_to_show(ax, "no text in this table")
        return ax
    font_size = font_size or 0.75 * matplotlib.rcParams["font.size"]
    ink, pale, ground = matplotlib.rcParams["text.color"], faint(ax), ground_of(ax)
    described = STATISTICS[statistic]
    depth = int(table["layer"].max())
    layers = [layer for layer in range(0, depth, every) if depth - layer >= every or layer == 0] + [depth]
    frame = table[table["layer"].isin(layers)]
    values = frame.pivot(index="layer", columns="position", values=statistic).astype(float)
    heads = frame.drop_duplicates("position").set_index("position").loc[values.columns]
    prompt = ~heads["generated"].to_numpy(dtype=bool)

    top = high if high is not None else described.high
    ends = (
        float(np.nanmin(values.to_numpy())) if described.low is None else described.low,
        float(np.nanmax(values.to_numpy())) if top is None else top,
    )
    norm = colors.Normalize(ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1.0)
    coloured, grey = _maps(described.reverse)
    for place, colours in ((prompt, grey), (~prompt, coloured)):  # the colours that a bar explains come last
        hidden = np.broadcast_to(~place, values.shape)
        # norm is what vmin and vmax would make of the values, and is needed for the letters as well
        sns.heatmap(
            values, mask=hidden, cmap=colours, norm=norm, vmin=norm.vmin, vmax=norm.vmax, cbar=False, ax=ax,
            linewidths=0.4, linecolor=ground,
        )  # fmt: skip

    ax.invert_yaxis()
    ax.grid(False)
    ax.set_yticks(np.arange(len(layers)) + 0.5)
    ax.set_yticklabels([_layer_name(layer, depth) for layer in layers], rotation=0)
    ax.set_ylabel("layer")
    ax.set_xlabel("token that is read")
    ax.minorticks_off()
    inputs = [clipped(text, 9, drawable) for text in heads["input"]]
    token_ticks(ax, inputs, [pale if is_prompt else ink for is_prompt in prompt], fontsize=font_size)
    ax.axhline(len(layers) - 1, color=ground, linewidth=3)
    ax.axhline(len(layers) - 1, color=ink, linewidth=0.6)
    first = int(np.argmin(prompt))
    notes = sum(points(text, font_size) for text in ("• the model's token ", " continuation "))
    crowded = prompt[0] and notes > points_of(ax)[0] * (1 - first / len(prompt))
    _above(ax, len(prompt), "• the model's token ", "right", font_size, ink, 1.4 * font_size if crowded else 0.0)
    if prompt.any() and not prompt.all():
        ax.axvline(first, color=ink, linewidth=0.8)
        _above(ax, first, "prompt ", "right", font_size, pale)
        _above(ax, first, " continuation", "left", font_size, ink)
    _write_tokens(ax, frame, layers, values.columns.to_numpy(), prompt, norm, (coloured, grey), statistic, font_size)
    return ax


def _above(ax: Axes, column: int, text: str, align: str, font_size: float, ink: Any, lift: float = 0.0) -> None:
    """A small note above the table, at the left edge of a column, `lift` points higher than others."""
    ax.annotate(
        plain(text), (column, 1), xycoords=("data", "axes fraction"), ha=align, va="bottom", fontsize=font_size,
        color=ink, xytext=(0, 1.5 + lift), textcoords="offset points",
    )  # fmt: skip


def _write_tokens(
    ax: Axes,
    frame: pd.DataFrame,
    layers: Sequence[int],
    positions: np.ndarray,
    prompt: np.ndarray,
    norm: colors.Normalize,
    maps: tuple[colors.Colormap, colors.Colormap],
    statistic: str,
    font_size: float,
) -> None:
    width = points_of(ax)[0] / len(positions) - 3.0
    rows = {layer: row for row, layer in enumerate(layers)}
    places = {position: place for place, position in enumerate(positions.tolist())}
    for cell in frame[["layer", "position", "token", "agrees", statistic]].itertuples(index=False):
        row, place = rows[cell[0]], places[cell[1]]
        ground = maps[int(prompt[place])](norm(float(cell[4])))
        ink = ink_on(ground)
        text = _fitted(cell[2], width, font_size)
        ax.text(
            place + 0.5, row + 0.5, token(text), ha="center", va="center_baseline", fontsize=font_size, color=ink,
            parse_math=False, usetex=False, family=families(text), clip_on=True, in_layout=False,
        )  # fmt: skip
        if cell[3] and row < len(layers) - 1:
            ax.plot(place + 0.94, row + 0.86, marker="o", markersize=1.6, color=ink, markeredgewidth=0, clip_on=False)


def _maps(reverse: bool) -> tuple[colors.Colormap, colors.Colormap]:
    """The colours of generated and of prompt positions; the darkest end is left out so that letters stay legible."""
    coloured = sns.color_palette(SEQUENTIAL, as_cmap=True)(np.linspace(0.0, 0.85, 256))
    grey = matplotlib.colormaps["Greys"](np.linspace(0.03, 0.45, 256))
    step = -1 if reverse else 1
    return colors.ListedColormap(coloured[::step]), colors.ListedColormap(grey[::step])


def _layer_name(layer: int, depth: int) -> str:
    if layer == depth:
        return f"model, {depth}"
    return "embedding, 0" if layer == 0 else str(layer)


def _fitted(text: str, width: float, font_size: float) -> str:
    """`text`, made visible and cut until it is at most `width` points wide."""
    whole = shown(text, drawable)
    if points(whole, font_size) <= width:
        return whole
    for length in range(min(len(whole), 24), 1, -1):
        cut = clipped(text, length, drawable)
        if points(cut, font_size) <= width:
            return cut
    return "…"
