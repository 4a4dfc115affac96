"""Figures of rounds: acceptance, speedup, predicted against measured, run lengths, what a trace saves."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probekit.errors import InputError
from probekit.presentation import plots
from probekit.presentation.figure_files import canvas
from probekit.presentation.paper.look import Page
from probekit.presentation.paper.panels import grids, of_models
from probekit.presentation.study_folder import StudyFolder
from probekit.presentation.tables import sweep_table

_VERDICT = 2.1  # inches for a pair, its speedup and its interval in one line


def acceptance(study: StudyFolder, page: Page) -> Figure:
    """Acceptance rate and tokens per round, predicted from one trace, over exit layer and draft length."""
    cells = study.table("cells")
    most = float(cells["tokens_per_round"].max())

    def share(own: pd.DataFrame, model: str, ax: Axes) -> Axes:
        return plots.acceptance_grid(own, ax=ax, numbers=False)

    def tokens(own: pd.DataFrame, model: str, ax: Axes) -> Axes:
        return plots.tokens_per_round_grid(own, ax=ax, high=most, numbers=False)

    rows = (("acceptance_rate", "acceptance rate", share), ("tokens_per_round", "tokens per round", tokens))
    return grids(study, page, cells, rows)


def speedup(study: StudyFolder, page: Page) -> Figure:
    """Predicted speedup over exit layer and draft length, with the chosen pair; a line parts gain from loss."""
    cells = study.table("cells")
    low, high = float(cells["speedup"].min()), float(cells["speedup"].max())

    def surface(own: pd.DataFrame, model: str, ax: Axes) -> Axes:
        return plots.speedup_surface(own, study.chosen(model), ax=ax, low=low, high=high, numbers=False)

    rows = [("speedup", "predicted speedup (×)", surface)]
    between = " " if page.text / page.arranged(len(study.models))[0] > _VERDICT else "\n"
    return grids(study, page, cells, rows, {model: _verdict(study, model, between) for model in study.models})


def predicted_and_measured(study: StudyFolder, page: Page) -> Figure:
    """The prediction against the running decoder: rounds, acceptance rate and speedup of every cell that was run."""
    validation = study.table("validation")
    across, down = page.arranged(len(plots.COMPARED))
    figure = canvas(page.text, down * min(2.5, 1.09 * page.text / across), layout="compressed")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    axes = list(panels[: len(plots.COMPARED)])
    for ax in panels[len(plots.COMPARED) :]:
        ax.set_visible(False)
    for ax, quantity, letter in zip(axes, plots.COMPARED, "abc", strict=True):
        plots.predicted_against_measured(validation, quantity, ax=ax)
        ax.set_title(f"({letter}) {plots.COMPARED[quantity][2].split(' (')[0]}")
    plots.one_legend(figure, axes)
    return figure


def run_lengths(study: StudyFolder, page: Page, *, exits: int = 3) -> Figure:
    """How long agreement lasts, against the geometric law that independent agreements would follow.

    exits: so many exit layers of each model, spread evenly.
    """
    figure, axes = of_models(study, page, height=2.2, share_y=True)
    for ax, model in zip(axes, study.models, strict=True):
        runs = study.of("run_lengths", model)
        wanted = _spread(sorted(set(runs["exit_layer"])), exits)
        plots.run_lengths_against_geometric(runs[runs["exit_layer"].isin(wanted)], ax=ax)
        if ax is not axes[0]:
            ax.set_ylabel("")
    plots.one_legend(figure, axes)
    return figure


def trace_and_sweep(study: StudyFolder, page: Page) -> Figure:
    """What it costs to know the cells: running them one after the other, or one trace. Dashed: extrapolated."""
    figure, axes = of_models(study, page, height=2.2, share_y=True)
    for ax, model in zip(axes, study.models, strict=True):
        plots.trace_against_sweep(sweep_of(study, model), ax=ax)
        if ax is not axes[0]:
            ax.set_ylabel("")
    plots.one_legend(figure, axes)
    return figure


def sweep_of(study: StudyFolder, model: str) -> pd.DataFrame:
    """Seconds to know the cells of a model by running them, and by a trace. Raises InputError without timings."""
    timings = study.entry(model)["timings"]
    lacking = [name for name in ("tokens", "generation_s", "agreement_trace_s") if name not in timings]
    if lacking:
        raise InputError(f"the study in {study.folder} has no timing {', '.join(lacking)} of {model!r}.")
    costs = study.of("costs", model)
    step = float(costs.loc[costs["step"] == "autoregressive", "seconds"].iloc[0])
    trace_s = timings["generation_s"] + timings["agreement_trace_s"]
    return sweep_table(study.of("cells", model), study.of("validation", model), step, int(timings["tokens"]), trace_s)


def _verdict(study: StudyFolder, model: str, between: str) -> str:
    """The chosen pair and its speedup, and, after a space or on its own line, its interval."""
    choice, pair = study.entry(model)["choice"], study.chosen(model)
    if pair is None:
        return "do not speculate"
    low, high = choice["interval"] or (None, None)
    spread = "" if low is None else f"{between}[{low:.2f}, {high:.2f}]"
    drafter = "drafter" if pair[0] is None else f"E {pair[0]}"
    return f"{drafter}, K {pair[1]}: {choice['speedup']:.2f}×{spread}"


def _spread(exits: list[int], count: int) -> list[int]:
    """So many of the exits, at even distances: a quarter, a half and three quarters of the way for three."""
    last = len(exits) - 1
    return list(dict.fromkeys(exits[round(last * place / (count + 1))] for place in range(1, count + 1)))
