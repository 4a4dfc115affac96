"""Does the decoder do what the trace predicts, and how far off is the closed form that papers quote?

    python analyses/05_predicted_against_measured.py [MODEL ...] -o build/analyses

Rounds, drafted and accepted tokens of the running decoder against the prediction, cell by cell. Beside them the closed
form (1 - a^(K+1)) / (1 - a), which assumes independent acceptances, and how far from independent they are: run lengths
against the geometric law, and the correlation of agreement with itself some tokens later.
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import seaborn as sns
import typer
from matplotlib.figure import Figure
from workbench import OUTPUT, PROMPTS, TOKENS, TRACES, Device, Limit, Models, Output, Tokens, Traces, bench, figure

from probekit.prediction.costs import roofline_costs
from probekit.prediction.validation import Validation, validate
from probekit.presentation.plots import PALETTE, plain
from probekit.tracing.traces import Trace
from probekit.tying.certainty import autocorrelation, closed_form_error, runs_against_geometric
from probekit.tying.text_kinds import before_loops

NAME = "05_predicted_against_measured"
DRAFT_LENGTHS = (2, 4, 8)
DEPTHS = (0.25, 0.5, 0.75)  # exits that are run, as shares of the depth
LAGS = (1, 2, 4, 8)
COUNTS = ("rounds", "drafted", "accepted", "tokens")


def main(
    models: Models = None, output: Output = OUTPUT, traces: Traces = TRACES, prompts: Limit = PROMPTS,
    max_new_tokens: Tokens = TOKENS, device: Device = None,
    run: Annotated[int, typer.Option(min=1, help="Prompts that the decoder continues in each cell.")] = 6,
) -> None:  # fmt: skip
    """Does the decoder do what the trace predicts, and how far off is the closed form that papers quote?"""
    with bench(models, output, traces, prompts, max_new_tokens, device) as work:
        parts = []
        for loaded in work.loaded():
            trace = work.trace(loaded)
            exits = sorted({min(loaded.depth - 1, max(1, round(share * loaded.depth))) for share in DEPTHS})
            cells = [(exit_layer, length) for exit_layer in exits for length in DRAFT_LENGTHS]
            costs = roofline_costs(
                trace, device="h200"
            )  # only the counts are asked for here: nothing needs to be timed
            parts.append(measured_rows(validate(loaded, trace, cells, limit=run, costs=costs)))
            for loops, chosen in (("with", trace), ("without", before_loops(trace))):
                parts += [form_rows(chosen, exits).assign(loops=loops), dependence_rows(chosen).assign(loops=loops)]
        table = pd.concat(parts, ignore_index=True)
        columns = ["model", "loops", "exit_layer", "draft_length", "lag", "quantity", "value", "low", "high"]
        table = table.reindex(columns=columns).astype({"draft_length": "Int64", "lag": "Int64", "exit_layer": "Int64"})
        work.write(NAME, main.__doc__ or "", table, draw(table), run=run)


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
    for exit_layer in range(1, trace.depth):
        keys = {"model": trace.manifest.model.name, "exit_layer": exit_layer}
        runs = runs_against_geometric(trace, exit_layer)
        rows.append({**keys, "quantity": "variance of runs / geometric", "value": runs.variance_ratio})
        for within in (False, True):
            share = autocorrelation(trace, exit_layer, LAGS, within=within)
            low, high = share.interval()
            name = "autocorrelation within texts" if within else "autocorrelation"
            for place, lag in enumerate(LAGS):
                ends = {"value": share.values[place], "low": low[place], "high": high[place]}
                rows.append({**keys, "quantity": name, "lag": lag, **ends})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Predicted against measured rounds; the closed form against the exact figure; correlation by exit."""
    drawn, axes = figure(3)
    names = list(dict.fromkeys(table["model"]))
    colours = dict(zip(names, sns.color_palette(PALETTE), strict=False))
    keys = ["model", "loops", "exit_layer", "draft_length"]
    cells = (
        table[table["loops"] == "with"].dropna(subset="draft_length").set_index([*keys, "quantity"])["value"].unstack()
    )
    pairs = (("predicted rounds", "measured rounds"), ("tokens per round", "closed form"))
    for ax, (here, there) in zip(axes[0], pairs, strict=False):
        for name, group in cells.groupby("model", sort=False):
            ax.plot(group[here], group[there], "o", color=colours[name], label=plain(str(name)))
        ends = [cells[[here, there]].min().min(), cells[[here, there]].max().max()]
        ax.plot(ends, ends, "--", color="grey", linewidth=0.8, zorder=0)
        ax.set(xlabel=here, ylabel=there)
    ax = axes[0][2]
    own = table[
        (table["quantity"] == "autocorrelation within texts") & (table["lag"] == 1) & (table["loops"] == "without")
    ]
    for name, group in own.groupby("model", sort=False):
        exits = group["exit_layer"].to_numpy(float) / (group["exit_layer"].max() + 1)
        ax.plot(exits, group["value"], color=colours[name], label=plain(str(name)))
        ax.fill_between(
            exits, group["low"].to_numpy(float), group["high"].to_numpy(float), color=colours[name], alpha=0.22
        )
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set(xlabel="exit layer / depth", ylabel="correlation with the next token's, within texts")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


if __name__ == "__main__":
    typer.run(main)
