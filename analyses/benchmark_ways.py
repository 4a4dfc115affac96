"""What does each way of drafting really gain, and how far is it from the oracle? Run on prompts that had no say in it.

    python analyses/benchmark_ways.py tales-layerskip --draft-model tales-draft -o build/ways-tales-layerskip

Costs are measured on this machine. On the even-numbered bundled prompts every way is ranked, and the best of each kind
is taken: the best fixed pair of exit and length, each policy at its best exit, DEL, the learned tables, the best tree,
a lookup, the draft model. These decode the odd-numbered prompts, taking turns on each, with autoregressive decoding
among them; and so does the oracle, which knows the odd texts and plays its plan for them. Its speedup is what any
policy could reach with these drafters (those that can take turns) on these costs.

Regret: 1 - speedup / the oracle's speedup, as it was run.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import benchmarking as bench
import pandas as pd
import torch
import typer

from probekit.choice.rank import GROWN, priced, rank
from probekit.choice.ranking import Ranked, Ranking
from probekit.costs.measure import measure_costs
from probekit.decoding import batch
from probekit.models.loaded import load
from probekit.tracing.prompts import bundled_prompts_for
from probekit.tracing.tracer import trace
from probekit.validation.ways import validate_ways

KINDS = ("heuristic:5", "confidence", "entropy", "margin", "del", "del by costs", "table", "table with lookups", GROWN)
WIDEST = 16  # nodes of a tree


def main(
    model: bench.Model = bench.MODEL,
    output: bench.Record = Path("ways"),
    max_new_tokens: Annotated[int, typer.Option(min=4)] = 64,
    prompts: Annotated[int, typer.Option(min=8, help="How many of the bundled ones.")] = 24,
    draft_model: Annotated[str | None, typer.Option(help="A second model that drafts.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Count this process's time, on one thread.")] = False,
    threads: bench.Threads = None,
    device: bench.AnyDevice = None,
    dtype: bench.Dtype = None,
) -> None:
    if cpu_time:  # on a machine that others use as well, long steps are interrupted, and short ones are not
        threads, time.perf_counter, batch.perf_counter = 1, time.process_time, time.process_time
    loaded = bench.opened_with(model, threads, device, dtype)
    helper = None if draft_model is None else load(draft_model, device=device, dtype=dtype)
    given = bundled_prompts_for(loaded.name)
    traced = trace(
        loaded, given[:: max(1, len(given) // prompts)][:prompts], max_new_tokens=max_new_tokens, draft_model=helper
    )
    even, odd = traced.select(traced.prompts[::2]), traced.select(traced.prompts[1::2])
    context = int((traced.texts["prompt_tokens"] + traced.texts["new_tokens"] / 2).median())
    costs = measure_costs(loaded, context, draft_lengths=[8, WIDEST], drafter=helper)
    ranking, above = rank(even, costs), rank(odd, costs).oracle_of_turns
    if above is None or above.way is None:
        raise RuntimeError("greedy text without an oracle")
    taken = [*picked(ranking), ("oracle", above)]
    found = validate_ways(
        loaded, odd, [way.way for _, way in taken if way.way is not None], draft_model=helper, repeats=repeats
    )
    rows = []
    for (kind, way), run in zip(taken, found.ways, strict=True):
        predicted = way if kind == "oracle" else priced(odd, run.way, costs)
        quantiles = run.speedup_measured_quantiles or (None, None)
        rows.append(
            {
                "model": loaded.name,
                "kind": kind,
                "drafter": way.drafter,
                "policy": way.policy,
                "exit_layer": way.exit_layer,
                "draft_length": way.draft_length,
                "tokens_per_round": predicted.tokens_per_round,
                "drafted_per_token": predicted.drafted_per_token,
                "speedup_predicted": predicted.speedup,
                "speedup_measured": run.speedup_measured,
                "measured_20": quantiles[0],
                "measured_80": quantiles[1],
                "rounds": run.measured["rounds"],
                "rounds_equal": run.rounds_equal,
                "tokens_equal": run.tokens_equal,
                "drafted_error": run.drafted_error,
                "unexplained": run.unexplained,
            }
        )
    table = pd.DataFrame(rows).astype({"exit_layer": "Int64"})
    best = table["speedup_measured"].iloc[-1]
    table["regret"] = 1 - table["speedup_measured"] / best
    record = {
        "schema": "probekit/benchmark-ways/1",
        "model": loaded.name,
        "settings": {
            "max_new_tokens": max_new_tokens,
            "prompts": len(traced),
            "draft_model": draft_model,
            "weights_hash": loaded.weights_hash,
            "repeats": repeats,
        },
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "clock": "process" if cpu_time else "wall",
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        },
        "versions": {name: version(name) for name in ("probekit", "torch", "transformers")},
        "costs": costs.to_json(),
        "ways": len(ranking.ways),
        "rounds": int(table["rounds"].sum()),
        "holds": found.holds,
    }
    bench.write_record(output, record, table)
    typer.echo(table.drop(columns=["model", "rounds_equal", "unexplained"]).round(3).to_string(index=False))


def picked(ranking: Ranking) -> Iterator[tuple[str, Ranked]]:
    """(kind, its best way)."""

    def best(kind: str, **wanted: Any) -> Iterator[tuple[str, Ranked]]:
        for way in ranking.ways:
            if way.way is not None and all(_is(getattr(way, name), value) for name, value in wanted.items()):
                yield kind, way
                return

    yield from best("fixed pair", drafter="self", policy="fixed")
    yield from best("draft model", drafter=ranking.costs.drafter or "(none)", policy="fixed")
    yield from best("lookup", drafter=("ngram", "suffix"))
    yield from best("tree", drafter="tree", policy="fixed")
    for kind in KINDS:
        yield from best(kind, policy=kind if kind in (*KINDS[4:7], KINDS[7]) else (kind,))


def _is(value: str, wanted: Any) -> bool:
    return value.startswith(wanted) if isinstance(wanted, tuple) else value == wanted or value.startswith(f"{wanted}:")


if __name__ == "__main__":
    typer.run(main)
