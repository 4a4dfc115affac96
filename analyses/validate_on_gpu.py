"""Do the predictions hold at the scale of real models, and how near to the hardware's limit does the decoder come?

    python analyses/validate_on_gpu.py --device cuda
    python analyses/validate_on_gpu.py --device cuda --part study --model path/to/model.gguf
    python analyses/validate_on_gpu.py --device cpu --miniature -o build/gpu-miniature

Shapes of published models with random weights; a dial sets how often the exit agrees. Every record stands beside what
the device itself did in the same run: the rate of a copy and of a matrix product. `--miniature` takes the same way
with shapes that a processor answers for in seconds, to see that the way is clear; its figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from benchmarking import machine, paper_figure, ratios, say, spread, target, timed, turns, versions, write
from transformers import GenerationConfig

from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.costs.roofline import roofline_costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.decoder import Decoder
from probekit.decoding.device_decoding import DeviceAutoregressive, DeviceSelfSpeculative
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.errors import ProbekitError
from probekit.hooks.capture import Capture
from probekit.lens.lens import Lens
from probekit.models.checkpoint import check_device
from probekit.models.loaded import Loaded
from probekit.models.reference import TALES
from probekit.models.synthetic import SHAPES, Shape, synthetic
from probekit.prediction.predict import predict
from probekit.presentation.plots.rounds import predicted_against_measured
from probekit.study.run import run_study
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace
from probekit.validation.results import CellValidation
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted

RESULTS = Path("docs/results/gpu")
GIB = 2**30
Way = Callable[[], Any]


class Part(StrEnum):
    COSTS = "costs"
    CELLS = "cells"
    TUTORIAL = "tutorial"
    STUDY = "study"


@dataclass(frozen=True)
class Plan:
    """What is run. Lengths in tokens; `shapes` by the name that they have in tables, the largest first.

    shares: E/L. dials: factors on what the layers behind the exit write; the lower, the more is accepted.
    tutorial_exit: the exit of the setting that the drafter, the last of the shapes, is tried in.
    """

    device: str
    dtype: str
    shapes: dict[str, Shape]
    shares: tuple[float, ...] = (1 / 8, 1 / 4)
    dials: tuple[float, ...] = (0.02, 0.05, 0.15)
    draft_lengths: tuple[int, ...] = (2, 4, 8)
    contexts: tuple[int, ...] = (128, 1024, 8192)
    prompts: int = 3
    prompt_tokens: int = 16
    new_tokens: int = 64
    repeats: int = 2
    sweeps: int | None = None
    tutorial_exit: int = 6
    tutorial_prompt: int = 5
    tutorial_tokens: int = 100
    tutorial_repeats: int = 5
    copied_bytes: int = 2 * GIB
    product_width: int = 8192


def full(device: str, dtype: str | None) -> Plan:
    return Plan(device, dtype or "bfloat16", {"8B": SHAPES["llama-3-8b"], "1B": SHAPES["llama-3.2-1b"]})


def miniature(device: str, dtype: str | None) -> Plan:
    large = Shape(8, 32, 48, 4, 2, 64, 96, 8)
    return Plan(
        device, dtype or "float32", {"large": large, "small": replace(large, layers=4, tied=True)},
        shares=(1 / 4,), dials=(0.1, 0.6), draft_lengths=(2, 4), contexts=(8, 96), prompts=2, prompt_tokens=4,
        new_tokens=12, repeats=1, sweeps=2, tutorial_exit=2, tutorial_tokens=12, tutorial_repeats=2,
        copied_bytes=2**22, product_width=128,
    )  # fmt: skip


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu.")] = "cuda",
    dtype: Annotated[str | None, typer.Option(help="Of the shapes; bfloat16 by default.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="May be repeated; all by default.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Real weights for the study; the bundled models by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of the study.")] = 96,
    mini: Annotated[bool, typer.Option("--miniature", help="Tiny shapes: is the way clear?")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the records.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("build/gpu"),
) -> None:
    try:
        check_device(device)
        plan = (miniature if mini else full)(device, dtype)
        parts = list(dict.fromkeys(part or Part))
        rates = measured_rates(plan)
        for name in parts:
            began = time.perf_counter()
            if name is Part.STUDY:
                found = study(plan, model or list(TALES), work, max_new_tokens)
            else:
                found = {Part.COSTS: costs, Part.CELLS: cells, Part.TUTORIAL: tutorial}[name](plan, rates)
            record = header(name, plan, rates, mini) | found | {"seconds": time.perf_counter() - began}
            write(output / f"{name}.json", record)
        draw(output)
    except ProbekitError as error:
        say(f"error: {error}")
        raise typer.Exit(error.exit_status) from None


def header(name: str, plan: Plan, rates: dict[str, list[float]], mini: bool) -> dict[str, Any]:
    settings = asdict(plan) | {"miniature": mini}
    return {
        "schema": f"probekit/gpu-{name}/1",
        "machine": machine(torch.device(plan.device).type),
        "versions": versions(),
        "settings": settings,
        "rates": {each: spread(samples) for each, samples in rates.items()},
    }


# ------------------------------------------------------------------------------------------------- the hardware
def measured_rates(plan: Plan) -> dict[str, list[float]]:
    """copy: bytes read and written a second; product: sums and products a second, of square matrices."""
    dtype = getattr(torch, plan.dtype)
    here = torch.zeros(plan.copied_bytes, dtype=torch.uint8, device=plan.device)
    there = torch.empty_like(here)
    left, right = torch.randn(2, plan.product_width, plan.product_width, device=plan.device).to(dtype)
    out = torch.empty_like(left)

    def rate(work: Way, amount: float) -> list[float]:
        for _ in range(3):
            work()
        return [amount / timed(work, plan.device)[0] for _ in range(20)]

    found = {
        "copy": rate(lambda: there.copy_(here), 2 * plan.copied_bytes),
        "product": rate(lambda: torch.mm(left, right, out=out), 2 * plan.product_width**3),
    }
    say(f"copy {np.median(found['copy']) / 1e9:.1f} GB/s, product {np.median(found['product']) / 1e12:.3f} TFLOP/s")
    return found


def on_a_roof(loaded: Loaded, rates: dict[str, list[float]], context: int, longest: int, **more: Any) -> Costs:
    """The least that each step can take at the rates that were measured here."""
    roof = {"bandwidth": float(np.median(rates["copy"])), "flops": float(np.median(rates["product"]))}
    dtype = str(loaded.dtype)
    return roofline_costs(loaded, context=context, longest_draft=longest, dtype=dtype, **roof | more)


# ------------------------------------------------------------------------------------------------------ the models
def exit_at(shape: Shape, share: float) -> int:
    return max(1, round(shape.layers * share))


def built(plan: Plan, name: str, exit_layer: int, dial: float = 1.0) -> Loaded:
    """Random weights in a shape; whatever stood there before is let go."""
    gc.collect()
    torch.cuda.empty_cache()
    say(f"{name}: exit {exit_layer} of {plan.shapes[name].layers}, dial {dial:g}")
    loaded = synthetic(plan.shapes[name], dial=dial, exit_layer=exit_layer, dtype=plan.dtype, device=plan.device)
    return replace(loaded, name=name)


def prompts_of(loaded: Loaded, count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, loaded.anatomy.vocabulary, (count, tokens), generator=generator).tolist()


# ------------------------------------------------------------------------------------------------- part: costs
def costs(plan: Plan, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Each step at each context, measured, beside its roofline; and what share of the copy's bandwidth a step has."""
    rows, targets = [], []
    longest = max(plan.draft_lengths)
    for name, shape in plan.shapes.items():
        exits = [exit_at(shape, share) for share in plan.shares]
        loaded = built(plan, name, exits[0])
        for wanted in plan.contexts:
            context = min(wanted, loaded.anatomy.context - longest - 1)
            found = measure_costs(
                loaded, context, exit_layers=exits, draft_lengths=plan.draft_lengths, repeats=plan.sweeps
            )
            roof = on_a_roof(loaded, rates, context, longest)
            rows += steps_of(plan, name, found, roof, exits)
            moved = on_a_roof(loaded, rates, context, longest, bandwidth=1.0, flops=math.inf).autoregressive_s
            shares = [moved / seconds / np.median(rates["copy"]) for seconds in found.quantiles["autoregressive"]]
            rows.append(
                {"model": name, "context": context, "step": "share of the copy's bandwidth", "bytes": moved}
                | dict(zip(("p20", "p50", "p80"), sorted(shares), strict=True))
            )
            if name == next(iter(plan.shapes)) and wanted == plan.contexts[0]:
                what = f"autoregressive step of {name} at {context} tokens: share of the copy's bandwidth"
                targets.append(target(what, shares, at_least=0.8))
    return {"rows": rows, "targets": targets}


