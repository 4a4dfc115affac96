"""Figures of what layers say: the lens table, agreement, echo, entropy and divergence."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from probekit.presentation import plots
from probekit.presentation.figure_files import canvas
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.panels import by_lens
from probekit.presentation.study_folder import StudyFolder
from probekit.presentation.tables import lens_table

_ROW = 0.125  # inches
_TITLE = 0.32
_AROUND = _TITLE + 0.6  # tokens and the axis's name below


def lens_tables(study: StudyFolder, page: Page, *, prompt: int = 0, positions: int = 13) -> Figure:
    """What every layer would say: the lens table of one text, for each model of the study."""
    tables = [lens_table(study.trace(model), prompt).window(positions) for model in study.models]
    room = page.height / len(tables) - _AROUND
    every = [max(1, math.ceil(table.frame["layer"].nunique() * _ROW / max(room, 1.0))) for table in tables]
    rows = [math.ceil(table.frame["layer"].max() / step) + 1 for table, step in zip(tables, every, strict=True)]
    heights = [count * _ROW + _AROUND for count in rows]

    # Placed by hand: the cells' width must be known before tokens are written into them.
    whole = sum(heights)
    figure = canvas(page.text, whole, layout="none")
    left, right = 0.95 / page.text, 1 - 0.65 / page.text
    top = whole
    for model, table, count, height, step in zip(study.models, tables, rows, heights, every, strict=True):
        place = (left, (top - _TITLE - count * _ROW) / whole, right - left, count * _ROW / whole)
        ax = plots.lens_table(table.frame, ax=figure.add_axes(place), every=step)
        shown = f", every {_ordinal(step)} layer" if step > 1 else ""
        ax.set_title(f"{plots.plain(study.label(model))}, {table.lens} lens{shown}", pad=11)
        top -= height
    long = min(1.8, whole - _TITLE - 0.1)
    bar = figure.add_axes((right + 0.1 / page.text, 1 - (_TITLE + long) / whole, 0.1 / page.text, long / whole))
    figure.colorbar(plots.colours_of(ax), cax=bar, label=plots.plain(plots.STATISTICS["probability"].label))
    return figure


def agreement(study: StudyFolder, page: Page) -> Figure:
    """Agreement with the model by layer, for the final-norm and the raw lens, with 95 % bands over prompts."""
    return by_lens(study.table("layers"), plots.agreement_by_layer, page)


def echo(study: StudyFolder, page: Page) -> Figure:
    """How often a layer says the token that was just read, for both lenses, with 95 % bands over prompts."""
    return by_lens(study.table("layers"), plots.echo_by_layer, page)


def entropy_and_kl(study: StudyFolder, page: Page) -> Figure:
    """Entropy of the final-norm lens, and its divergence from the model, by layer, with 95 % bands over prompts."""
    figure = canvas(page.text, 2.4)
    axes = figure.subplots(1, 2)
    entropy, divergence = plots.entropy_and_kl(study.table("layers").query("lens == 'final-norm'"), axes=axes)
    entropy.set_title("(a) entropy")
    divergence.set_title("(b) divergence from the model")
    plots.one_legend(figure, axes)
    return figure


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
