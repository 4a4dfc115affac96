"""Does the decoder do what the trace predicts, and how far off is the closed form that papers quote?

    python analyses/05_predicted_against_measured.py [MODEL ...] -o build/analyses

Rounds, drafted and accepted tokens of the running decoder against the prediction, cell by cell; with `--costs measured`
the speedup as well, which is then predicted from steps that are timed on this machine. Beside them the closed
form (1 - a^(K+1)) / (1 - a), which assumes independent acceptances, and how far from independent they are: run lengths
against the geometric law, and the correlation of agreement with itself some tokens later.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import seaborn as sns
import typer
import workbench
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.choice.robustness import autocorrelation, closed_form_error
from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.costs.roofline import roofline_costs
from probekit.models.loaded import Loaded
from probekit.prediction.run_lengths import run_lengths
from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import PALETTE
from probekit.traces.trace import Trace
from probekit.validation.results import Validation
from probekit.validation.run import validate

NAME = "05_predicted_against_measured"
DRAFT_LENGTHS = (2, 4, 8)
DEPTHS = (0.25, 0.5, 0.75)  # exits that are run, as shares of the depth
LAGS = (1, 2, 4, 8)
REPEATS = 3  # runs of each prompt where times are compared
COUNTS = ("rounds", "drafted", "accepted", "tokens")


@analysis
def main(
    work: Bench,
    run: Annotated[int, typer.Option(min=1, help="Prompts that the decoder continues in each cell.")] = 6,
    costs: Annotated[str, typer.Option(help="measured: compare times, too; roofline: counts only")] = "roofline",
) -> None:
    """Does the decoder do what the trace predicts, and how far off is the closed form that papers quote?"""
    workbench.check_costs(costs)
    parts = []
    for loaded in work.loaded():
        trace = work.trace(loaded)
        exits = sorted({min(loaded.depth - 1, max(1, round(share * loaded.depth))) for share in DEPTHS})
        cells = [(exit_layer, length) for exit_layer in exits for length in DRAFT_LENGTHS]
        timed = costs == "measured"
        times = costs_of(loaded, trace) if timed else roofline_costs(trace, device="h200")
        found = validate(loaded, trace, cells, limit=run, costs=times, repeats=REPEATS if timed else 1)
        parts.append(measured_rows(found))
        if timed:
            parts.append(speedup_rows(found))
        for loops, chosen in workbench.with_and_without_loops(trace):
            parts += [form_rows(chosen, exits).assign(loops=loops), dependence_rows(chosen).assign(loops=loops)]
    table = pd.concat(parts, ignore_index=True)
    columns = ["model", "loops", "exit_layer", "draft_length", "lag", "quantity", "value", "low", "high"]
    table = table.reindex(columns=columns).astype({"draft_length": "Int64", "lag": "Int64", "exit_layer": "Int64"})
    work.write(NAME, table, draw(table), run=run, costs=costs)


def costs_of(loaded: Loaded, trace: Trace) -> Costs:
    """Steps timed here, at the context in the middle of the texts."""
    middle = int((trace.texts["prompt_tokens"] + trace.texts["new_tokens"] / 2).median())
    return measure_costs(loaded, middle, draft_lengths=DRAFT_LENGTHS)


def measured_rows(validation: Validation) -> pd.DataFrame:
    """Counts of the prediction and of the decoder; whether every round and token was equal; near-ties."""
    rows = []
    for cell in validation.cells:
        found = {f"predicted {name}": cell.predicted[name] for name in COUNTS}
        found |= {f"measured {name}": cell.measured[name] for name in COUNTS}
        found |= {"rounds equal": cell.rounds_equal, "tokens equal": cell.tokens_equal}
        found |= {"near-ties": cell.ties, "unexplained": cell.unexplained}
        keys = {
            "model": validation.model,
            "loops": "with",
            "exit_layer": cell.exit_layer,
            "draft_length": cell.draft_length,
        }
        rows += [{**keys, "quantity": name, "value": float(value or 0)} for name, value in found.items()]
    whole = {
        "cells run": len(validation.cells),
        "cells with every round as predicted": sum(bool(cell.rounds_equal) for cell in validation.cells),
        "cells with every token as predicted": sum(bool(cell.tokens_equal) for cell in validation.cells),
        "rounds run": sum(cell.measured["rounds"] for cell in validation.cells),
        "differences that are no near-tie": sum(cell.unexplained for cell in validation.cells),
    }
    rows += [
        {"model": validation.model, "loops": "with", "quantity": name, "value": value} for name, value in whole.items()
    ]
    return pd.DataFrame(rows)


def speedup_rows(validation: Validation) -> pd.DataFrame:
    """Speedup over autoregressive decoding; for the measured one the ends are 20 % and 80 % of single runs."""
    rows = []
    for cell in validation.cells:
        keys = {"model": validation.model, "loops": "with", "exit_layer": cell.exit_layer}
        keys |= {"draft_length": cell.draft_length}
        low, high = cell.speedup_measured_quantiles or (float("nan"), float("nan"))
        rows.append({**keys, "quantity": "predicted speedup", "value": cell.speedup_predicted})
        rows.append({**keys, "quantity": "measured speedup", "value": cell.speedup_measured, "low": low, "high": high})
    errors = [abs(cell.speedup_predicted / cell.speedup_measured - 1) for cell in validation.cells
              if cell.speedup_predicted and cell.speedup_measured]  # fmt: skip
    keys = {"model": validation.model, "loops": "with"}
    rows.append({**keys, "quantity": "median error of the predicted speedup", "value": float(np.median(errors))})
    rows.append({**keys, "quantity": "largest error of the predicted speedup", "value": max(errors)})
    return pd.DataFrame(rows)


def form_rows(trace: Trace, exits: list[int]) -> pd.DataFrame:
    wide = closed_form_error(trace, exits, DRAFT_LENGTHS)
    named = {
        "exact": "tokens per round",
        "independent": "tokens per round if independent",
        "closed_form": "closed form",
        "error": "error of the closed form",
        "dependence": "gain from dependence",
    }
    parts = []
    for column, name in named.items():
        ends = {end: wide[f"error_{end}"] if column == "error" else float("nan") for end in ("low", "high")}
        keys = wide[["model", "exit_layer", "draft_length"]]
        parts.append(keys.assign(quantity=name, value=wide[column], **ends))
    return pd.concat(parts)


def dependence_rows(trace: Trace) -> pd.DataFrame:
    """Every exit: variance of run lengths over the geometric law's, and autocorrelation, also within texts."""
    rows = []
    for runs in run_lengths(trace):
        exit_layer = runs.exit_layer
        keys = {"model": trace.manifest.model.name, "exit_layer": exit_layer}
        rows.append({**keys, "quantity": "variance of runs / geometric", **runs.variance_ratio()._asdict()})
        for within in (False, True):
            share = autocorrelation(trace, exit_layer, LAGS, within=within)
            low, high = share.interval()
            name = "autocorrelation within texts" if within else "autocorrelation"
            for place, lag in enumerate(LAGS):
                ends = {"value": share.values[place], "low": low[place], "high": high[place]}
                rows.append({**keys, "quantity": name, "lag": lag, **ends})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Rounds and, where they were timed, speedups; the closed form; runs and neighbours by exit."""
    names = list(dict.fromkeys(table["model"]))
    colours = dict(zip(names, sns.color_palette(PALETTE), strict=False))
    cells = table[table["loops"] == "with"].dropna(subset="draft_length")
    keys = ["model", "exit_layer", "draft_length"]
    wide = cells.pivot(index=keys, columns="quantity", values="value").reset_index()
    pairs = [("predicted rounds", "measured rounds"), ("tokens per round", "closed form")]
    pairs += [("predicted speedup", "measured speedup")] if "measured speedup" in wide else []
    drawn, axes = workbench.figure(len(pairs) + 2, beside=1.2, height=2.3)
    for ax, (across, up) in zip(axes[0], pairs, strict=False):
        for name, group in wide.groupby("model", sort=False):
            ax.plot(group[across], group[up], "o", color=colours[name], markersize=3)
        ends = [wide[[across, up]].min().min(), wide[[across, up]].max().max()]
        ax.plot(ends, ends, "--", color="grey", linewidth=0.8, zorder=0)
        ax.set(xlabel="tokens per round, exact" if up == "closed form" else across, ylabel=up)
    own = table[(table["loops"] == "without") & (table["quantity"] == "autocorrelation within texts")]
    by_exit(
        axes[0][-2], own[own["lag"] == 1], colours, 0.0, "correlation with the next token\n(within texts, no loops)"
    )
    runs = table[(table["loops"] == "without") & (table["quantity"] == "variance of runs / geometric")]
    by_exit(axes[0][-1], runs, colours, 1.0, "variance of run lengths /\nthat of independence (no loops)")
    workbench.legend_beside(axes[0][-1])
    return drawn


def by_exit(ax: Axes, rows: pd.DataFrame, colours: dict[str, Any], independent: float, label: str) -> None:
    for name, group in rows.groupby("model", sort=False):
        depth = group["exit_layer"].max() + 1
        workbench.curve(
            ax, group.assign(depth=group["exit_layer"] / depth), "depth", colours[str(name)], plain(str(name))
        )
    ax.axhline(independent, color="black", linewidth=0.6)
    ax.set(xlabel="exit layer / depth", ylabel=label)


if __name__ == "__main__":
    typer.run(main)
