"""How often do 95 % intervals over few prompts hold the truth?

    python analyses/coverage_of_intervals.py [MODEL ...] -o docs/results/science/coverage_of_intervals

A population of some 280 prompts is made of the bundled ones: each goes on with what the model itself says after it, at
temperature 1, cut after 4 to 23 tokens. The trace of all of them is the truth. Samples of 4 to 48 prompts are drawn
from it, an interval is made of each, and counted is how many hold the figure of the whole population: acceptance rate
and tokens per round of several cells, and what one exit has more of than another, prompt by prompt. Beside the
intervals that probekit gives stand the percentiles that it gave before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from probekit.models.loaded import Loaded, load
from probekit.models.shipped import TALES
from probekit.prediction.intervals import Share, bootstrap_ratio, difference, draws, spread
from probekit.prediction.predict import predict
from probekit.settings import Sampling
from probekit.traces.trace import Trace
from probekit.tracing.prompts import bundled_prompts_for
from probekit.tracing.tracer import trace

SIZES = (4, 8, 12, 24, 48)
LENGTHS = (2, 4, 8)
TOKENS = 64
SEEDS = 12


def population(loaded: Loaded, seeds: int = SEEDS) -> Trace:
    """The greedy trace of many prompts that begin like the bundled ones."""
    prompts = []
    for seed in range(seeds):
        begun = trace(
            loaded, bundled_prompts_for(loaded.name), max_new_tokens=24, sampling=Sampling(1.0, seed=seed),
            statistics="agreement", top_prompts=0,
        )  # fmt: skip
        for prompt in begun.prompts:
            ids, said = begun.prompt_ids(prompt).tolist(), begun.outputs(prompt).tolist()
            said = said[: 4 + (7 * seed + prompt) % 20]
            if loaded.tokenizer.eos_token_id not in said:
                prompts.append([*ids, *said])
    return trace(loaded, prompts, max_new_tokens=TOKENS, statistics="agreement", top_prompts=0)


def figures(whole: Trace) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, numerators, denominators), (prompts,) each, of the cells at three depths."""
    exits = sorted({1, whole.depth // 4, whole.depth // 2, whole.depth - 1})
    for cell in predict(whole, exits, LENGTHS, drafter=False).cells:
        at = f"exit {cell.exit_layer}, {cell.draft_length} drafts"
        yield f"acceptance rate, {at}", cell.accepted_of_prompt, cell.drafted_of_prompt
        yield f"tokens per round, {at}", cell.tokens_of_prompt, cell.rounds_of_prompt


def percentiles(above: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What was given before: 2.5 % and 97.5 % of the ratios of drawn prompts. (samples,) each."""
    times = draws(above.shape[1])
    return spread((above @ times.T) / np.maximum(below @ times.T, 1e-12))


def coverage(whole: Trace, sizes: tuple[int, ...] = SIZES, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Columns: figure, prompts, kind ("bootstrap-t", "percentile", "difference"), coverage, width (median)."""
    random = np.random.default_rng(seed)
    every = [(name, above.astype(float), below.astype(float)) for name, above, below in figures(whole)]
    rows = []
    for size in sizes:
        taken = random.integers(len(whole), size=(samples, size))
        for place, (name, above, below) in enumerate(every):
            kinds = {
                "bootstrap-t": bootstrap_ratio(above[taken], below[taken]),
                "percentile": percentiles(above[taken], below[taken]),
            }
            truths = dict.fromkeys(kinds, above.sum() / below.sum())
            apart = 2 * len(LENGTHS)
            if place + apart < len(every):  # the same figure at the next exit, prompt by prompt
                _, other, beneath = every[place + apart]
                prompts = tuple(range(size))
                pair = difference(
                    Share(above[taken], below[taken], prompts), Share(other[taken], beneath[taken], prompts)
                )
                kinds["difference"] = pair.low, pair.high
                truths["difference"] = truths["bootstrap-t"] - other.sum() / beneath.sum()
            for kind, (low, high) in kinds.items():
                held = (low <= truths[kind]) & (truths[kind] <= high)
                row = {"figure": name, "prompts": size, "kind": kind, "coverage": held.mean(),
                       "width": np.nanmedian(high - low)}  # fmt: skip
                rows.append(row)
    return pd.DataFrame(rows)


def main(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL ...]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives OUTPUT.json and .csv.")] = Path(
        "build/analyses/coverage_of_intervals"
    ),
    samples: Annotated[int, typer.Option("--samples", min=100)] = 1000,
) -> None:
    """How often do 95 % intervals over few prompts hold the truth?"""
    parts = []
    for name in models or TALES:
        whole = population(load(name))
        parts.append(coverage(whole, samples=samples).assign(model=Path(name).name, population=len(whole)))
    table = pd.concat(parts, ignore_index=True)
    summary = table.groupby(["kind", "prompts"])["coverage"].agg(["mean", "min", "count"]).reset_index()
    output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.4g")
    record = {
        "schema": "probekit/coverage/1",
        "settings": {"samples": samples, "sizes": SIZES, "draft_lengths": LENGTHS, "max_new_tokens": TOKENS,
                     "seeds": SEEDS, "device": "cpu", "dtype": "float32"},
        "versions": {package: version(package) for package in ("probekit", "torch", "transformers", "numpy", "scipy")},
        "populations": table.groupby("model")["population"].first().to_dict(),
        "summary": json.loads(summary.to_json(orient="records", double_precision=4)),
    }  # fmt: skip
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(summary.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    typer.run(main)
