"""What does each way of decoding gain on the same weights and prompts? transformers and probekit side by side.

    python analyses/compare_decoding.py tales-layerskip --cell 3,2 --draft-model tales-draft -o docs/results/decoding
    python analyses/compare_decoding.py path/to/model.gguf --cell 12,2 --cell 20,4 --prompts 3 --max-new-tokens 48

All methods take turns on every prompt, so that a noisy machine is noisy to all. A speedup is over autoregressive
decoding by the same engine; `against` is over transformers' own way of doing the same.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from probekit.decoding.autoregressive import Autoregressive, EarlyExit
from probekit.decoding.decoder import Decoder
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.errors import InputError
from probekit.models.loaded import Loaded, load
from probekit.tracing.prompts import bundled_prompts_for
from probekit.validation.transformers import transformers_accepted

QUANTILES = (0.2, 0.5, 0.8)
Run = Callable[[list[int]], tuple[list[int], float | None]]  # prompt ids -> new tokens, acceptance rate


def main(
    model: Annotated[
        str, typer.Argument(help="A bundled name, a folder, a GGUF file or a hub id.")
    ] = "tales-layerskip",
    cell: Annotated[
        list[str] | None, typer.Option(help="Exit layer and draft length, as 3,2; may be repeated.")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="For two-model decoding, with the first cell's length.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1)] = 6,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    compiled: Annotated[bool, typer.Option(help="Also transformers compiled with a static cache.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch. [default: all cores]")] = None,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives OUTPUT.json and .csv.")] = Path("decoding"),
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load(model, device=device, dtype=dtype)
    drafter = load(draft_model, device=device, dtype=dtype) if draft_model else None
    cells = [pair_of(text) for text in cell or ["3,2"]]
    ways = {
        **transformers_ways(loaded, drafter, cells, max_new_tokens, compiled),
        **probekit_ways(loaded, drafter, cells, max_new_tokens),
    }
    texts = [loaded.tokenizer(prompt.text)["input_ids"] for prompt in bundled_prompts_for(loaded.name)[:prompts]]
    table = measure(ways, texts, repeats)
    record = {
        "schema": "probekit/compare-decoding/1", "model": loaded.name, "weights_hash": loaded.weights_hash,
        "drafter": drafter and drafter.name, "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device), "machine": {"processor": platform.machine(), "cores": os.cpu_count(),
                                                  "threads": torch.get_num_threads()},
        "settings": {"prompts": prompts, "max_new_tokens": max_new_tokens, "repeats": repeats, "cells": cells},
        "versions": {name: version(name) for name in ("probekit", "torch", "transformers")},
        "rows": json.loads(table.to_json(orient="records")),
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.4g")
    shown = table[[column for column in table.columns if not column.endswith(("_20", "_80"))]]
    Console(soft_wrap=True).print(shown.to_string(index=False, float_format="%.3f", na_rep="-"), markup=False)


def pair_of(text: str) -> tuple[int, int]:
    exit_layer, _, length = text.partition(",")
    try:
        return int(exit_layer), int(length)
    except ValueError:
        raise InputError(f"--cell is {text!r}; expected an exit layer and a draft length, as 3,2.") from None


def probekit_ways(
    loaded: Loaded, drafter: Loaded | None, cells: Sequence[tuple[int, int]], budget: int
) -> dict[tuple[str, str], Run]:
    def way(method: Decoder) -> Run:
        def run(ids: list[int]) -> tuple[list[int], float | None]:
            decoded = method.decode([ids], max_new_tokens=budget)[0]
            return decoded.tokens, decoded.acceptance_rate

        return run

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
        speed = np.quantile(speeds[engine, method], QUANTILES)
        gain = np.quantile(own[engine] / np.array(spent), QUANTILES)
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
        row |= {f"tokens_per_s_{share * 100:.0f}": value for share, value in zip(QUANTILES, speed, strict=True)}
        row |= {f"speedup_{share * 100:.0f}": value for share, value in zip(QUANTILES, gain, strict=True)}
        against = np.array(seconds[peer]) / np.array(spent) if engine == "probekit" and peer in seconds else None
        row |= {
            f"against_{share * 100:.0f}": None if against is None else float(np.quantile(against, share))
            for share in QUANTILES
        }
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    typer.run(main)
