"""What speculation gains in a batch of our own decoder: predicted from a trace and measured costs, and run.

    python analyses/batch_rounds.py tales-layerskip --cell 1,2 --cell 3,3 -o docs/results/decoding/batch-tales-layerskip

The predicted rounds of a batch are its rows' own, side by side; its costs are those of 1, 2, 4, .. rows, for a batch
empties. Each cell then decodes the same batches in turns with autoregressive decoding, which takes part twice. Seconds
of decoding, prefill left out, by the processor's clock, for a machine that does other things beside; the median of the
turns of each batch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import benchmarking as bench
import numpy as np
import pandas as pd
import typer

import probekit.costs.timing as timing
import probekit.decoding.batch as batch
from probekit.choice.choose import choose
from probekit.costs.batch import BatchCosts
from probekit.costs.measure import measure_batch
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.decoder import Decoder
from probekit.decoding.speculative import SelfSpeculative
from probekit.prediction.joint import in_order, joint_rounds, own_rounds, rounds_of_prompts
from probekit.prediction.predict import predict
from probekit.prediction.table import Prediction
from probekit.tracing.tracer import trace


def main(
    model: bench.Model = bench.MODEL,
    output: bench.Record = Path("batch"),
    cell: bench.Cells = None,
    rows: Annotated[str, typer.Option(help="Of the batches, powers of two, with commas between.")] = "1,4,8",
    prompts: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    sweeps: Annotated[int, typer.Option(min=1, help="Turns of each way on each batch.")] = 7,
    repeats: Annotated[int | None, typer.Option(min=1, help="Sweeps of a calibration.")] = None,
) -> None:
    loaded = bench.opened_with(model, 1, "cpu", "float32")
    cells = [bench.pair_of(text) for text in cell or bench.CELLS]
    sizes = sorted({int(each) for each in rows.split(",")})
    run = trace(loaded, bench.prompt_ids(loaded, prompts), max_new_tokens=max_new_tokens)
    ids = [run.prompt_ids(prompt).tolist() for prompt in run.prompts]
    context = int((run.texts["prompt_tokens"] + run.texts["new_tokens"] / 2).median())
    exits, lengths = ([pair[at] for pair in cells] for at in (0, 1))
    prediction = predict(run, sorted(set(exits)), sorted(set(lengths)), with_rounds=True)
    found = []
    with by_processor():
        known = measure_batch(
            loaded, context, rows=max(sizes), exit_layers=exits, draft_lengths=lengths, repeats=repeats
        ).by_rows
        for size in sizes:
            costs = BatchCosts({each: known[each] for each in known if each <= size})
            ranked = {each.cell: each for each in choose(prediction, costs).ranking}
            batches = [[ids[place] for place in places] for places in in_order(len(ids), size)]
            ways: dict[Any, Decoder] = {pair: SelfSpeculative(loaded, *pair) for pair in cells}
            seconds, drafted = measured(ways, Autoregressive(loaded), batches, max_new_tokens, sweeps)
            for pair in cells:
                plain = (seconds["plain"] + seconds["again"]) / 2
                row = {
                    "rows": size, "exit_layer": pair[0], "draft_length": pair[1], "predicted": ranked[pair].speedup,
                    "measured": plain / seconds[pair], "plain_against_plain": seconds["plain"] / seconds["again"],
                    "rounds_equal": as_predicted(prediction, pair, drafted[pair], size),
                }  # fmt: skip
                row["ratio"] = row["predicted"] / row["measured"]
                found.append(row)
                bench.say(f"{size} rows, {pair}: predicted {row['predicted']:.3f}, measured {row['measured']:.3f}")
    settings = {"cells": cells, "rows": sizes, "prompts": prompts, "max_new_tokens": max_new_tokens, "sweeps": sweeps,
                "context": context, "clock": "processor time"}  # fmt: skip
    head = bench.decoding_header("batch-rounds", loaded, settings, weights_hash=loaded.weights_hash)
    bench.write_record(output, head | {"rows": found}, pd.DataFrame(found))


@contextmanager
def by_processor() -> Iterator[None]:
    """The clock of steps and of decoding counts seconds of the processor."""
    clocks = timing.time, batch.perf_counter
    timing.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    batch.perf_counter = time.process_time
    try:
        yield
    finally:
        timing.time, batch.perf_counter = clocks


def measured(
    ways: dict[Any, Decoder], plain: Decoder, batches: Sequence[Sequence[list[int]]], budget: int, sweeps: int
) -> tuple[dict[Any, float], dict[Any, list[list[list[int]]]]]:
    """Seconds of decoding all batches each way, autoregressive decoding as "plain" and "again"; and the drafts of
    every round of every row of every batch."""
    asked = {**ways, "plain": plain, "again": plain}
    order, seconds = random.Random(0), {way: np.zeros((sweeps, len(batches))) for way in asked}
    drafted: dict[Any, list[list[list[int]]]] = {}
    for sweep in range(-1, sweeps):  # the first passes are slow
        for place, prompts in enumerate(batches):
            turns = list(asked)
            order.shuffle(turns)
            for way in turns:
                done = asked[way].decode(prompts, max_new_tokens=budget)
                if sweep < 0:
                    drafted.setdefault(way, []).append([each.drafted for each in done])
                else:
                    seconds[way][sweep, place] = (
                        max(each.seconds["total"] for each in done) - done[0].seconds["prefill"]
                    )
    return {way: float(np.median(each, axis=0).sum()) for way, each in seconds.items()}, drafted


def as_predicted(
    prediction: Prediction, cell: tuple[int, int], drafted: Sequence[Sequence[Sequence[int]]], rows: int
) -> bool:
    """Whether every round of every batch had the predicted rows and drafts."""
    own = rounds_of_prompts(prediction, prediction.cell(*cell).key, cell[1])
    for places, made in zip(in_order(len(own), rows), drafted, strict=True):
        told, seen = joint_rounds(own, places), joint_rounds(own_rounds(made), np.arange(rows))
        many = len(seen.rows)
        same = (told.rows[:many] == seen.rows).all() and (told.drafted[:many] == seen.drafted).all()
        if not same or told.rows[many:].any():
            return False
    return True


if __name__ == "__main__":
    typer.run(main)
