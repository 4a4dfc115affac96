"""Pictures, drawn on the Axes that a caller hands in. No files, no figures made, no torch.

Each function takes one of the study's tables (see `presentation.tables`), of one model or of several, and writes the
units on its axes. One-signed figures are coloured by one sequential map that is monotonic in lightness, so that they
read the same in grey; lines differ in colour, dash and marker. Intervals are 95 %, over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colors, font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from probekit.presentation.tokens import clipped, shown

SEQUENTIAL = "mako_r"
PALETTE = "colorblind"
INK = "#1a1a1a"
FAINT = "#767676"

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same letters on every machine
    "font.size": 8.0,
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.titlepad": 4.0,
    "axes.labelpad": 3.0,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.0,
    "legend.title_fontsize": 7.0,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.borderaxespad": 0.3,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "patch.linewidth": 0.5,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType inside: text stays text, and stays editable
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "probekit",
}
"""The look of every picture, for `matplotlib.rc_context`."""


@dataclass(frozen=True)
class Statistic:
    """How a column of the trace is called, and between which bounds it is coloured (None: those of the data)."""

    label: str
    low: float | None = 0.0
    high: float | None = None
    reverse: bool = False


STATISTICS: dict[str, Statistic] = {
    "probability": Statistic("probability of the top token", 0.0, 1.0),
    "margin": Statistic("margin of the top two (logits)"),
    "entropy": Statistic("entropy (nats)"),
    "kl": Statistic("KL(model ‖ lens) (nats)"),
    "overlap": Statistic("overlap, Σ min(p, q)", 0.0, 1.0),
    "log_probability": Statistic("log-probability of the text's token (nats)", None, 0.0, reverse=True),
    "rank": Statistic("rank of the text's token (0: top)"),
    "model_rank": Statistic("rank of the lens's token in the model (0: top)"),
}
"""What a lens table can be coloured by."""


# ------------------------------------------------------------------------------------------------ the lens table
def lens_table(
    ax: Axes,
    table: pd.DataFrame,
    *,
    statistic: str = "probability",
    every: int = 1,
    font_size: float = 6.0,
    high: float | None = None,
) -> ScalarMappable:
    """Layer by position, bottom to top: the top token in each cell, coloured by one statistic.

    Layer 0 is the embedding, the last row, set apart, the model itself. A dot marks the cells that have the model's
    token. Columns of the prompt are grey. Call it when the Axes have their place: tokens are cut to the cells' width.

    Parameters
    ----------
    table: columns position, generated, input, layer, token, agrees, and the statistic; a row for each layer and
        position of one text and one lens.
    every: show each n-th layer, and always the model.
    high: upper end of the colours, to share it between tables; of the data (or 1) by default.

    Returns what a colour bar needs.
    """
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
    for place, colours in ((~prompt, coloured), (prompt, grey)):
        if place.any():
            hidden = np.broadcast_to(~place, values.shape)
            # norm is what vmin and vmax would make of the values, and is needed for the letters as well
            sns.heatmap(values, mask=hidden, cmap=colours, norm=norm, cbar=False, ax=ax, linewidths=0.4)

    ax.invert_yaxis()
    ax.grid(False)
    ax.set_yticks(np.arange(len(layers)) + 0.5)
    ax.set_yticklabels([_layer_name(layer, depth) for layer in layers], rotation=0)
    ax.set_ylabel("layer")
    ax.set_xlabel("token that is read")
    inputs = [clipped(text, 9, drawable) for text in heads["input"]]
    ax.set_xticks(np.arange(len(inputs)) + 0.5, inputs)
    ax.tick_params(length=0)
    for tick, text, is_prompt in zip(ax.get_xticklabels(), inputs, prompt, strict=True):
        tick.set(
            parse_math=False, family=families(text), fontsize=font_size, rotation=40, ha="right", va="top",
            rotation_mode="anchor", color=FAINT if is_prompt else INK,
        )  # fmt: skip
    ax.axhline(len(layers) - 1, color="white", linewidth=3)
    ax.axhline(len(layers) - 1, color=INK, linewidth=0.6)
    _above(ax, len(prompt), "• the model's token ", "right", font_size, INK)
    if prompt.any() and not prompt.all():
        first = int(np.argmin(prompt))
        ax.axvline(first, color=INK, linewidth=0.8)
        _above(ax, first, "prompt ", "right", font_size, FAINT)
        _above(ax, first, " continuation", "left", font_size, INK)
    _write_tokens(ax, frame, layers, values.columns.to_numpy(), prompt, norm, (coloured, grey), statistic, font_size)
    return ScalarMappable(norm, coloured)


def _above(ax: Axes, column: int, text: str, align: str, font_size: float, ink: str) -> None:
    """A small note above the table, at the left edge of a column."""
    ax.annotate(
        text, (column, 1), xycoords=("data", "axes fraction"), ha=align, va="bottom", fontsize=font_size, color=ink,
        xytext=(0, 1.5), textcoords="offset points",
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
    width = _points_of(ax)[0] / len(positions) - 3.0
    rows = {layer: row for row, layer in enumerate(layers)}
    places = {position: place for place, position in enumerate(positions.tolist())}
    for cell in frame[["layer", "position", "token", "agrees", statistic]].itertuples(index=False):
        row, place = rows[cell[0]], places[cell[1]]
        ground = maps[int(prompt[place])](norm(float(cell[4])))
        ink = _ink_on(ground)
        text = _fitted(cell[2], width, font_size)
        ax.text(
            place + 0.5, row + 0.5, text, ha="center", va="center_baseline", fontsize=font_size, color=ink,
            parse_math=False, family=families(text), clip_on=True, in_layout=False,
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


def _points_of(ax: Axes) -> tuple[float, float]:
    """Width and height in points, once the layout is done."""
    figure = ax.figure.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    extent = ax.get_window_extent()
    return extent.width / figure.dpi * 72, extent.height / figure.dpi * 72


def _label_points() -> float:
    return font_manager.FontProperties(size=matplotlib.rcParams["ytick.labelsize"]).get_size_in_points()


def _fitted(text: str, width: float, font_size: float) -> str:
    """`text`, made visible and cut until it is at most `width` points wide."""
    whole = shown(text, drawable)
    if _points(whole, font_size) <= width:
        return whole
    for length in range(min(len(whole), 24), 1, -1):
        cut = clipped(text, length, drawable)
        if _points(cut, font_size) <= width:
            return cut
    return "…"


def _points(text: str, font_size: float) -> float:
    properties = font_manager.FontProperties(family=families(text), size=font_size)
    return text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]


def _ink_on(ground: Any) -> str:
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colors.to_rgb(ground)
    )
    # Relative luminance; dark letters on what is lighter than the point of equal contrast (WCAG 2).
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.19 else "white"


# ------------------------------------------------------------------------------------------------ glyphs
def drawable(character: str) -> bool:
    """Whether some installed font that matplotlib can draw with has a shape for this character."""
    return _font_with(character, tuple(matplotlib.rcParams["font.family"])) is not None


def families(text: str) -> list[str]:
    """Font families for `text`: the usual ones, then those that have the shapes they lack."""
    usual = tuple(matplotlib.rcParams["font.family"])
    found = (_font_with(character, usual) for character in dict.fromkeys(text))
    return [*usual, *dict.fromkeys(family for family in found if family is not None and family not in usual)]


@cache
def _font_with(character: str, usual: tuple[str, ...]) -> str | None:
    """The first of the usual families, else of all installed ones by name, that has a shape for the character."""
    for family in usual:
        path = font_manager.findfont(font_manager.FontProperties(family=family))
        if _covers(path, character):
            return family
    return next((family for family, path in _installed() if _covers(path, character)), None)


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    """Upright regular faces of every family, sans first; fonts made of placeholders or for formulas left out."""
    faces: dict[str, str] = {}
    for face in sorted(font_manager.fontManager.ttflist, key=lambda face: (face.name, str(face.fname))):
        plain = face.style == "normal" and face.weight in (400, "normal", "regular", "book")
        if plain and not face.name.startswith((".", "Last Resort", "STIX", "cm", "DejaVu Sans Display")):
            faces.setdefault(face.name, str(face.fname))
    return tuple(sorted(faces.items(), key=lambda item: ("Sans" not in item[0], item[0])))


def _covers(path: str, character: str) -> bool:
    try:
        font = font_manager.get_font(path)
    except (OSError, RuntimeError):  # a broken file, or a bitmap font, which cannot be scaled
        return False
    return bool(font.scalable) and font.get_char_index(ord(character)) != 0


def plain(text: str) -> str:
    """`text` as a label: visible, and never read as a formula."""
    return shown(text, lambda character: character == " " or drawable(character)).replace("␣", " ").replace("$", r"\$")


# ------------------------------------------------------------------------------------------------ curves by layer
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
        _nothing(ax, f"no {statistic} in this study")
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
    _untitled(ax)
    ax.set_xlabel("layer / depth" if relative else "layer (0: embedding, last: model)")
    ax.set_ylabel(label)
    if not relative:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.margins(x=0.02)


def _untitled(ax: Axes) -> None:
    """The names in a legend speak for themselves."""
    legend = ax.get_legend()
    if legend is not None:
        legend.set_title("")


# ------------------------------------------------------------------------------------------------ over E and K
# Each writes its numbers at once where `numbers` is set. Several heat maps beside one another, or one whose layout is
# not final, are drawn without and given to `write_numbers` together.
def acceptance_grid(ax: Axes, cells: pd.DataFrame, *, high: float | None = 1.0, numbers: bool = True) -> ScalarMappable:
    """Acceptance rate, accepted / drafted, over exit layer and draft length."""
    mapped, _ = _grid(ax, cells, "acceptance_rate", 0.0, high, numbers)
    return mapped


def tokens_per_round_grid(
    ax: Axes, cells: pd.DataFrame, *, high: float | None = None, numbers: bool = True
) -> ScalarMappable:
    """Tokens per round, the token that verification adds in it, over exit layer and draft length."""
    mapped, _ = _grid(ax, cells, "tokens_per_round", 1.0, high, numbers)
    return mapped


def speedup_surface(
    ax: Axes,
    cells: pd.DataFrame,
    chosen: tuple[int | None, int] | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    numbers: bool = True,
) -> ScalarMappable:
    """Predicted speedup over exit layer and draft length; a line parts gain from loss, a frame marks the chosen pair.

    chosen: (exit layer, draft length), the exit layer None for a draft model; None: do not speculate.
    """
    mapped, grid = _grid(ax, cells, "speedup", low, high, numbers)
    ax.add_collection(LineCollection(_border(grid.to_numpy() > 1.0), colors="white", linewidths=2.0, zorder=3))
    ax.add_collection(LineCollection(_border(grid.to_numpy() > 1.0), colors=INK, linewidths=0.9, zorder=3))
    if chosen is not None:
        exit_layer, draft_length = chosen
        row = int(np.argmax(grid.index == (-1 if exit_layer is None else exit_layer)))
        corner = (int(np.argmax(grid.columns == draft_length)), row)
        for colour, width in (("white", 3.0), ("#d55e00", 1.6)):
            ax.add_patch(
                Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, zorder=4, clip_on=False)
            )
    return mapped


def _grid(
    ax: Axes, cells: pd.DataFrame, value: str, low: float | None, high: float | None, numbers: bool
) -> tuple[ScalarMappable, pd.DataFrame]:
    """A heat map with the exit layers from bottom to top, a draft model below them, and numbers where they fit."""
    frame = cells.assign(row=cells["exit_layer"].astype("Float64").fillna(-1).astype(int))
    grid = frame.pivot(index="row", columns="draft_length", values=value).astype(float)
    grid = grid.dropna(how="all") if grid.notna().any(axis=None) else grid
    shades = sns.color_palette(SEQUENTIAL, as_cmap=True)
    finite = grid.to_numpy()[np.isfinite(grid.to_numpy())]
    bottom = low if low is not None else float(finite.min()) if finite.size else 0.0
    top = high if high is not None else float(finite.max()) if finite.size else 1.0
    norm = colors.Normalize(bottom, top if top > bottom else bottom + 1.0)
    sns.heatmap(grid, cmap=shades, norm=norm, cbar=False, ax=ax, linewidths=0)
    ax.invert_yaxis()
    ax.grid(False)
    ax.set_xlabel("draft length K (tokens)")
    ax.set_ylabel("exit layer E")
    height = _points_of(ax)[1] / len(grid)
    step = max(1, math.ceil(1.1 * _label_points() / height))  # names of rows that do not touch
    ticks = [place for place, row in enumerate(grid.index) if row < 0 or (row - max(grid.index[0], 1)) % step == 0]
    ax.set_yticks([place + 0.5 for place in ticks])
    ax.set_yticklabels(["drafter" if grid.index[place] < 0 else str(grid.index[place]) for place in ticks], rotation=0)
    if grid.index[0] < 0:
        ax.axhline(1, color="white", linewidth=2)
    ax.tick_params(length=0, axis="both")
    ax.set_xticks(np.arange(len(grid.columns)) + 0.5)
    ax.set_xticklabels([str(length) for length in grid.columns], rotation=0)
    if numbers:
        write_numbers([ax], NUMBERS[value])
    return ScalarMappable(norm, shades), grid


NUMBERS = {"acceptance_rate": "{:.2f}", "tokens_per_round": "{:.1f}", "speedup": "{:.2f}"}
"""How the figures of a heat map are written into its cells."""


def write_numbers(axes: Sequence[Axes], number: str) -> None:
    """A number in each cell of these heat maps, all of one size, where every cell has room for one.

    Call it when the Axes have their place: the size follows from the cells'. number: a format, one of NUMBERS.
    """
    meshes = [next(part for part in ax.collections if isinstance(part, QuadMesh)) for ax in axes]
    values = [_values_of(mesh) for mesh in meshes]
    texts = {number.format(value) for each in values for value in each.ravel() if np.isfinite(value)}
    places = [(_points_of(ax), each.shape) for ax, each in zip(axes, values, strict=True)]
    width = min(across / shape[1] for (across, _), shape in places)
    height = min(up / shape[0] for (_, up), shape in places)
    longest = max((_points(text, 10.0) / 10.0 for text in texts), default=1.0)  # em
    size = min(6.5, 0.82 * width / longest, height - 1.5)
    if size < 5:  # too small to read in print
        return
    for ax, mesh, each in zip(axes, meshes, values, strict=True):
        for (row, column), value in np.ndenumerate(each):
            if np.isfinite(value):
                ax.text(
                    column + 0.5, row + 0.5, number.format(value), ha="center", va="center_baseline", fontsize=size,
                    color=_ink_on(mesh.to_rgba(value)), in_layout=False,
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


# ------------------------------------------------------------------------------------------------ evidence
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
        _nothing(ax, f"no {label} was measured")
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
    _untitled(ax)
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
        _nothing(ax, "no run was counted")
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


# ------------------------------------------------------------------------------------------------ several panels
def one_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Where all panels have the same legend: one above them, where it covers nothing."""
    legends = [legend for ax in axes if (legend := ax.get_legend()) is not None]
    named = [[text.get_text() for text in legend.get_texts()] for legend in legends]
    if len(legends) < 2 or any(names != named[0] for names in named):
        return
    handles, labels = next(ax for ax in axes if ax.get_legend() is not None).get_legend_handles_labels()
    for legend in legends:
        legend.remove()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels) if len(labels) < 6 else 4, columnspacing=1.6
    )


def _nothing(ax: Axes, why: str) -> None:
    """Say what is not there, in the place where it would be."""
    ax.text(0.5, 0.5, plain(why), transform=ax.transAxes, ha="center", va="center", color=FAINT, wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])
