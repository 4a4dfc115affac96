"""How do predictions and rankings grow with the text? Processor time by tokens of the trace, and the power they follow.

    python analyses/benchmark_ranking.py tales-layerskip -o docs/results/benchmarks/ranking-tales-layerskip

Jobs: every exit and draft length; trees of one shape at every exit; the oracle of all exits and lookups; `rank`, which
does all of this and more, without and with its intervals. Each reads traces of the same prompts with more and more new
tokens, and of more and more prompts, in turns; the least of each job's times counts. The power is the slope of the
logarithms: 1 is linear in the text.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import benchmarking as bench
import numpy as np
import pandas as pd
import typer

from probekit.choice.rank import oracle_of, rank
from probekit.costs.roofline import roofline_costs
from probekit.drafting.drafters import ExitLayer, traced_drafters
from probekit.drafting.text_drafters import PromptLookup
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import tree_shape_named
from probekit.prediction.predict import predict
from probekit.traces.trace import Trace
from probekit.tracing.prompts import bundled_prompts_for
from probekit.tracing.tracer import trace

LENGTHS = tuple(range(1, 9))
SHAPE = "2x2x1"
NEW_TOKENS = (24, 48, 96, 192)  # of 12 prompts
PROMPTS = (6, 12, 24)  # of 96 new tokens


def jobs(traced: Trace) -> dict[str, Callable[[], Any]]:
    exits = traced_drafters(traced, draft_model=False)
    trees = [TreeDrafts(each, tree_shape_named(SHAPE)) for each in exits if isinstance(each, ExitLayer)]
    costs = roofline_costs(traced, device="h100", context=128)
    return {
        "pairs": lambda: predict(traced, draft_lengths=LENGTHS),
        "trees": lambda: predict(traced, draft_lengths=[3], drafters=trees),
        "oracle": lambda: oracle_of(traced, [*exits, PromptLookup(2), PromptLookup(3)], costs, LENGTHS[-1]),
        "rank": lambda: rank(traced, costs, draft_lengths=LENGTHS),
    }


def main(
    model: bench.Model = bench.MODEL,
    output: bench.Record = Path("ranking"),
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    loaded = bench.opened_with(model, 1, "cpu", None)
    given = bundled_prompts_for(loaded.name)
    sizes = [("new tokens", 12, new) for new in NEW_TOKENS] + [("prompts", count, 96) for count in PROMPTS]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        traces = {}
        for count, new in dict.fromkeys((count, new) for _, count, new in sizes):
            traced = trace(loaded, given[:count], Path(folder) / f"{count}-{new}", max_new_tokens=new)
            traces[count, new] = Trace.open(traced.folder)
        for _, (kind, count, new) in product(range(repeats), sizes):  # in turns
            for job, work in jobs(traces[count, new]).items():
                began = time.process_time()
                work()
                tokens = int(traces[count, new].texts["new_tokens"].sum())
                rows.append({"job": job, "grown": kind, "prompts": count, "new_tokens": new, "tokens": tokens,
                             "seconds": time.process_time() - began})  # fmt: skip
    samples = pd.DataFrame(rows)
    least = samples.groupby(["job", "grown", "prompts", "new_tokens", "tokens"], as_index=False)["seconds"].min()
    powers = {
        f"{job}, {kind}": round(float(np.polyfit(np.log(of["tokens"]), np.log(of["seconds"]), 1)[0]), 3)
        for (job, kind), of in least.groupby(["job", "grown"])
    }
    settings = {"draft_lengths": list(LENGTHS), "tree": SHAPE, "exits": loaded.depth - 1, "repeats": repeats,
                "clock": "processor time of one thread"}  # fmt: skip
    bench.write_record(output, {**bench.header("ranking", loaded, settings), "power": powers}, least)
    print(
        least.pivot_table(index=["grown", "prompts", "new_tokens", "tokens"], columns="job", values="seconds").round(3)
    )
    print("power:", powers)


if __name__ == "__main__":
    typer.run(main)
