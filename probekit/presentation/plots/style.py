"""The look of every picture, and what all plots share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib import colors, font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.textpath import text_to_path

from probekit.presentation.plots.glyphs import families, plain, with_their_fonts

SEQUENTIAL = "mako_r"
DIVERGING = "RdBu"
PALETTE = "colorblind"
INK = "#1a1a1a"
FAINT = "#767676"
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same letters on every machine
    "font.size": 8.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=sns.color_palette(PALETTE).as_hex()),
    "xtick.color": INK,
    "ytick.color": INK,
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
"""The look of the project's own pictures, for `matplotlib.rc_context`; plots take any other look as well."""


def palette(names: Sequence[Any]) -> dict[Any, Any]:
    """A colour of the current cycle for each name."""
    return dict(zip(names, sns.color_palette(n_colors=len(names)), strict=True))


def diverging(low: float, high: float, cmap: str | colors.Colormap | None = None) -> tuple[Any, colors.Colormap]:
    """Colours for a ratio: neutral at 1, red below, blue above, as strong as the distance from 1 on either side.

    low, high: where the colours end, moved to include 1. Returns what norms the values, and the colours.
    """
    low, high = min(low, 1.0), max(high, 1.0)
    reach = max(1.0 - low, high - 1.0) or 1.0
    low, high = (low, high) if high > low else (0.0, 2.0)
    shades = colormap(cmap or DIVERGING)
    places = 0.5 + 0.44 * (np.linspace(low, high, 256) - 1.0) / reach  # without the ends, too dark for letters
    return colors.Normalize(low, high), colors.ListedColormap(shades(places))


def colormap(cmap: str | colors.Colormap) -> colors.Colormap:
    return sns.color_palette(cmap, as_cmap=True) if isinstance(cmap, str) else cmap


def faint(ax: Axes) -> tuple[float, ...]:
    """The colour of what should not stand out: between the text's and the ground's."""
    ink, ground = (np.array(colors.to_rgb(colour)) for colour in (matplotlib.rcParams["text.color"], ground_of(ax)))
    return tuple(0.6 * ink + 0.4 * ground)


def ground_of(ax: Axes) -> Any:
    """The colour that the Axes are drawn on; where they and their figure are transparent, what text contrasts with."""
    for colour in (ax.get_facecolor(), ax.get_figure(root=True).get_facecolor()):  # type: ignore[union-attr]
        if colors.to_rgba(colour)[3] > 0.5:
            return colour
    return "white" if ink_on(matplotlib.rcParams["text.color"]) == "white" else "black"


def ink_on(ground: Any) -> str:
    """Dark letters or white ones, whichever can be read on this colour."""
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colors.to_rgb(ground)
    )
    # Relative luminance, and the point of equal contrast (WCAG 2).
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.19 else "white"


def untitled(ax: Axes) -> None:
    """The names in a legend speak for themselves."""
    legend = ax.get_legend()
    if legend is not None:
        legend.set_title("")


def one_legend(figure: Figure, axes: Sequence[Axes], *, least: int = 2, columns: int | None = None) -> None:
    """Where all panels have the same legend, `least` of them at the least: one above them, where it covers nothing.

    columns: of the legend; by default all names beside each other, or four of many.
    """
    legends = [legend for ax in axes if (legend := ax.get_legend()) is not None]
    named = [[text.get_text() for text in legend.get_texts()] for legend in legends]
    if len(legends) < max(1, least) or any(names != named[0] for names in named):
        return
    handles, labels = next(ax for ax in axes if ax.get_legend() is not None).get_legend_handles_labels()
    for legend in legends:
        legend.remove()
    shared = figure.legend(
        handles, labels, loc="outside upper left", columnspacing=1.6,
        ncols=columns or (len(labels) if len(labels) < 6 else 4),
    )  # fmt: skip
    with_their_fonts(shared)


def nothing_to_show(ax: Axes, why: str) -> None:
    """Say what is not there, in the place where it would be."""
    ax.text(0.5, 0.5, plain(why), transform=ax.transAxes, ha="center", va="center", color=faint(ax), wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


def label_points() -> float:
    """Size of the names of ticks; it may be set as a number or as a word."""
    return font_manager.FontProperties(size=matplotlib.rcParams["ytick.labelsize"]).get_size_in_points()


def points_of(ax: Axes) -> tuple[float, float]:
    """Width and height in points, once the layout is done."""
    figure: Any = ax.figure.get_figure(root=True)
    with_their_fonts(figure)
    figure.draw_without_rendering()
    extent = ax.get_window_extent()
    return extent.width / figure.dpi * 72, extent.height / figure.dpi * 72


def points(text: str, font_size: float) -> float:
    """Width of `text` at this size."""
    properties = font_manager.FontProperties(family=families(text), size=font_size)
    return text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]
