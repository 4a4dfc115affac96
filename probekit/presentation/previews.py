"""The pictures that a study draws of itself, so that there is something to look at when it ends.

A paper's figures, with its widths and its type, are drawn by `probekit figures STUDY`, with the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probekit.presentation import plots
from probekit.presentation.figure_files import save
from probekit.presentation.tables import lens_table
from probekit.traces.trace import Trace

KINDS = ("pdf", "svg", "png")
ACROSS = 3  # panels beside one another
POSITIONS = 12  # of a lens table

Chosen = tuple[int | None, int] | None
"""(exit layer or None for a draft model, draft length), or None: do not speculate."""


def draw_previews(
    folder: Path, tables: Mapping[str, pd.DataFrame], traces: Mapping[str, Trace], chosen: Mapping[str, Chosen]
) -> None:
    """Write each preview into `folder` as PDF, SVG and PNG.

    tables: `layers`, `cells`, `validation`, and where there are any `probes`. traces, chosen: by the models' names, in
    the study's order.
    """
    models = list(traces)
    with matplotlib.rc_context(plots.STYLE | {"savefig.dpi": 160}):
        probes = [("probes", _probes(models, tables["probes"]))] if "probes" in tables else []
        for name, figure in (
            ("lens_table", _lens_tables(traces)),
            ("agreement", _agreement(tables["layers"])),
            ("acceptance", _grids(models, tables["cells"], "acceptance_rate", "acceptance rate", chosen)),
            ("speedup", _grids(models, tables["cells"], "speedup", "predicted speedup (×)", chosen)),
            ("predicted_against_measured", _measured(tables["validation"])),
            *probes,
        ):
            save(figure, folder, name, KINDS)


def _lens_tables(traces: Mapping[str, Trace]) -> Figure:
    """What each layer of each model would say about the first text; every n-th layer of a deep model."""
    steps = [math.ceil((trace.depth + 1) / 18) for trace in traces.values()]
    heights = [0.9 + 0.15 * (trace.depth // step + 1) for trace, step in zip(traces.values(), steps, strict=True)]
    figure = Figure(figsize=(8.0, sum(heights)), layout="constrained")
    axes = figure.subplots(len(traces), 2, squeeze=False, height_ratios=heights, width_ratios=(60, 1))
    for ax, beside, (name, trace), step in zip(*axes.T, traces.items(), steps, strict=True):
        table = lens_table(trace, trace.prompts[0]).window(POSITIONS)
        ax.set_title(f"{plots.plain(name)}, {table.lens} lens", pad=11)
        plots.lens_table(table.frame, ax=ax, every=step)
        figure.colorbar(plots.colours_of(ax), cax=beside, label=plots.STATISTICS["probability"].label)
    return figure


def _agreement(layers: pd.DataFrame) -> Figure:
    lenses = sorted(set(layers["lens"]))
    figure = Figure(figsize=(0.6 + 4.2 * len(lenses), 3.4), layout="constrained")
    axes = figure.subplots(1, len(lenses), squeeze=False, sharey=True)[0]
    for ax, lens in zip(axes, lenses, strict=True):
        plots.agreement_by_layer(layers[layers["lens"] == lens], ax=ax)
        ax.set_title(f"{lens} lens")
        if ax is not axes[0]:
            ax.set_ylabel("")
    plots.one_legend(figure, axes)
    return figure


def _grids(models: Sequence[str], cells: pd.DataFrame, column: str, label: str, chosen: Mapping[str, Chosen]) -> Figure:
    """A heat map over exit layer and draft length for each model, on one scale."""
    across = min(len(models), ACROSS)
    figure, panels = _panels(models, across, 3.6, 3.3)
    low, high = float(cells["speedup"].min()), float(cells["speedup"].max())
    for place, (ax, model) in enumerate(panels):
        own = cells[cells["model"] == model]
        if column == "speedup":
            plots.speedup_surface(own, chosen[model], ax=ax, low=low, high=high, numbers=False)
            ax.set_title(f"{plots.plain(model)}: {_words(chosen[model])}")
        else:
            plots.acceptance_grid(own, ax=ax, numbers=False)
            ax.set_title(plots.plain(model))
        if place % across:
            ax.set_ylabel("")
    axes = [ax for ax, _ in panels]
    plots.one_bar(figure, axes, label, pad=0.02)
    figure.draw_without_rendering()
    plots.write_numbers(axes, plots.NUMBERS[column])
    return figure


def _words(pair: Chosen) -> str:
    if pair is None:
        return "do not speculate"
    return f"{'draft model' if pair[0] is None else f'E {pair[0]}'}, K {pair[1]}"


def _measured(validation: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(9.6, 3.5), layout="compressed")
    axes = figure.subplots(1, len(plots.COMPARED))
    for ax, quantity in zip(axes, plots.COMPARED, strict=True):
        plots.predicted_against_measured(validation, quantity, ax=ax)
    plots.one_legend(figure, axes)
    return figure


def _probes(models: Sequence[str], probes: pd.DataFrame) -> Figure:
    """What the residual stream of each model knows: a row a label, a column a model."""
    figure = Figure(figsize=(0.6 + 3.4 * len(models), 5.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    for part, label in zip(parts, ("accepted", "answer"), strict=True):
        axes = part.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for ax, model in zip(axes, models, strict=True):
            plots.probes_by_layer(probes[probes["model"] == model], label, ax=ax)
            ax.set_title(plots.plain(model))
            if ax is not axes[0]:
                ax.set_ylabel("")
        plots.one_legend(part, axes, least=1, columns=None if len(models) > 1 else 2)
    return figure


def _panels(models: Sequence[str], across: int, width: float, height: float) -> tuple[Figure, list[tuple[Axes, str]]]:
    """A panel of this size in inches for each model, and some room at the right."""
    down = math.ceil(len(models) / across)
    figure = Figure(figsize=(0.9 + width * across, height * down), layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat[len(models) :]:
        ax.set_visible(False)
    return figure, list(zip(axes.flat, models, strict=False))
