"""What does it cost to find the best exit layer and draft length? One trace against every way of trying them out.

    python analyses/benchmark_choice.py --models tales-layerskip --table measured
    python analyses/benchmark_choice.py --models path/to/model.gguf --prompts 12 --tokens 48

Ways: one trace with its choice; every pair in transformers' early exit; every pair in probekit's own decoder;
successive halving over the pairs in probekit's own decoder. The sweeps are extrapolated from some pairs, which are
run on some prompts. Halving is played on a table of the seconds of every pair on every prompt: `measured` by running
the decoder, or `replayed` from the exact rounds of the trace and the costs of a round, scaled to the runs that were
timed. Every way chooses on the even prompts; its regret is the share of the best pair's speed on the odd ones that
its pair gives away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import benchmarking as bench
import numpy as np
import seaborn as sns
import typer

from probekit.choice.choose import choose, decoding_seconds
from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.decoding.speculative import SelfSpeculative
from probekit.models.loaded import Loaded
from probekit.prediction.intervals import drawn_indices
from probekit.prediction.predict import predict
from probekit.prediction.table import Prediction
from probekit.presentation.plots.style import PALETTE
from probekit.traces.trace import Trace
from probekit.tracing.prompts import Prompt, bundled_prompts_for
from probekit.tracing.tracer import trace
from probekit.validation.transformers import transformers_accepted

Cell = tuple[int, int]

LENGTHS = range(1, 9)
SWEPT_LENGTHS = (2, 6)
SWEPT_EXITS = (1 / 6, 1 / 3, 2 / 3, 1.0)  # of the exits; with the lengths, 8 pairs
SWEEPS = 5  # of the calibration over the steps of a round: the fewest that it makes by itself
ORDERS = 200  # in which prompts may come
TRACE, HALVING = "one trace", "successive halving, probekit's decoder"
EVERY_OWN, EVERY_THEIRS = "every pair, probekit's decoder", "every pair, transformers' early exit"


class Table(NamedTuple):
    """seconds: (cells, prompts) of decoding each prompt; tokens: (prompts,) that come out."""

    cells: list[Cell]
    seconds: np.ndarray
    tokens: np.ndarray

    def speeds(self, prompts: Sequence[int]) -> np.ndarray:
        """(cells,) tokens a second over some prompts."""
        return self.tokens[list(prompts)].sum() / self.seconds[:, list(prompts)].sum(1)


def main(
    models: bench.Models = "",
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="New tokens of each prompt.")] = 48,
    device: bench.Device = "cpu",
    prompts: Annotated[int, typer.Option("--prompts", min=4, help="Half of them to choose on, half to judge on.")] = 24,
    swept: Annotated[int, typer.Option("--swept", min=1, help="Prompts on which the pairs of the sweep are run.")] = 2,
    table: Annotated[str, typer.Option("--table", help="measured or replayed.")] = "replayed",
    output: bench.Output = bench.RESULTS,
) -> None:
    for reference in bench.references(models):
        loaded = bench.opened(reference, device)
        chosen = prompts_of(loaded, prompts)
        bench.say(f"{loaded.name}: {loaded.depth - 1} exits x {len(LENGTHS)} lengths, {len(chosen)} prompts")
        settings = {"prompts": len(chosen), "tokens": tokens, "swept_prompts": swept, "sweeps": SWEEPS, "table": table}
        head = bench.header("choice", loaded, settings)
        path = bench.record_path(output, "choice", loaded)

        spent, traced, costs = one_trace(loaded, chosen[::2], tokens)
        cells = [(exit_layer, length) for exit_layer in loaded.anatomy.exits for length in LENGTHS]
        runs = sweep(loaded, chosen[: 2 * swept : 2], swept_cells(loaded), tokens)
        halves = (traced, trace(loaded, chosen[1::2], max_new_tokens=tokens, statistics="agreement"))
        if table == "measured":
            tried = measured_table(loaded, chosen, cells, halves, tokens)
        else:
            tried = replayed_table(halves, costs, cells, runs)
        found = judged(spent, traced, costs, runs, tried, len(cells))
        bench.write(path, {**head, **found})
    draw(output)


def prompts_of(loaded: Loaded, count: int) -> list[Prompt]:
    """An even spread of the bundled prompts, numbered anew."""
    every = bundled_prompts_for(loaded.name)
    count = min(count, len(every))
    return [Prompt(place, every[place * len(every) // count].text) for place in range(count)]


# ------------------------------------------------------------------------------------------------------ the ways
def one_trace(loaded: Loaded, prompts: Sequence[Prompt], tokens: int) -> tuple[dict[str, float], Trace, Costs]:
    """Seconds of each step from prompts to a choice."""
    trace(loaded, prompts[:1], max_new_tokens=4, statistics="agreement")  # what is made once in a process

    def steps() -> tuple[Trace, Costs]:
        seconds["trace"], traced = bench.timed(
            lambda: trace(loaded, prompts, max_new_tokens=tokens, statistics="agreement"), loaded.device
        )
        seconds["costs"], costs = bench.timed(lambda: measure_costs(loaded, repeats=SWEEPS), loaded.device)
        seconds["choice"], _ = bench.timed(lambda: choose(predict(traced), costs), loaded.device)
        return traced, costs

    seconds: dict[str, float] = {}
    traced, costs = steps()
    bench.say(f"  {TRACE}: {seconds}")
    return seconds, traced, costs


def swept_cells(loaded: Loaded) -> list[Cell]:
    exits = sorted({max(1, round(share * (loaded.depth - 1))) for share in SWEPT_EXITS})
    return [(exit_layer, length) for exit_layer in exits for length in SWEPT_LENGTHS]


def sweep(loaded: Loaded, prompts: Sequence[Prompt], cells: Sequence[Cell], tokens: int) -> list[dict[str, Any]]:
    """Each pair on each prompt by both decoders in turn: exit_layer, draft_length, prompt, theirs_s, own_s."""
    found = []
    for place, (exit_layer, length) in enumerate(cells):
        own = SelfSpeculative(loaded, exit_layer, length)
        for prompt in prompts:
            ids = loaded.tokenizer(prompt.text)["input_ids"]
            if place == 0:  # to warm up
                own.decode([ids], max_new_tokens=tokens)
                transformers_accepted(loaded, ids, exit_layer, length, min(tokens, 8))
            ways = {
                "own_s": lambda own=own, ids=ids: own.decode([ids], max_new_tokens=tokens),
                "theirs_s": lambda ids=ids, cell=(exit_layer, length): transformers_accepted(
                    loaded, ids, *cell, tokens
                ),
            }
            seconds = {name: bench.timed(way, loaded.device)[0] for name, way in ways.items()}
            found.append({"exit_layer": exit_layer, "draft_length": length, "prompt": prompt.index, **seconds})
            bench.say(f"  exit {exit_layer}, {length} drafts: {seconds}")
    return found


def measured_table(
    loaded: Loaded, prompts: Sequence[Prompt], cells: list[Cell], halves: Sequence[Trace], tokens: int
) -> Table:
    """Every pair on every prompt, run once, in random order."""
    ids = [loaded.tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    seconds = np.zeros((len(cells), len(prompts)))
    methods = [SelfSpeculative(loaded, *cell) for cell in cells]
    order = [(cell, prompt) for cell in range(len(cells)) for prompt in range(len(prompts))]
    for done, place in enumerate(np.random.default_rng(0).permutation(len(order))):
        cell, prompt = order[place]
        seconds[cell, prompt], _ = bench.timed(
            lambda cell=cell, prompt=prompt: methods[cell].decode([ids[prompt]], max_new_tokens=tokens), loaded.device
        )
        if done % 500 == 0:
            bench.say(f"  table: {done} of {len(order)} runs")
    return Table(cells, seconds, written(halves))


def written(halves: Sequence[Trace]) -> np.ndarray:
    """(prompts,) new tokens of every prompt."""
    tokens = np.zeros(sum(map(len, halves)), dtype=int)
    for half in halves:
        tokens[half.prompts] = half.texts["new_tokens"]
    return tokens


def replayed_table(halves: Sequence[Trace], costs: Costs, cells: list[Cell], runs: Sequence[dict[str, Any]]) -> Table:
    """The exact rounds of every pair, times what a round costs, scaled to the runs that were timed."""
    tokens = written(halves)
    seconds = np.zeros((len(cells), len(tokens)))
    for half in halves:
        seconds[:, half.prompts] = predicted_seconds(predict(half), costs, cells)
    ratio = [
        run["own_s"] / seconds[cells.index((run["exit_layer"], run["draft_length"])), run["prompt"]] for run in runs
    ]
    return Table(cells, seconds * float(np.median(ratio)), tokens)


def predicted_seconds(prediction: Prediction, costs: Costs, cells: Sequence[Cell]) -> np.ndarray:
    """(cells, prompts) seconds of decoding."""
    return np.array([decoding_seconds(prediction.cell(*cell), costs) for cell in cells])


def halving(table: Table, order: Sequence[int], first: int) -> tuple[int, float]:
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): (the cell that is left, seconds spent).

    Every pair decodes the `first` prompts of the order; the faster half goes on to twice as many, and so on. A run
    that was made is not made again.
    """
    left, spent, before, prompts = np.arange(len(table.cells)), 0.0, 0, first
    while True:
        now = min(prompts, len(order))
        spent += float(table.seconds[np.ix_(left, list(order[before:now]))].sum())
        speeds = table.speeds(order[:now])[left]
        if len(left) == 1:
            return int(left[0]), spent
        left = left[np.argsort(-speeds, kind="stable")[: math.ceil(len(left) / 2)]]
        before, prompts = now, 2 * prompts


