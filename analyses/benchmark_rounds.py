"""Does a round cost what its steps cost? A round of the running decoder against the sum of its separately timed steps.

    python analyses/benchmark_rounds.py tales-layerskip --cell 3,2 --cell 6,4 -o docs/results/decoding/rounds-layerskip

The steps of a round with k drafts: k + 1 passes of layers 0..E-1 over one row, k times norm, head and argmax, and one
pass of layers E..L-1 over k + 1 rows with norm, head and argmax. Each is timed by itself, without a decoder, at the
context in the middle of the text, before and after the decoder runs. They take turns in the order of a round, so that
weights come from where they come from in a round; in a loop of its own a step finds them in the processor's caches
(those times are in the record too, as `alone_over_round`). What the decoder does beside them (judging drafts, booking
tokens, telling the host) keeps the ratio below 1. Medians on both sides: over the turns of a step, and over the rounds
of a text that draft all they may.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import benchmarking as bench
import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console

from probekit.decoding.engine import Engine
from probekit.decoding.speculative import SelfSpeculative
from probekit.models.loaded import Loaded

LOOP_S = 0.5  # the steps of a round are repeated for so long each time that they are timed


def main(
    model: bench.Model = bench.MODEL,
    cell: bench.Cells = None,
    prompts: Annotated[int, typer.Option(min=1)] = 6,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    threads: bench.Threads = None,
    device: bench.AnyDevice = None,
    dtype: bench.Dtype = None,
    output: bench.Record = Path("rounds"),
) -> None:
    loaded = bench.opened_with(model, threads, device, dtype)
    cells = [bench.pair_of(text) for text in cell or bench.CELLS]
    texts = bench.prompt_ids(loaded, prompts)
    rows = [
        measured(loaded, exit_layer, length, prompt, ids, max_new_tokens)
        for prompt, ids in enumerate(texts)
        for exit_layer, length in cells
    ]
    raw = pd.DataFrame(rows)
    settings = {"prompts": prompts, "max_new_tokens": max_new_tokens, "cells": cells}
    record = {
        **bench.decoding_header("benchmark-rounds", loaded, settings, weights_hash=loaded.weights_hash),
        "cells": [summary(pair, group) for pair, group in raw.groupby(["exit_layer", "draft_length"])],
    }
    bench.write_record(output, record, raw)
    Console(soft_wrap=True).print_json(json.dumps(record["cells"]))


def measured(
    loaded: Loaded, exit_layer: int, length: int, prompt: int, ids: list[int], budget: int
) -> dict[str, float | int]:
    """One prompt in one cell: median seconds of its rounds with `length` drafts, and of their steps."""
    method = SelfSpeculative(loaded, exit_layer, length)
    method.decode([ids], max_new_tokens=min(budget, 12))
    context = len(ids) + budget // 2
    before = steps(loaded, exit_layer, length, context)
    with bench.stopwatch() as ticks:
        done = method.decode([ids], max_new_tokens=budget)[0]
    after = steps(loaded, exit_layer, length, context)
    whole = np.diff(ticks)[np.array(done.drafted) == length]
    return {
        "prompt": prompt, "exit_layer": exit_layer, "draft_length": length, "rounds": len(whole),
        "round_s": float(np.median(whole)), **{name: (before[name] + after[name]) / 2 for name in before},
    }  # fmt: skip


@torch.inference_mode()
def steps(loaded: Loaded, exit_layer: int, length: int, context: int) -> dict[str, float]:
    """Median seconds of the steps of a round at a context: `steps_s` in its order, `alone_s` in loops of their own."""
    engine = Engine(loaded.anatomy, 1, context + length + 1)
    token = torch.zeros((1, 1), dtype=torch.long, device=loaded.device)
    residual = engine.early(token, engine.places([context], 1), exit_layer)

    wide = residual.expand(1, length + 1, -1).contiguous()
    ways: dict[str, Callable[[], Any]] = {
        "early": lambda: engine.early(token, engine.places([context], 1), exit_layer),
        "head": lambda: engine.logits(engine.parts.norm(residual)).argmax(-1),
        "verify": lambda: engine.logits(engine.late(wide, engine.places([context], length + 1), exit_layer)).argmax(-1),
    }
    order = [*("early", "head") * length, "early", "verify"]
    in_order = timed([ways[name] for name in order], LOOP_S, loaded.device)
    alone = {name: timed([way], LOOP_S / len(ways), loaded.device)[0] for name, way in ways.items()}
    return {
        "steps_s": sum(in_order),
        "alone_s": sum(alone[name] for name in order),
        **{f"{name}_s": seconds for name, seconds in zip(order, in_order, strict=True)},
    }


def timed(ways: list[Callable[[], Any]], loop_s: float, device: torch.device) -> list[float]:
    """Median seconds of each, one after the other, again and again."""
    seconds: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    while sum(map(sum, seconds)) < loop_s or len(seconds[0]) < 3:
        for way, own in zip(ways, seconds, strict=True):
            began = perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            own.append(perf_counter() - began)
    return [float(np.median(own)) for own in seconds]


def summary(pair: tuple[int, int], rows: pd.DataFrame) -> dict[str, Any]:
    """steps_over_round: the sum of the steps over the round, of each prompt."""
    single = rows["steps_s"] / rows["round_s"]
    return {
        "exit_layer": int(pair[0]),
        "draft_length": int(pair[1]),
        "rounds": int(rows["rounds"].sum()),
        "round_s": float(rows["round_s"].median()),
        "steps_over_round": float(single.median()),
        "steps_over_round_quantiles": single.quantile(list(bench.QUANTILES)).tolist(),
        "alone_over_round": float((rows["alone_s"] / rows["round_s"]).median()),
    }


if __name__ == "__main__":
    typer.run(main)
