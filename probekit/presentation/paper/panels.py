"""Arrangements that several figures share: a panel for each model or lens, one legend or colour bar for them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probekit.presentation import plots
from probekit.presentation.figure_files import canvas
from probekit.presentation.paper.look import Page
from probekit.presentation.study_folder import StudyFolder

Curve = Callable[..., Axes]
"""Draws a table on `ax`."""
Grid = Callable[[pd.DataFrame, str, Axes], Axes]
"""Draws the cells of a model, by its name, without numbers."""


def by_lens(layers: pd.DataFrame, curve: Curve, page: Page) -> Figure:
    """One panel for each lens, the models in it."""
    lenses = sorted(set(layers["lens"]))  # final-norm before raw
    figure = canvas(page.text if len(lenses) > 1 else page.column, 2.4)
    axes = figure.subplots(1, len(lenses), squeeze=False, sharey=True)[0]
    for ax, lens, letter in zip(axes, lenses, "ab", strict=False):
        curve(layers[layers["lens"] == lens], ax=ax)
        ax.set_title(f"({letter}) {lens} lens")
    for ax in axes[1:]:
        ax.set_ylabel("")
    plots.one_legend(figure, axes)
    return figure


def of_models(study: StudyFolder, page: Page, height: float, share_y: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """One panel, `height` inches high, for each model, with its label; labels of the y axis only at the left."""
    many = len(study.models)
    across, down = page.arranged(many)
    figure = canvas(page.column if many == 1 else page.text, min(page.height, height * down))
    axes = figure.subplots(down, across, squeeze=False, sharey=share_y)
    for ax in axes.flat[many:]:
        ax.set_visible(False)
    for ax, model, letter in zip(axes.flat, study.models, letters(), strict=False):
        ax.set_title(f"({letter}) {plots.plain(study.label(model))}" if many > 1 else plots.plain(study.label(model)))
    return figure, list(axes.flat[:many])


def grids(
    study: StudyFolder,
    page: Page,
    cells: pd.DataFrame,
    rows: Sequence[tuple[str, str, Grid]],
    below: Mapping[str, str] | None = None,
) -> Figure:
    """For each row a colour bar with its label, for each model a heat map over exit layer and draft length.

    rows: (column of the cells, label, how it is drawn). below: further lines for the title of each model.
    """
    many = len(study.models)
    across, down = page.arranged(many)
    tallest = int(cells.groupby("model")["exit_layer"].nunique().max())
    height = min(3.6, max(1.5, 0.65 + 0.115 * tallest))
    figure = canvas(page.column if many == 1 else page.text, min(page.height, height * down * len(rows) + 0.1))
    axes = figure.subplots(down * len(rows), across, squeeze=False)
    letter_of = iter(letters())
    blocks = []
    for place, (_, label, grid) in enumerate(rows):
        block = axes[place * down : (place + 1) * down]
        for ax in block.flat[many:]:
            ax.set_visible(False)
        for index, (ax, model) in enumerate(zip(block.flat, study.models, strict=False)):
            grid(cells[cells["model"] == study.label(model)], model, ax)
            label_of = plots.plain(study.label(model))
            title = f"({next(letter_of)}) {label_of}" if many * len(rows) > 1 else label_of
            lines = [title, *map(plots.plain, below[model].splitlines() if below else ())]
            ax.set_title("\n".join(lines), fontsize=7.5 if below else None)
            if index % across:
                ax.set_ylabel("")
            if place < len(rows) - 1 or index < many - across:
                ax.set_xlabel("")
        plots.one_bar(figure, block.ravel().tolist(), label, aspect=14 * down, pad=0.02)
        blocks.append(block.ravel()[:many].tolist())
    figure.draw_without_rendering()  # numbers are as large as the cells that the layout leaves
    for (column, _, _), drawn in zip(rows, blocks, strict=True):
        plots.write_numbers(drawn, plots.NUMBERS[column])
    return figure


def letters() -> Sequence[str]:
    """Of panels, in their order."""
    return [chr(ord("a") + place % 26) for place in np.arange(64)]
