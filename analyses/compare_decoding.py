"""What does each way of decoding gain on the same weights and prompts? transformers and probekit side by side.

    python analyses/compare_decoding.py tales-layerskip --cell 3,2 --draft-model tales-draft -o docs/results/decoding
    python analyses/compare_decoding.py path/to/model.gguf --cell 12,2 --cell 20,4 --prompts 3 --max-new-tokens 48

All methods take turns on every prompt, so that a noisy machine is noisy to all. A speedup is over autoregressive
decoding by the same engine; `against` is over transformers' own way of doing the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import benchmarking as bench
import numpy as np
import pandas as pd
import torch
import typer
from learned_drafting import Drafting
from rich.console import Console
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from probekit.decoding.autoregressive import Autoregressive, EarlyExit
from probekit.decoding.decoder import Decoder
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.models.loaded import Loaded
from probekit.tracing.prompts import bundled_prompts_for
from probekit.validation.transformers import transformers_accepted

Run = Callable[[list[int]], tuple[list[int], float | None]]  # prompt ids -> new tokens, acceptance rate


def main(
    model: bench.Model = bench.MODEL,
    cell: bench.Cells = None,
    draft_model: Annotated[
        str | None, typer.Option(help="For two-model decoding, with the first cell's length.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1)] = 6,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    draft_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Exits also draft with so many rows of the head, learned on other prompts."),
    ] = None,
    heads: Annotated[bool, typer.Option("--fit-heads", help="And through exit heads, learned there too.")] = False,
    compiled: Annotated[bool, typer.Option(help="Also transformers compiled with a static cache.")] = False,
    threads: bench.Threads = None,
    device: bench.AnyDevice = None,
    dtype: bench.Dtype = None,
    output: bench.Record = Path("decoding"),
) -> None:
    loaded = bench.opened_with(model, threads, device, dtype)
    drafter = bench.opened_with(draft_model, threads, device, dtype) if draft_model else None
    cells = [bench.pair_of(text) for text in cell or bench.CELLS]
    ways = {
        **transformers_ways(loaded, drafter, cells, max_new_tokens, compiled),
        **probekit_ways(loaded, drafter, cells, max_new_tokens),
    }
    if heads or draft_rows is not None:
        others = bundled_prompts_for(loaded.name)[prompts:]
        learned = Drafting.learned(loaded, others, max_new_tokens, draft_rows, heads)
        ways |= {
            ("probekit", f"{exit_layer},{length} with {with_what(draft_rows, heads)}"):
                decoded_by(learned.decoder(loaded, exit_layer, length), max_new_tokens)
            for exit_layer, length in cells
        }  # fmt: skip
    table = measure(ways, bench.prompt_ids(loaded, prompts), repeats)
    settings = {"prompts": prompts, "max_new_tokens": max_new_tokens, "repeats": repeats, "cells": cells,
                "draft_rows": draft_rows, "exit_heads": heads}  # fmt: skip
    names = {"weights_hash": loaded.weights_hash, "drafter": drafter and drafter.name}
    record = {
        **bench.decoding_header("compare-decoding", loaded, settings, **names),
        "rows": json.loads(table.to_json(orient="records")),
    }
    bench.write_record(output, record, table, "%.4g")
    shown = table[[column for column in table.columns if not column.endswith(("_20", "_80"))]]
    Console(soft_wrap=True).print(shown.to_string(index=False, float_format="%.3f", na_rep="-"), markup=False)


def with_what(draft_rows: int | None, heads: bool) -> str:
    rows = [] if draft_rows is None else [f"{draft_rows} rows"]
    return " and ".join([*rows, *(["exit heads"] if heads else [])])


def decoded_by(method: Decoder, budget: int) -> Run:
    def run(ids: list[int]) -> tuple[list[int], float | None]:
        decoded = method.decode([ids], max_new_tokens=budget)[0]
        return decoded.tokens, decoded.acceptance_rate

    return run


def probekit_ways(
    loaded: Loaded, drafter: Loaded | None, cells: Sequence[tuple[int, int]], budget: int
) -> dict[tuple[str, str], Run]:
    way = partial(decoded_by, budget=budget)
    ways = {("probekit", "autoregressive"): way(Autoregressive(loaded))}
    for exit_layer, length in cells:
        ways["probekit", f"self-speculative {exit_layer},{length}"] = way(SelfSpeculative(loaded, exit_layer, length))
    if drafter is not None:
        ways["probekit", f"two models, {cells[0][1]} drafts"] = way(Speculative(loaded, drafter, cells[0][1]))
    ways["probekit", f"early exit {cells[0][0]} (lossy)"] = way(EarlyExit(loaded, cells[0][0]))
    return ways


def transformers_ways(
    loaded: Loaded, drafter: Loaded | None, cells: Sequence[tuple[int, int]], budget: int, compiled: bool
) -> dict[tuple[str, str], Run]:
    def plain(model: PreTrainedModel, **how: Any) -> Run:
        def run(ids: list[int]) -> tuple[list[int], float | None]:
            inputs = torch.tensor([ids], device=loaded.device)
            settings = GenerationConfig(
                max_new_tokens=budget, do_sample=False, eos_token_id=sorted(loaded.eos_ids) or None,
                pad_token_id=min(loaded.eos_ids, default=0), **how.get("config", {}),
            )  # fmt: skip
            output = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_config=settings,
                **({"assistant_model": how["assistant"]} if "assistant" in how else {}),
            )  # fmt: skip
            return output[0, len(ids) :].tolist(), None

        return run

    ways = {("transformers", "autoregressive"): plain(loaded.model)}
    if compiled:
        ways["transformers", "autoregressive, compiled"] = plain(
            loaded.model, config={"cache_implementation": "static", "compile_config": everywhere()}
        )
    for exit_layer, length in cells:

        def early_exit(
            ids: list[int], exit_layer: int = exit_layer, length: int = length
        ) -> tuple[list[int], float | None]:
            rounds = transformers_accepted(loaded, ids, exit_layer, length, budget)
            return rounds.tokens, sum(rounds.accepted) / max(1, sum(rounds.drafted))

        ways["transformers", f"self-speculative {exit_layer},{length}"] = early_exit
    if drafter is not None:
        drafts = {
            "num_assistant_tokens": cells[0][1],
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }
        drafter.model.generation_config.update(**drafts)
        ways["transformers", f"two models, {cells[0][1]} drafts"] = plain(loaded.model, assistant=drafter.model)
    return ways


def everywhere() -> CompileConfig:
    """transformers compiles on accelerators only, unless it is told otherwise by this attribute."""
    compiling = CompileConfig()
    compiling._compile_all_devices = True
    return compiling


def measure(ways: dict[tuple[str, str], Run], texts: Sequence[list[int]], repeats: int) -> pd.DataFrame:
    """Every way takes its turn on every prompt. Speeds in tokens a second, end to end, over repeats x prompts."""
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    speeds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    rates: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    first: dict[tuple[tuple[str, str], int], list[int]] = {}
    for run in ways.values():  # warm up: allocations, and compilation where there is one
        run(texts[0])
    for _ in range(repeats):
        for place, ids in enumerate(texts):
            for way, run in ways.items():
                began = perf_counter()
                tokens, rate = run(ids)
                seconds[way].append(perf_counter() - began)
                speeds[way].append(len(tokens) / seconds[way][-1])
                first.setdefault((way, place), tokens)
                if rate is not None:
                    rates[way].append(rate)
    own = {engine: np.array(seconds[engine, "autoregressive"]) for engine in ("transformers", "probekit")}
    rows = []
    for (engine, method), spent in seconds.items():
        peer = ("transformers", method)
        speed = np.quantile(speeds[engine, method], bench.QUANTILES)
        gain = np.quantile(own[engine] / np.array(spent), bench.QUANTILES)
        row: dict[str, Any] = {
            "engine": engine,
            "method": method,
            "same_tokens": sum(
                first[(engine, method), place] == first[("transformers", "autoregressive"), place]
                for place in range(len(texts))
            ),
            "prompts": len(texts),
            "acceptance": float(np.mean(rates[engine, method])) if rates[engine, method] else None,
        }
        row |= {f"tokens_per_s_{share * 100:.0f}": value for share, value in zip(bench.QUANTILES, speed, strict=True)}
        row |= {f"speedup_{share * 100:.0f}": value for share, value in zip(bench.QUANTILES, gain, strict=True)}
        against = np.array(seconds[peer]) / np.array(spent) if engine == "probekit" and peer in seconds else None
        row |= {
            f"against_{share * 100:.0f}": None if against is None else float(np.quantile(against, share))
            for share in bench.QUANTILES
        }
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    typer.run(main)
