"""Predicted speedup over exit layer and draft length, with the chosen pair; a line parts gain from loss."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from figures.making import alone
from figures.panels import grids
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder) -> Figure:
    cells = study.table("cells")
    low, high = float(cells["speedup"].min()), float(cells["speedup"].max())

    def surface(ax: Axes, own: pd.DataFrame, model: str) -> ScalarMappable:
        return plots.speedup_surface(ax, own, study.chosen(model), low=low, high=high, numbers=False)

    rows = [("speedup", "predicted speedup (×)", surface)]
    return grids(study, cells, rows, {model: _verdict(study, model) for model in study.models})


def _verdict(study: StudyFolder, model: str) -> str:
    """The chosen pair and its speedup, with its interval."""
    choice, pair = study.entry(model)["choice"], study.chosen(model)
    if pair is None:
        return "do not speculate"
    low, high = choice["interval"] or (None, None)
    spread = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    drafter = "drafter" if pair[0] is None else f"E {pair[0]}"
    return f"{drafter}, K {pair[1]}: {choice['speedup']:.2f}×{spread}"


if __name__ == "__main__":
    alone(__file__)