def steps_of(plan: Plan, name: str, found: Costs, roof: Costs, exits: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row a step: seconds as measured, their quantiles, and the roofline's."""
    rows = [1 + length for length in plan.draft_lengths]
    steps = [("autoregressive", found.autoregressive_s, roof.autoregressive_s)]
    for exit_layer in exits:
        steps.append((f"early {exit_layer}", found.early_s[exit_layer], roof.early_s[exit_layer]))
        steps.append((f"head {exit_layer}", found.heads_s[exit_layer], roof.head_s))
        for count in rows:
            here = exit_layer, count
            steps.append((f"verify {exit_layer} {count}", found.verify_s[here], roof.verify_s[here]))
    for step, seconds, least in steps:
        row = {"model": name, "context": found.context, "step": step, "seconds": seconds, "roofline_s": least}
        times = found.quantiles.get(step)
        yield row | (dict(zip(("p20", "p50", "p80"), times, strict=True)) if times else {})


# ------------------------------------------------------------------------------------------------- part: cells
def cells(plan: Plan, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Predicted and measured acceptance, tokens per round and speedup, over shapes, exits, dials and draft lengths."""
    rows: list[dict[str, Any]] = []
    for name, shape in plan.shapes.items():
        for share in plan.shares:
            exit_layer, times = exit_at(shape, share), None
            for dial in plan.dials:
                loaded = built(plan, name, exit_layer, dial)
                if times is None:  # they do not depend on the dial
                    middle = plan.prompt_tokens + plan.new_tokens // 2
                    times = measure_costs(
                        loaded, middle, exit_layers=[exit_layer], draft_lengths=plan.draft_lengths, repeats=plan.sweeps
                    )
                    roof = on_a_roof(loaded, rates, middle, max(plan.draft_lengths))
                prompts = prompts_of(loaded, plan.prompts, plan.prompt_tokens)
                run = trace(loaded, prompts, max_new_tokens=plan.new_tokens, statistics=statistics_for(loaded))
                pairs = [(exit_layer, length) for length in plan.draft_lengths]
                checked = validate(loaded, run, pairs, costs=times, repeats=plan.repeats)
                rows += [
                    {"share": share, "dial": dial} | row_of(name, loaded, run, cell, roof) for cell in checked.cells
                ]
    return {"rows": rows, "targets": targets_of_cells(plan, rows)}


def statistics_for(loaded: Loaded) -> str:
    """Where the decoder rounds its logits, the trace must know the argmax after rounding."""
    return "agreement" if loaded.dtype == torch.float32 else "all"


def row_of(name: str, loaded: Loaded, run: Trace, cell: CellValidation, roof: Costs) -> dict[str, Any]:
    assert cell.exit_layer is not None
    table = predict(run, [cell.exit_layer], [cell.draft_length]).cell(cell.exit_layer, cell.draft_length)
    step = roof.autoregressive_s * cell.predicted["tokens"]
    document = cell.to_json()
    document["differences"] = [
        each | margins(loaded, run, cell.exit_layer, each["prompt"], each["output"]) for each in document["differences"]
    ]
    return {
        "model": name,
        "depth": loaded.depth,
        **document,
        "alpha_predicted": table.alpha,
        "tokens_per_round_predicted": cell.predicted["tokens"] / cell.predicted["rounds"],
        "tokens_per_round_measured": cell.measured["tokens"] / cell.measured["rounds"],
        "speedup_ideal": step / (cell.predicted["rounds"] * roof.round_seconds(cell.exit_layer, cell.draft_length)),
    }


@torch.inference_mode()
def margins(loaded: Loaded, run: Trace, exit_layer: int, prompt: int, output: int) -> dict[str, float]:
    """How far apart the two top logits of the exit and of the model are at an output of the traced text."""
    parts = loaded.anatomy
    ids = [*run.prompt_ids(prompt).tolist(), *run.outputs(prompt)[:output].tolist()]
    with Capture(parts, [exit_layer, parts.depth]) as capture:
        parts.decoder(input_ids=torch.tensor([ids], device=loaded.device), use_cache=False)
    found = {}
    for who, site in (("exit", exit_layer), ("model", parts.depth)):
        first, second = Lens(parts)(capture[site][0, -1:], site)[0].topk(2).values.tolist()
        found[f"{who}_margin"] = first - second
    return found


def targets_of_cells(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The judgement: how wide predictions miss, and the gain where four drafts in five are accepted."""
    misses = [abs(row["speedup_predicted"] / row["speedup_measured"] - 1) for row in rows]
    found = [target("widest miss of a predicted speedup", [max(misses)], at_most=0.05)]
    largest = next(iter(plan.shapes))
    near = [row for row in rows if row["model"] == largest and row["share"] == min(plan.shares)]
    alphas = {row["dial"]: row["alpha_predicted"] for row in near if row["alpha_predicted"] is not None}
    if alphas:
        dial = min(alphas, key=lambda dial: abs(alphas[dial] - 0.8))
        best = max((row for row in near if row["dial"] == dial), key=lambda row: row["speedup_measured"])
        what = f"speedup of {largest} at E/L {best['share']:g} and alpha {alphas[dial]:.2f} (asked for at .80)"
        found.append(target(what, [best["speedup_measured"]], at_least=1.7))
    return found


# ------------------------------------------------------------------------------------------------- part: tutorial
def tutorial(plan: Plan, rates: dict[str, list[float]]) -> dict[str, Any]:
    """One short prompt, the large shape, the small one as its drafter: every way of decoding, in turns.

    The drafter's weights know nothing of the large shape's, so that hardly any of its drafts is accepted: what it
    shows is what such a round costs.
    """
    large, small = next(iter(plan.shapes)), list(plan.shapes)[-1]
    loaded = built(plan, large, plan.tutorial_exit, sorted(plan.dials)[len(plan.dials) // 2])
    drafter = replace(synthetic(plan.shapes[small], dtype=plan.dtype, device=plan.device, seed=1), name=small)
    (ids,) = prompts_of(loaded, 1, plan.tutorial_prompt)
    ways = {**our_ways(plan, loaded, drafter, ids), **their_ways(plan, loaded, drafter, ids)}
    tokens = {name: way() for name, way in ways.items()}  # to warm up, and to compile where that is done
    seconds = turns(ways, plan.tutorial_repeats, plan.device)
    plain = seconds["autoregressive"]
    rows = [
        {
            "model": large, "drafter": small, "way": name,
            "same_tokens": tokens[name] == tokens["autoregressive"],
            "tokens_per_s": spread([plan.tutorial_tokens / each for each in spent]),
            "speedup_end_to_end": spread(ratios(plain, spent)),
        }
        for name, spent in seconds.items()
    ]  # fmt: skip
    ours = min(
        (name for name in ways if name.startswith("self-speculative")), key=lambda name: np.median(seconds[name])
    )
    theirs = min((name for name in ways if "early exit" in name), key=lambda name: np.median(seconds[name]))
    static = seconds["transformers, static cache"]
    targets = [
        target(f"{ours} against transformers with a static cache", ratios(static, seconds[ours]), at_least=1.0),
        target(f"{ours} against {theirs}", ratios(seconds[theirs], seconds[ours]), at_least=3.0),
    ]
    return {"rows": rows, "targets": targets, "predicted": tutorial_predicted(plan, loaded, drafter, ids, rates)}


def tutorial_predicted(
    plan: Plan, loaded: Loaded, drafter: Loaded, ids: list[int], rates: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """The same setting as cells: the exit, and the drafter."""
    statistics = statistics_for(loaded)
    run = trace(loaded, [ids], max_new_tokens=plan.tutorial_tokens, statistics=statistics, draft_model=drafter)
    pairs = [(exit_layer, length) for exit_layer in (plan.tutorial_exit, None) for length in plan.draft_lengths]
    middle = plan.tutorial_prompt + plan.tutorial_tokens // 2
    times = measure_costs(
        loaded, middle, exit_layers=[plan.tutorial_exit], draft_lengths=plan.draft_lengths, drafter=drafter,
        repeats=plan.sweeps,
    )  # fmt: skip
    checked = validate(loaded, run, pairs, drafter=drafter, costs=times, repeats=plan.repeats)
    return [{"model": loaded.name, "depth": loaded.depth, **cell.to_json()} for cell in checked.cells]


def our_ways(plan: Plan, loaded: Loaded, drafter: Loaded, ids: list[int]) -> dict[str, Way]:
    methods: dict[str, Decoder] = {
        "autoregressive": Autoregressive(loaded),
        "autoregressive, rounds of the device": DeviceAutoregressive(loaded),
    }
    for length in plan.draft_lengths:
        here = plan.tutorial_exit, length
        methods[f"self-speculative {plan.tutorial_exit},{length}"] = SelfSpeculative(loaded, *here)
        methods[f"self-speculative {plan.tutorial_exit},{length}, rounds of the device"] = DeviceSelfSpeculative(
            loaded, *here
        )
    methods[f"two models, {plan.draft_lengths[0]} drafts"] = Speculative(loaded, drafter, plan.draft_lengths[0])

    def way(method: Decoder) -> Way:
        return lambda: method.decode([ids], max_new_tokens=plan.tutorial_tokens)[0].tokens

    return {name: way(method) for name, method in methods.items()}


def their_ways(plan: Plan, loaded: Loaded, drafter: Loaded, ids: list[int]) -> dict[str, Way]:
    """transformers: alone, with a static cache (which it compiles on a GPU), assisted, and by early exit."""
    inputs = torch.tensor([ids], device=loaded.device)
    length = plan.draft_lengths[0]

    def way(cache: str | None = None, **more: Any) -> Way:
        config = GenerationConfig(
            max_new_tokens=plan.tutorial_tokens, do_sample=False, pad_token_id=0, cache_implementation=cache
        )

        def run() -> list[int]:
            mask = torch.ones_like(inputs)
            output = loaded.model.generate(inputs, attention_mask=mask, generation_config=config, **more)
            return output[0, len(ids) :].tolist()

        return run

    drafter.model.generation_config.update(
        num_assistant_tokens=length, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    ways = {
        "transformers": way(),
        "transformers, static cache": way("static"),
        f"transformers, assisted, {length} drafts": way(assistant_model=drafter.model),
    }
    for drafts in plan.draft_lengths:
        ways[f"transformers, early exit {plan.tutorial_exit},{drafts}"] = lambda drafts=drafts: (
            transformers_accepted(loaded, ids, plan.tutorial_exit, drafts, plan.tutorial_tokens).tokens
        )
    return ways


# ------------------------------------------------------------------------------------------------- part: study
def study(plan: Plan, models: Sequence[str], folder: Path, max_new_tokens: int) -> dict[str, Any]:
    """The main job on real weights: chosen on even prompts, validated on odd ones."""
    found = run_study(
        models, folder / "study", device=plan.device, max_new_tokens=max_new_tokens,
        progress=lambda phase, done, total, **_: say(f"  {phase}: {done} of {total}"),
    ).summary  # fmt: skip
    rows = [
        {key: each[key] for key in ("name", "anatomy", "sentence", "choice", "validation", "seconds")}
        for each in found["models"]
    ]
    return {"rows": rows}


# ------------------------------------------------------------------------------------------------- the figure
def draw(folder: Path) -> None:
    """Predicted against measured speedup of every cell on record."""
    path = folder / "cells.json"
    if not path.is_file():
        return
    cells = json.loads(path.read_text(encoding="utf-8"))["rows"]
    frame = pd.DataFrame([{name: row[name] for name in ("speedup_predicted", "speedup_measured")} for row in cells])
    frame["model"] = [f"{row['model']}, exit {row['exit_layer']} of {row['depth']}" for row in cells]
    frame[["speedup_measured_20", "speedup_measured_80"]] = [row["speedup_measured_quantiles"] for row in cells]
    with paper_figure(folder, "predicted_and_measured", 3.35, 3.2) as figure:
        axes = figure.subplots()
        predicted_against_measured(frame, "speedup", ax=axes)
        axes.get_legend().set_loc("lower right")  # where speculation was expected to gain more than it did


if __name__ == "__main__":
    typer.run(main)
