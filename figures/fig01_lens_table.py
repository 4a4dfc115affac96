"""What every layer would say: the lens table of one text, for each model of the study."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from figures.making import alone
from figures.style import PAGE, TWO_COLUMNS
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder
from probekit.presentation.tables import lens_table

PROMPT = 0
POSITIONS = 13
ROW = 0.125  # inches
TITLE = 0.32
AROUND = TITLE + 0.6  # tokens and the axis's name below


def draw(study: StudyFolder) -> Figure:
    tables = [lens_table(study.trace(model), PROMPT).window(POSITIONS) for model in study.models]
    room = PAGE / len(tables) - AROUND
    every = [max(1, math.ceil(table.frame["layer"].nunique() * ROW / max(room, 1.0))) for table in tables]
    rows = [math.ceil(table.frame["layer"].max() / step) + 1 for table, step in zip(tables, every, strict=True)]
    heights = [count * ROW + AROUND for count in rows]

    # Placed by hand: the cells' width must be known before tokens are written into them.
    whole = sum(heights)
    figure = Figure(figsize=(TWO_COLUMNS, whole))
    left, right = 0.95 / TWO_COLUMNS, 1 - 0.65 / TWO_COLUMNS
    top = whole
    for model, table, count, height, step in zip(study.models, tables, rows, heights, every, strict=True):
        place = (left, (top - TITLE - count * ROW) / whole, right - left, count * ROW / whole)
        ax = figure.add_axes(place)
        colours = plots.lens_table(ax, table.frame, every=step)
        shown = f", every {_ordinal(step)} layer" if step > 1 else ""
        ax.set_title(f"{plots.plain(study.label(model))}, {table.lens} lens{shown}", pad=11)
        top -= height
    long = min(1.8, whole - TITLE - 0.1)
    bar = figure.add_axes((right + 0.1 / TWO_COLUMNS, 1 - (TITLE + long) / whole, 0.1 / TWO_COLUMNS, long / whole))
    figure.colorbar(colours, cax=bar, label=plots.STATISTICS["probability"].label)
    return figure


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


if __name__ == "__main__":
    alone(__file__)