# ------------------------------------------------------------------------------------------------------ judgement
def judged(
    spent: dict[str, float], traced: Trace, costs: Costs, runs: list[dict[str, Any]], table: Table, cells: int
) -> dict[str, Any]:
    """Seconds of every way, regrets, and the targets."""
    pool = traced.prompts
    even, odd = [2 * place for place in range(len(pool))], [2 * place + 1 for place in range(len(pool))]
    odd = [place for place in odd if place < len(table.tokens)]
    truth = table.speeds(odd)
    regret = 1 - truth / truth.max()
    random = np.random.default_rng(0)
    orders = [random.permutation(even).tolist() for _ in range(ORDERS)]

    predicted = predicted_seconds(predict(traced), costs, table.cells)  # columns: the even prompts
    own_tokens = traced.texts["new_tokens"].to_numpy()
    curves: list[dict[str, Any]] = []
    counts = sorted({1, 2, 4, 8, len(even)} & set(range(1, len(even) + 1)))
    for count in counts:
        columns = [[place // 2 for place in order[:count]] for order in orders]
        picks = [int((own_tokens[c].sum() / predicted[:, c].sum(1)).argmax()) for c in columns]
        seconds = spent["costs"] + spent["choice"] + spent["trace"] * count / len(even)
        curves.append({"way": TRACE, "prompts": count, "seconds": seconds, "regret": float(regret[picks].mean())})
    for count in counts:
        played = [halving(table, order, count) for order in orders]
        curves.append(
            {"way": HALVING, "prompts": count, "seconds": float(np.mean([seconds for _, seconds in played])),
             "regret": float(regret[[cell for cell, _ in played]].mean())}
        )  # fmt: skip

    own, theirs = (np.array([run[name] for run in runs]) for name in ("own_s", "theirs_s"))
    every = {
        EVERY_OWN: bench.spread(own * cells * len(even)),
        EVERY_THEIRS: bench.spread(theirs * cells * len(even)),
    }
    total = sum(spent.values())
    mine, rival = at_equal_regret(curves)
    # per cell and prompt: the mean is what a sweep pays, so the quantiles are over means of resampled runs
    again = theirs[drawn_indices(len(theirs), 1000, random)].mean(axis=1)
    means = [float(mean) * cells * len(even) / total for mean in again]
    best = int(regret.argmin())
    return {
        "cells": cells,
        "trace_s": {**spent, "total": total},
        "every_pair_s": every,
        "curves": curves,
        "equal_regret": {"trace": mine, "halving": rival},
        "best_pair": list(table.cells[best]),
        "rounds_measured_over_predicted": bench.spread(_over_predicted(runs, predicted, table)),
        "targets": [
            bench.target("every pair in transformers' early exit, times the cost of one trace", means, at_least=500),
            bench.target(
                "successive halving at equal regret, times the cost of one trace", [rival["seconds"] / mine["seconds"]],
                at_least=20,
            ),
        ],
        "samples": {"runs": runs, "table_s": np.round(table.seconds, 5).tolist(), "tokens": table.tokens.tolist()},
    }  # fmt: skip


def at_equal_regret(curves: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """For each way the fewest seconds at a regret that both can reach: (one trace, successive halving)."""
    ways = [[row for row in curves if row["way"] == way] for way in (TRACE, HALVING)]
    level = max(min(row["regret"] for row in rows) for rows in ways)
    mine, rival = (
        min((row for row in rows if row["regret"] <= level), key=lambda row: row["seconds"]) for rows in ways
    )
    return mine, rival


def _over_predicted(runs: Sequence[dict[str, Any]], predicted: np.ndarray, table: Table) -> list[float]:
    """Measured seconds over predicted ones, prefill and all; runs are on even prompts."""
    return [
        run["own_s"] / predicted[table.cells.index((run["exit_layer"], run["draft_length"])), run["prompt"] // 2]
        for run in runs
    ]


def draw(folder: Path) -> None:
    """Regret over the seconds that a way spends, and what the sweeps would spend, for each model."""
    found = bench.records(folder, "choice")
    with bench.paper_figure(folder, "choice", 6.9, 0.5 + 1.9 * math.ceil(len(found) / 2)) as figure:
        axes = figure.subplots(math.ceil(len(found) / 2), 2, squeeze=False).ravel()
        colours = sns.color_palette(PALETTE, 4)
        for record, axis in zip(found, axes, strict=False):
            for (way, marker), colour in zip({TRACE: "o", HALVING: "s"}.items(), colours, strict=False):
                rows = [row for row in record["curves"] if row["way"] == way]
                axis.plot([row["seconds"] for row in rows], [100 * row["regret"] for row in rows],
                          marker=marker, color=colour, label=way, clip_on=False)  # fmt: skip
            for (way, style), colour in zip({EVERY_OWN: "--", EVERY_THEIRS: ":"}.items(), colours[2:], strict=True):
                axis.axvline(record["every_pair_s"][way]["p50"], color=colour, linestyle=style, label=way)
            axis.set_xscale("log")
            axis.set_ylim(0, 110 * max(row["regret"] for row in record["curves"]) or 1)
            axis.set_title(f"{record['model']}, {record['cells']} pairs")
            axis.set_xlabel("seconds until the choice")
            axis.set_ylabel("regret, %")
        for axis in axes[len(found) :]:
            axis.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)


if __name__ == "__main__":
    typer.run(main)
