"""Figures of the inside: what the residual stream knows, and who wrote what the model says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probekit.presentation import plots
from probekit.presentation.figure_files import canvas
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.panels import letters
from probekit.presentation.study_folder import StudyFolder
from probekit.presentation.tables import lens_table

POSITIONS = 13  # of a text, as in the lens table
_NARROW = 5.0  # inches in which two maps, or five names of a legend, do not stand beside each other
_LABELS = ("accepted", "answer")


def probes(study: StudyFolder, page: Page) -> Figure:
    """What the residual stream knows: above whether a draft is accepted, below the model's token, a column a model."""
    many = len(study.models)
    across, down = page.arranged(many)
    figure = canvas(page.column if many == 1 else page.text, min(page.height, 2 * (2.05 * down + 0.2)))
    letter = iter(letters())
    parts: Any = figure.subfigures(2, 1)
    for part, label in zip(parts, _LABELS, strict=True):
        axes = part.subplots(down, across, squeeze=False, sharey=True)
        for ax in axes.flat[many:]:
            ax.set_visible(False)
        drawn = list(axes.flat[:many])
        for place, (ax, model) in enumerate(zip(drawn, study.models, strict=True)):
            plots.probes_by_layer(study.of("probes", model), label, ax=ax)
            ax.set_title(f"({next(letter)}) {plots.plain(study.label(model))}")
            if place % across:
                ax.set_ylabel("")
            if place < many - across:
                ax.set_xlabel("")
        plots.one_legend(part, drawn, least=1, columns=None if figure.get_figwidth() >= _NARROW else 2)
    return figure


def attribution(study: StudyFolder, page: Page) -> Figure:
    """Who wrote the logit of the model's token, attention before MLPs; a row a model, two on a narrow page."""
    written = [shares_of(study, model) for model in study.models]
    depths = [
        0 if shares.empty else min(study.trace(model).depth, 24)
        for model, shares in zip(study.models, written, strict=True)
    ]
    heights = [0.95 + 0.115 * depth for depth in depths]
    last = max((place for place, depth in enumerate(depths) if depth), default=0)
    down = 1 if page.text >= _NARROW else 2  # rows of a model
    ratios = [height for height in heights for _ in range(down)]
    figure = canvas(page.text, min(page.height, sum(ratios)))
    axes = figure.subplots(len(ratios), 2 // down, squeeze=False, height_ratios=ratios).reshape(-1, 2)
    letter = iter(letters())
    for place, (row, model, shares) in enumerate(zip(axes, study.models, written, strict=True)):
        high = reach_of(shares)
        for ax, kind in zip(row, ("attention", "mlp"), strict=True):
            plots.attribution_map(shares, kind, ax=ax, high=high)
            name = "MLPs" if kind == "mlp" else "attention"
            ax.set_title(f"({next(letter)}) {plots.plain(study.label(model))}: {name}")
            if place != last or (down > 1 and ax is row[0]):
                ax.set_xlabel("")
        row[0].set_ylabel("layer")  # the title says of what
        row[1].set_ylabel("" if down == 1 else "layer")
        plots.one_bar(
            figure, list(row), "contribution (logits)", pad=0.01, aspect=8 * down * heights[place], extend="both"
        )
    return figure


def shares_of(study: StudyFolder, model: str) -> pd.DataFrame:
    """Position, input, generated, term and logit, along what the lens table shows of the first text; or no row."""
    columns = ["position", "input", "generated", "term", "logit"]
    run = study.trace(model)
    written = study.attributions(model).get(run.prompts[0])
    if written is None:
        return pd.DataFrame(columns=columns)
    table = lens_table(run, run.prompts[0]).window(POSITIONS)
    heads = table.frame.drop_duplicates("position")
    rows = [
        (position, text, generated, term, float(value))
        for position, text, generated in heads[columns[:3]].itertuples(index=False)
        if position < len(written.values)
        for term, value in zip(written.terms, written.values[position].tolist(), strict=True)
    ]
    return pd.DataFrame(rows, columns=columns)


def reach_of(shares: pd.DataFrame) -> float | None:
    """Where the colours end: beyond it lies one cell of fifty, so that a few large ones do not bleach the rest."""
    parts = shares[shares["term"].astype(str).str.contains(":")]
    if parts.empty:
        return None
    reach = float(np.quantile(parts["logit"].abs().to_numpy(dtype=float), 0.98))
    return float(f"{reach:.2g}") if math.isfinite(reach) and reach > 0 else None
