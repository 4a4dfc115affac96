"""Acceptance rate and tokens per round, predicted from one trace, over exit layer and draft length."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures.making import alone
from figures.panels import grids
from probekit.presentation import plots
from probekit.presentation.study_folder import StudyFolder


def draw(study: StudyFolder) -> Figure:
    cells = study.table("cells")
    most = float(cells["tokens_per_round"].max())
    rows = (
        ("acceptance_rate", "acceptance rate", lambda ax, own, _: plots.acceptance_grid(ax, own, numbers=False)),
        (
            "tokens_per_round",
            "tokens per round",
            lambda ax, own, _: plots.tokens_per_round_grid(ax, own, high=most, numbers=False),
        ),
    )
    return grids(study, cells, rows)


if __name__ == "__main__":
    alone(__file__)
