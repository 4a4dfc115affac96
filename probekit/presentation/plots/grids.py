"""Figures over exit layer and draft length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.patches import Rectangle

from probekit.errors import InputError
from probekit.presentation.plots.calling import axes_or_current, plot
from probekit.presentation.plots.style import (
    DIVERGING,
    INK,
    SEQUENTIAL,
    colormap,
    diverging,
    ground_of,
    ink_on,
    label_points,
    nothing_to_show,
    points,
    points_of,
)

_KEYS = ("exit_layer", "draft_length")
Chosen = tuple[int | None, int]
"""(exit layer, or None for a draft model; draft length)."""


# Each writes its numbers at once where `numbers` is set. Several heat maps beside one another, or one whose layout is
# not final, are drawn without and given to `write_numbers` together. `colours_of(ax)` is what a colour bar needs.
@plot(*_KEYS, "acceptance_rate")
def acceptance_grid(
    cells: pd.DataFrame,
    *,
    ax: Axes | None = None,
    high: float | None = 1.0,
    numbers: bool = True,
    cmap: str | colors.Colormap = SEQUENTIAL,
) -> Axes:
    """Acceptance rate, accepted / drafted, over exit layer and draft length."""
    grid = _pivot(cells, "acceptance_rate")
    return _grid(axes_or_current(ax), grid, "acceptance_rate", _sequential(grid, 0.0, high, cmap), numbers)


@plot(*_KEYS, "tokens_per_round")
def tokens_per_round_grid(
    cells: pd.DataFrame,
    *,
    ax: Axes | None = None,
    high: float | None = None,
    numbers: bool = True,
    cmap: str | colors.Colormap = SEQUENTIAL,
) -> Axes:
    """Tokens per round, the token that verification adds in it, over exit layer and draft length."""
    grid = _pivot(cells, "tokens_per_round")
    return _grid(axes_or_current(ax), grid, "tokens_per_round", _sequential(grid, 1.0, high, cmap), numbers)


@plot(*_KEYS, "speedup")
def speedup_surface(
    cells: pd.DataFrame,
    chosen: Chosen | None = None,
    *,
    ax: Axes | None = None,
    low: float | None = None,
    high: float | None = None,
    numbers: bool = True,
    cmap: str | colors.Colormap = DIVERGING,
) -> Axes:
    """Predicted speedup over exit layer and draft length; colours and a line part gain from loss.

    chosen: (exit layer, draft length), which a frame marks; the exit layer None for a draft model; None: do not
        speculate. low, high: ends of the colours, to share them; cmap: a diverging one, its middle at 1.
    """
    ax, grid = axes_or_current(ax), _pivot(cells, "speedup")
    ends = _ends(grid, low, high)
    _grid(ax, grid, "speedup", diverging(*ends, cmap), numbers)
    gain = grid.to_numpy() > 1.0
    ax.add_collection(LineCollection(_border(gain), colors="white", linewidths=2.0, zorder=2.2))
    ax.add_collection(LineCollection(_border(gain), colors=INK, linewidths=0.9, zorder=2.2))
    if chosen is not None and grid.notna().any(axis=None):
        exit_layer, draft_length = chosen
        row = int(np.argmax(grid.index == (-1 if exit_layer is None else exit_layer)))
        corner = (int(np.argmax(grid.columns == draft_length)), row)
        for colour, width in (("white", 3.4), (INK, 1.8)):
            ax.add_patch(
                Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, zorder=2.4, clip_on=False)
            )
    return ax


def _pivot(cells: pd.DataFrame, value: str) -> pd.DataFrame:
    """(exit layers, draft lengths): a draft model in row -1."""
    frame = cells.assign(row=cells["exit_layer"].astype("Float64").fillna(-1).astype(int))
    repeated = frame.duplicated(["row", "draft_length"])
    if repeated.any():
        raise InputError("the table has cells of several models.", "Hand in those of one: cells[cells.model == ..].")
    grid = frame.pivot(index="row", columns="draft_length", values=value).astype(float)
    return grid.dropna(how="all") if grid.notna().any(axis=None) else grid


def _ends(grid: pd.DataFrame, low: float | None, high: float | None) -> tuple[float, float]:
    """Where the colours end: where it was said, else where the values do."""
    finite = grid.to_numpy()[np.isfinite(grid.to_numpy())]
    bottom = low if low is not None else float(finite.min()) if finite.size else 0.0
    top = high if high is not None else float(finite.max()) if finite.size else 1.0
    return bottom, top


def _sequential(
    grid: pd.DataFrame, low: float, high: float | None, cmap: str | colors.Colormap
) -> tuple[colors.Normalize, colors.Colormap]:
    bottom, top = _ends(grid, low, high)
    return colors.Normalize(bottom, top if top > bottom else bottom + 1.0), colormap(cmap)


def _grid(
    ax: Axes, grid: pd.DataFrame, value: str, coloured: tuple[colors.Normalize, colors.Colormap], numbers: bool
) -> Axes:
    """A heat map with the exit layers from bottom to top, a draft model below them, and numbers where they fit."""
    if not grid.notna().any(axis=None):
        nothing_to_show(ax, f"no {value.replace('_', ' ')} in this table")
        return ax
    norm, shades = coloured
    sns.heatmap(grid, cmap=shades, norm=norm, cbar=False, ax=ax, linewidths=0)
    ax.invert_yaxis()
    ax.grid(False)
    ax.minorticks_off()
    ax.set_xlabel("draft length K (tokens)")
    ax.set_ylabel("exit layer E")
    height = points_of(ax)[1] / len(grid)
    step = max(1, math.ceil(1.1 * label_points() / height))  # names of rows that do not touch
    ticks = [place for place, row in enumerate(grid.index) if row < 0 or (row - max(grid.index[0], 1)) % step == 0]
    ax.set_yticks([place + 0.5 for place in ticks])
    ax.set_yticklabels(["drafter" if grid.index[place] < 0 else str(grid.index[place]) for place in ticks], rotation=0)
    if grid.index[0] < 0:
        ax.axhline(1, color=ground_of(ax), linewidth=2)
    ax.tick_params(length=0, axis="both")
    ax.set_xticks(np.arange(len(grid.columns)) + 0.5)
    ax.set_xticklabels([str(length) for length in grid.columns], rotation=0)
    if numbers:
        write_numbers([ax], NUMBERS[value])
    return ax


NUMBERS = {"acceptance_rate": "{:.2f}", "tokens_per_round": "{:.1f}", "speedup": "{:.2f}"}
"""How the figures of a heat map are written into its cells."""


def write_numbers(axes: Sequence[Axes], number: str) -> None:
    """A number in each cell of these heat maps, all of one size, where every cell has room for one.

    Call it when the Axes have their place: the size follows from the cells'. number: a format, one of NUMBERS.
    """
    found = [(ax, mesh) for ax in axes for mesh in ax.collections if isinstance(mesh, QuadMesh)]
    if not found:
        return
    axes, meshes = zip(*found, strict=True)
    values = [_values_of(mesh) for mesh in meshes]
    texts = {number.format(value) for each in values for value in each.ravel() if np.isfinite(value)}
    places = [(points_of(ax), each.shape) for ax, each in zip(axes, values, strict=True)]
    width = min(across / shape[1] for (across, _), shape in places)
    height = min(up / shape[0] for (_, up), shape in places)
    longest = max((points(text, 10.0) / 10.0 for text in texts), default=1.0)  # em
    size = min(0.8125 * matplotlib.rcParams["font.size"], 0.82 * width / longest, height - 1.5)
    if size < 5:  # too small to read in print
        return
    for ax, mesh, each in zip(axes, meshes, values, strict=True):
        for (row, column), value in np.ndenumerate(each):
            if np.isfinite(value):
                ax.text(
                    column + 0.5, row + 0.5, number.format(value), ha="center", va="center_baseline", fontsize=size,
                    color=ink_on(mesh.to_rgba(value)), in_layout=False,
                )  # fmt: skip


def _values_of(mesh: QuadMesh) -> np.ndarray:
    """(rows, columns) float: what a heat map shows, NaN where it shows nothing."""
    rows, columns, _ = np.asarray(mesh.get_coordinates()).shape
    return np.ma.filled(np.ma.asarray(mesh.get_array(), dtype=float), np.nan).reshape(rows - 1, columns - 1)


def _border(inside: np.ndarray) -> list[list[tuple[float, float]]]:
    """Segments between cells that are inside and cells that are not. inside: (rows, columns) bool."""
    segments = []
    for row, column in zip(*np.nonzero(inside[:, 1:] != inside[:, :-1]), strict=True):
        segments.append([(column + 1.0, row + 0.0), (column + 1.0, row + 1.0)])
    for row, column in zip(*np.nonzero(inside[1:] != inside[:-1]), strict=True):
        segments.append([(column + 0.0, row + 1.0), (column + 1.0, row + 1.0)])
    return segments
