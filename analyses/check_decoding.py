"""Does every method write the model's own tokens, in the rounds that were predicted? 200 prompts, all exits, float32.

    python analyses/check_decoding.py tales-untied -o docs/results/decoding/checked-tales-untied

Greedy. The prompts are the bundled ones, tales and general text, cut to 200 different beginnings. Prompt i has draft
length 1 + i mod 8. Every exit decodes every prompt, in batches of the prompts of one draft length; and each prompt is
decoded once alone. The draft model, a draft head of few rows and exit heads do the same. Each run is held against the
trace, round by round and token by token; a difference where two logits are closer than the noise is a near-tie, any
other a bug.

Sampled. Counts of a few cells against their expectation, which is exact given the text: measured - predicted, with
joint 95 % intervals of all counts over texts, and their half-widths relative to the prediction. Each of the bundled
prompts is traced a few times, and decoded as often, with other random numbers each time.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from probekit.costs.roofline import roofline_costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.decoder import Decoder
from probekit.decoding.results import Decoded
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.lens.exit_heads import fit_heads
from probekit.models.loaded import Loaded, load
from probekit.models.shipped import TALES
from probekit.prediction.predict import predict
from probekit.settings import Sampling
from probekit.traces.trace import Trace
from probekit.tracing.prompts import as_prompts, bundled_prompts, bundled_prompts_for
from probekit.tracing.self_generated import as_batches, self_generated_texts
from probekit.tracing.tracer import trace
from probekit.validation.differences import differences_from
from probekit.validation.run import validate

LENGTHS = 8  # draft lengths 1..8
DRAFT_ROWS = 256
SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=7)


def main(
    models: Annotated[list[str] | None, typer.Argument(help="[default: the bundled tales models]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives OUTPUT.json.")] = Path("checked"),
    draft_model: Annotated[str, typer.Option(help="With the same tokenizer.")] = "tales-draft",
    prompts: Annotated[int, typer.Option(min=1)] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Sampled texts of each prompt.")] = 6,
) -> None:
    rows = []
    for reference in models or TALES:
        loaded, drafter = (load(name, device="cpu", dtype="float32") for name in (reference, draft_model))
        greedy = check_greedy(loaded, drafter, prompts, max_new_tokens)
        rows.append({"model": loaded.name, "greedy": greedy, "sampled": check_sampled(loaded, drafter, repeats)})
        Console(soft_wrap=True).print_json(json.dumps(rows[-1]))
    record = {
        "schema": "probekit/check-decoding/1",
        "settings": {
            "prompts": prompts, "max_new_tokens": max_new_tokens, "draft_model": draft_model, "draft_rows": DRAFT_ROWS,
            "repeats": repeats, "sampling": vars(SAMPLING), "dtype": "float32", "device": "cpu",
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("probekit", "torch", "transformers")},
        "models": rows,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ greedy text
def cut_prompts(loaded: Loaded, count: int) -> list[list[int]]:
    """Distinct beginnings of the bundled prompts, of 1 token up to all of them."""
    whole = [
        loaded.tokenizer(prompt.text)["input_ids"] for name in ("tales", "general") for prompt in bundled_prompts(name)
    ]
    found: dict[tuple[int, ...], None] = {}
    for turn in range(10_000):
        ids = whole[turn % len(whole)]
        found.setdefault(tuple(ids[: 1 + (len(ids) - 1 + 7 * (turn // len(whole))) % len(ids)]))
        if len(found) == count:
            return [list(each) for each in found]
    raise SystemExit(f"the bundled prompts have no {count} different beginnings.")


def check_greedy(loaded: Loaded, drafter: Loaded, count: int, budget: int) -> dict[str, Any]:
    prompts = cut_prompts(loaded, count)
    order = trace(loaded, prompts[:24], max_new_tokens=budget, statistics="agreement").frequent_tokens()
    traced = trace(
        loaded, prompts, max_new_tokens=budget, statistics="agreement", draft_model=drafter, draft_vocabulary=order
    )
    texts = self_generated_texts(loaded, as_prompts(prompts[:24]))
    heads = fit_heads(loaded.anatomy, as_batches(texts))
    through = trace(loaded, prompts, max_new_tokens=budget, statistics="agreement", exit_heads=heads)
    methods: dict[str, dict[str, int]] = {}
    found, behind = Tally(traced, prompts, methods), Tally(through, prompts, methods)
    for length in range(1, LENGTHS + 1):
        mine = list(range(length - 1, count, LENGTHS))
        for exit_layer in loaded.anatomy.exits:
            found.run("self-speculative, batches", SelfSpeculative(loaded, exit_layer, length), mine)
        for exit_layer in loaded.anatomy.exits[::3]:
            ids = torch.from_numpy(traced.draft_head_ids(DRAFT_ROWS))
            method = SelfSpeculative(loaded, exit_layer, length, draft_vocabulary=ids)
            found.run("draft head, batches", method, mine, DRAFT_ROWS)
            method = SelfSpeculative(loaded, exit_layer, length, exit_head=heads[exit_layer])
            behind.run("exit heads, batches", method, mine)
        found.run("two models, batches", Speculative(loaded, drafter, length), mine)
    for prompt in range(count):
        length = 1 + prompt % LENGTHS
        exit_layer = loaded.anatomy.exits[prompt % len(loaded.anatomy.exits)]
        found.run("self-speculative, alone", SelfSpeculative(loaded, exit_layer, length), [prompt])
        found.run("two models, alone", Speculative(loaded, drafter, length), [prompt])
        found.run("autoregressive, alone", Autoregressive(loaded), [prompt])
    return {"texts": count, "tokens": int(traced.texts["new_tokens"].sum()), "noise": traced.manifest.measured.noise,
            "ended_by_eos": int((traced.texts["ended"] == "eos").sum()), "methods": methods}  # fmt: skip


class Tally:
    """Counts runs, and what is different in them, by method."""

    def __init__(self, traced: Trace, prompts: Sequence[list[int]], methods: dict[str, dict[str, int]]) -> None:
        self.traced = traced
        self.prompts = prompts
        self.table = predict(traced, draft_lengths=range(1, LENGTHS + 1), drafter=traced.manifest.drafter is not None)
        self.methods = methods

    def run(self, name: str, method: Decoder, chosen: Sequence[int], draft_rows: int | None = None) -> None:
        """Decode some prompts together, and hold each against the trace."""
        names = ("runs", "rounds", "tokens", "runs_equal", "near_ties", "unexplained")
        count = self.methods.setdefault(name, dict.fromkeys(names, 0))
        budget = self.traced.manifest.settings.max_new_tokens
        for done in method.decode([self.prompts[at] for at in chosen], max_new_tokens=budget, indices=chosen):
            kinds = self._differences(method, done, draft_rows)
            count["runs"] += 1
            count["rounds"] += done.rounds
            count["tokens"] += len(done.tokens)
            count["runs_equal"] += not kinds
            count["near_ties"] += kinds.count("near-tie")
            count["unexplained"] += len(kinds) - kinds.count("near-tie")

    def _differences(self, method: Decoder, done: Decoded, draft_rows: int | None) -> list[str]:
        """Kinds of what is different: rounds, and tokens from those that the model wrote for the trace, alone."""
        if method.draft_length:
            cell = self.table.cell(method.exit_layer, method.draft_length)
            return [each.kind for each in differences_from(self.traced, done.prompt, cell, done, draft_rows)]
        y, ties = self.traced.outputs(done.prompt).tolist(), self.traced.near_ties(done.prompt)[-1]
        apart = [place for place, (one, other) in enumerate(zip(y, done.tokens, strict=False)) if one != other]
        if apart:
            return ["near-tie" if ties[apart[0]] else "unexplained"]
        return [] if y == done.tokens else ["unexplained"]


# ------------------------------------------------------------------------------------------------ sampled text
def check_sampled(loaded: Loaded, drafter: Loaded, repeats: int) -> dict[str, Any]:
    depth = loaded.depth
    cells = [(max(1, depth // 6), 4), (depth // 2, 2), (depth - 2, 8), (None, 3)]
    prompts = [prompt.text for prompt in bundled_prompts_for(loaded.name)] * repeats
    traced = trace(loaded, prompts, max_new_tokens=64, sampling=SAMPLING, draft_model=drafter)
    costs = roofline_costs(loaded, bandwidth=1e10, flops=1e11, drafter=drafter)  # only counts are asked for here
    found = validate(loaded, traced, cells, drafter=drafter, costs=costs)
    return {
        "texts": len(traced),
        "cells": [
            {
                "exit_layer": cell.exit_layer,
                "draft_length": cell.draft_length,
                "predicted": cell.predicted,
                "measured": cell.measured,
                "difference_interval": cell.differ_interval,
                "half_width": {
                    name: (pair[1] - pair[0]) / 2 / cell.predicted[name]
                    for name, pair in (cell.differ_interval or {}).items()
                    if pair is not None
                },
                "within_interval": cell.within_interval,
            }
            for cell in found.cells
        ],
    }


if __name__ == "__main__":
    typer.run(main)
