"""Arrangements that several figures share: a panel for each model or lens, one legend, one colour bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from figures.artefacts import Study
from figures.style import ONE_COLUMN, PAGE, TWO_COLUMNS, canvas
from probekit.presentation import plots

ACROSS = 3
"""Panels beside one another in two columns of text."""

Grid = Callable[[Axes, pd.DataFrame, str], ScalarMappable]


def by_lens(layers: pd.DataFrame, curve: Callable[[Axes, pd.DataFrame], None]) -> Figure:
    """One panel for each lens, the models in it."""
    lenses = sorted(set(layers["lens"]))  # final-norm before raw
    figure = canvas(TWO_COLUMNS if len(lenses) > 1 else ONE_COLUMN, 2.4)
    axes = figure.subplots(1, len(lenses), squeeze=False, sharey=True)[0]
    for ax, lens, letter in zip(axes, lenses, "ab", strict=False):
        curve(ax, layers[layers["lens"] == lens])
        ax.set_title(f"({letter}) {lens} lens")
    for ax in axes[1:]:
        ax.set_ylabel("")
    one_legend(figure, axes)
    return figure


def of_models(study: Study, height: float, share_y: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """One panel, `height` inches high, for each model, with its label; labels of the y axis only at the left."""
    many = len(study.models)
    across, down = min(many, ACROSS), math.ceil(many / ACROSS)
    figure = canvas(ONE_COLUMN if many == 1 else TWO_COLUMNS, min(PAGE, height * down))
    axes = figure.subplots(down, across, squeeze=False, sharey=share_y)
    for ax in axes.flat[many:]:
        ax.set_visible(False)
    for ax, model, letter in zip(axes.flat, study.models, _letters(), strict=False):
        ax.set_title(f"({letter}) {plots.plain(study.label(model))}" if many > 1 else plots.plain(study.label(model)))
    return figure, list(axes.flat[:many])


def grids(
    study: Study, cells: pd.DataFrame, rows: Sequence[tuple[str, Grid]], below: Mapping[str, str] | None = None
) -> Figure:
    """For each row a colour bar with its label, for each model a heat map over exit layer and draft length.

    below: a second line for the title of each model.
    """
    many = len(study.models)
    across, down = min(many, ACROSS), math.ceil(many / ACROSS)
    tallest = int(cells.groupby("model")["exit_layer"].nunique().max())
    height = min(3.6, max(1.5, 0.65 + 0.115 * tallest))
    figure = canvas(ONE_COLUMN if many == 1 else TWO_COLUMNS, min(PAGE, height * down * len(rows) + 0.1))
    axes = figure.subplots(down * len(rows), across, squeeze=False)
    letters = iter(_letters())
    for place, (label, grid) in enumerate(rows):
        block = axes[place * down : (place + 1) * down]
        for ax in block.flat[many:]:
            ax.set_visible(False)
        for index, (ax, model) in enumerate(zip(block.flat, study.models, strict=False)):
            colours = grid(ax, cells[cells["model"] == study.label(model)], model)
            title = f"({next(letters)}) {plots.plain(study.label(model))}"
            ax.set_title(f"{title}\n{plots.plain(below[model])}" if below else title, fontsize=7.5 if below else None)
            if index % across:
                ax.set_ylabel("")
            if place < len(rows) - 1 or index < many - across:
                ax.set_xlabel("")
        figure.colorbar(colours, ax=block.ravel().tolist(), label=label, aspect=14 * down, pad=0.02)
    return figure


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


def _letters() -> Sequence[str]:
    return [chr(ord("a") + place % 26) for place in np.arange(64)]
