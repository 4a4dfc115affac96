"""The cells of `validate_on_gpu.py`, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import ratios, spread, turns
from gpu_device import MODELS, Way, exit_at, micro, on_a_roof, prompts_of, seconds_of, smoke
from gpu_plan import Cell, Part, Plan
from transformers import GenerationConfig

from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.decoder import Decoder
from probekit.decoding.device_decoding import DeviceAutoregressive, DeviceSelfSpeculative
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.hooks.capture import Capture
from probekit.lens.chunked import StatisticsPlan, layer_statistics
from probekit.lens.lens import Lens
from probekit.models.loaded import Loaded
from probekit.models.synthetic import synthetic
from probekit.prediction.predict import predict
from probekit.study.run import run_study
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace
from probekit.validation.results import CellValidation
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted


def all_cells(plan: Plan, work: Path) -> list[Cell]:
    """Every cell in the order in which it is run."""
    return [
        *smoke(plan), *micro(plan), *costs(plan), *cells(plan), *peers(plan),
        *(Cell(Part.WEIGHTS, name, partial(weights, plan, name, work)) for name in plan.weights),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- part 3: costs
def costs(plan: Plan) -> Iterator[Cell]:
    for name in plan.shapes:
        for context in plan.contexts:
            yield Cell(Part.COSTS, f"{name} at {context}", partial(costs_at, plan, name, context))
        yield Cell(Part.COSTS, f"{name}, profile", partial(profile, plan, name))


def costs_at(plan: Plan, name: str, wanted: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """Each step, measured, beside its roofline; and what share of the copy's bandwidth an autoregressive one has."""
    exits = [exit_at(plan.shapes[name], share) for share in plan.shares]
    loaded = MODELS.get(plan, name, exits[0])
    longest = max(plan.draft_lengths)
    context = min(wanted, loaded.anatomy.context - longest - 1)
    setting = {"exit_layers": exits, "draft_lengths": plan.draft_lengths, "repeats": plan.sweeps}
    found = measure_costs(loaded, context, engine=plan.engine, **setting)
    roof = on_a_roof(plan, loaded, known, context)
    moved = on_a_roof(plan, loaded, known, context, bandwidth=1.0, flops=math.inf).autoregressive_s
    copy = known["smoke"]["rates"]["copy"]["p50"]
    shares = sorted(moved / seconds / copy for seconds in found.quantiles["autoregressive"])
    return {
        "model": name, "context": context, "bytes": moved, "fused": runs_fused(loaded),
        "share_of_copy": dict(zip(("p20", "p50", "p80"), shares, strict=True)),
        "steps": list(steps_of(plan, found, roof, exits)), "costs": found.to_json(),
    }  # fmt: skip


def runs_fused(loaded: Loaded) -> bool:
    """Whether the recorded rounds of a model are those of the fused kernels."""
    return "recordings" in loaded.kept and loaded.kept["recordings"].engine.fused is not None


def steps_of(plan: Plan, found: Costs, roof: Costs, exits: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row a step: seconds as measured, their quantiles, and the roofline's."""
    steps = [("autoregressive", found.autoregressive_s, roof.autoregressive_s)]
    for exit_layer in exits:
        steps.append((f"early {exit_layer}", found.early_s[exit_layer], roof.early_s[exit_layer]))
        steps.append((f"head {exit_layer}", found.heads_s[exit_layer], roof.head_s))
        for length in plan.draft_lengths:
            here = exit_layer, length
            steps.append((f"round {exit_layer} {length}", found.round_seconds(*here), roof.round_seconds(*here)))
    for step, seconds, least in steps:
        times = found.quantiles.get(step)
        row = {"step": step, "seconds": seconds, "roofline_s": least}
        yield row | (dict(zip(("p20", "p50", "p80"), times, strict=True)) if times else {})


def profile(plan: Plan, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """What a step of recorded autoregressive decoding is made of: the kernels that take longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    loaded = MODELS.get(plan, name, exit_at(plan.shapes[name], plan.shares[0]))
    method, prompts = DeviceAutoregressive(loaded), prompts_of(loaded, 1, plan.prompt_tokens)
    method.decode(prompts, max_new_tokens=plan.new_tokens)
    cuda = torch.device(plan.device).type == "cuda"
    with profiled(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        method.decode(prompts, max_new_tokens=plan.new_tokens)
    spent = [(each.key, each.count, each.device_time_total if cuda else each.self_cpu_time_total)
             for each in seen.key_averages()]  # fmt: skip
    top = sorted(spent, key=lambda each: -each[2])[:20]
    steps = plan.new_tokens - 1
    return {
        "kernels_per_step": sum(count for _, count, _ in spent) / steps,
        "kernels": [{"name": key, "per_step": count / steps, "us_per_step": us / steps} for key, count, us in top],
    }


# ------------------------------------------------------------------------------------------------- part 4: cells
def cells(plan: Plan) -> Iterator[Cell]:
    for name, shape in plan.shapes.items():
        for share in plan.shares:
            yield Cell(Part.CELLS, f"costs {name} {share:g}", partial(cell_costs, plan, name, exit_at(shape, share)))
            for dial in plan.dials:
                yield Cell(Part.CELLS, f"{name} {share:g} {dial:g}", partial(dialled, plan, name, share, dial))


def cell_costs(plan: Plan, name: str, exit_layer: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the steps cost in the middle of the cells' texts; the dial does not change it."""
    loaded = MODELS.get(plan, name, exit_layer, plan.dials[0])
    middle = plan.prompt_tokens + plan.new_tokens // 2
    setting = {"exit_layers": [exit_layer], "draft_lengths": plan.draft_lengths, "repeats": plan.sweeps}
    return {"costs": measure_costs(loaded, middle, engine=plan.engine, **setting).to_json()}


def dialled(plan: Plan, name: str, share: float, dial: float, known: Mapping[str, Any]) -> dict[str, Any]:
    """Acceptance, tokens per round and speedup, predicted and measured, of every draft length."""
    exit_layer = exit_at(plan.shapes[name], share)
    times = Costs.from_json(known["cells"][f"costs {name} {share:g}"]["costs"])
    loaded = MODELS.get(plan, name, exit_layer, dial)
    roof = on_a_roof(plan, loaded, known, times.context)
    prompts = prompts_of(loaded, plan.prompts, plan.prompt_tokens)
    run = trace(loaded, prompts, max_new_tokens=plan.new_tokens, statistics=statistics_for(loaded))
    pairs = [(exit_layer, length) for length in plan.draft_lengths]
    checked = validate(loaded, run, pairs, costs=times, repeats=plan.repeats, engine=plan.engine)
    every = margins(loaded, run, exit_layer)
    rows = [{"share": share, "dial": dial} | row_of(name, loaded, run, cell, roof, every) for cell in checked.cells]
    return {"rows": rows, "margins": {who: quantiles(found) for who, found in margins_of(every).items()}}


def statistics_for(loaded: Loaded) -> str:
    """Where the decoder rounds its logits, the trace must know the argmax after rounding."""
    return "agreement" if loaded.dtype == torch.float32 else "all"


def row_of(
    name: str, loaded: Loaded, run: Trace, cell: CellValidation, roof: Costs, every: Mapping[int, Any]
) -> dict[str, Any]:
    assert cell.exit_layer is not None
    table = predict(run, [cell.exit_layer], [cell.draft_length]).cell(cell.exit_layer, cell.draft_length)
    step = roof.autoregressive_s * cell.predicted["tokens"]
    document = cell.to_json()
    document["differences"] = [
        each | flip_of(every, each["prompt"], each["output"]) for each in document["differences"]
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
def margins(loaded: Loaded, run: Trace, exit_layer: int) -> dict[int, dict[str, list[float]]]:
    """{prompt: {"exit", "model": of each output of the traced text, how far apart the two top logits are}}."""
    parts, found = loaded.anatomy, {}
    for prompt in run.prompts:
        ids = [*run.prompt_ids(prompt).tolist(), *run.outputs(prompt).tolist()]
        first = len(run.prompt_ids(prompt)) - 1
        with Capture(parts, [exit_layer, parts.depth]) as capture:
            parts.decoder(input_ids=torch.tensor([ids], device=loaded.device), use_cache=False)
        found[prompt] = {}
        for who, site in (("exit", exit_layer), ("model", parts.depth)):
            top = Lens(parts)(capture[site][0, first:-1], site).topk(2).values
            found[prompt][who] = (top[:, 0] - top[:, 1]).tolist()
    return found


def margins_of(every: Mapping[int, Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    return {who: [each for found in every.values() for each in found[who]] for who in ("exit", "model")}


def quantiles(found: Sequence[float]) -> dict[str, float]:
    shares = (0.01, 0.05, 0.25, 0.5, 0.75)
    return {f"p{100 * share:g}": float(each) for share, each in zip(shares, np.quantile(found, shares), strict=True)}


def flip_of(every: Mapping[int, Mapping[str, Sequence[float]]], prompt: int, output: int) -> dict[str, Any]:
    """The margins where a round or a token differs, and the share of all positions whose margins are as small.

    A flip among the least margins is rounding; one at an ordinary margin is a bug, whatever a bound on noise says.
    """
    found: dict[str, Any] = {}
    for who, all_of_them in margins_of(every).items():
        own = every[prompt][who]
        if output < len(own):
            found[f"{who}_margin"] = own[output]
            found[f"{who}_margin_quantile"] = float(np.mean(np.array(all_of_them) <= own[output]))
    return found


# ------------------------------------------------------------------------------------------------- part 5: peers
def peers(plan: Plan) -> Iterator[Cell]:
    yield Cell(Part.PEERS, "decoding", lambda known: tutorial(plan))
    yield Cell(Part.PEERS, "lens", partial(lens_beside_peers, plan))


def tutorial(plan: Plan) -> dict[str, Any]:
    """One short prompt, the large shape, the small one as its drafter: every way of decoding, in turns.

    The drafter's weights know nothing of the large shape's, so that hardly any of its drafts is accepted: what it
    shows is what such a round costs.
    """
    large, small = next(iter(plan.shapes)), list(plan.shapes)[-1]
    loaded = MODELS.get(plan, large, plan.tutorial_exit, sorted(plan.dials)[len(plan.dials) // 2])
    drafter = replace(synthetic(plan.shapes[small], dtype=plan.dtype, device=plan.device, seed=1), name=small)
    (ids,) = prompts_of(loaded, 1, plan.tutorial_prompt)
    ways = {**our_ways(plan, loaded, drafter, ids), **their_ways(plan, loaded, drafter, ids)}
    tokens = {name: way() for name, way in ways.items()}  # to warm up, to record, and to compile where that is done
    seconds = turns(ways, plan.tutorial_repeats, plan.device)
    rows = [
        {
            "model": large, "drafter": small, "way": name,
            "same_tokens": tokens[name] == tokens["autoregressive"],
            "tokens_per_s": spread([plan.tutorial_tokens / each for each in spent]),
            "speedup_end_to_end": spread(ratios(seconds["autoregressive"], spent)),
            "speedup_over_recorded": spread(ratios(seconds["autoregressive, recorded"], spent)),
        }
        for name, spent in seconds.items()
    ]  # fmt: skip
    return {"rows": rows, "samples": seconds}


def our_ways(plan: Plan, loaded: Loaded, drafter: Loaded, ids: list[int]) -> dict[str, Way]:
    methods: dict[str, Decoder] = {
        "autoregressive": Autoregressive(loaded),
        "autoregressive, recorded": DeviceAutoregressive(loaded),
    }
    for length in reversed(plan.draft_lengths):  # the longest first: its buffers serve the others
        here = plan.tutorial_exit, length
        methods[f"self-speculative {plan.tutorial_exit},{length}"] = SelfSpeculative(loaded, *here)
        methods[f"self-speculative {plan.tutorial_exit},{length}, recorded"] = DeviceSelfSpeculative(loaded, *here)
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


@torch.inference_mode()
def lens_beside_peers(plan: Plan, known: Mapping[str, Any]) -> dict[str, Any]:
    """Every layer's statistics of so many rows: ours, and torch's own reductions of each layer's logits.

    share_of_product: of the rate of the square product, if each row of each layer is multiplied with the head once.
    """
    name = next(iter(plan.shapes))
    loaded = MODELS.get(plan, name, plan.tutorial_exit)
    parts = loaded.anatomy
    rows = max(1, plan.lens_rows // parts.depth)
    residuals = torch.randn(parts.depth + 1, rows, parts.width, device=plan.device).to(parts.dtype)
    ids = torch.zeros(rows, dtype=torch.long, device=plan.device)

    def ours(mode: str) -> Way:
        chosen = StatisticsPlan(lenses=("final-norm",), mode=mode)  # type: ignore[arg-type]
        return lambda: layer_statistics(parts, residuals, ids, ids, chosen)

    def plain() -> None:
        last = parts.head(parts.norm(residuals[-1])).float().log_softmax(-1)
        for layer in range(parts.depth + 1):
            found = parts.head(parts.norm(residuals[layer])).float().log_softmax(-1)
            _ = found.argmax(-1), (found.exp() * found).sum(-1), (last.exp() * (last - found)).sum(-1)

    ways = {"all statistics": ours("all"), "agreement": ours("agreement"), "torch: argmax, entropy, KL": plain}
    found = {each: seconds_of(plan, way) for each, way in ways.items()}
    work = 2 * rows * (parts.depth + 1) * parts.vocabulary * parts.width / known["smoke"]["rates"]["product"]["p50"]
    return {
        "model": name,
        "rows": [
            {"way": each, "tokens_per_s": spread([rows / s for s in spent]),
             "share_of_product": spread([work / s for s in spent])}
            for each, spent in found.items()
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- part 6: real weights
def weights(plan: Plan, name: str, folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The main job on real weights: chosen on even prompts, validated on odd ones."""
    MODELS.drop()
    found = run_study(
        [name], folder / Path(name).stem, device=plan.device, max_new_tokens=plan.weights_tokens,
        progress=lambda phase, done, total, **_: None,
    ).summary  # fmt: skip
    (model,) = found["models"]
    return {key: model[key] for key in ("name", "anatomy", "sentence", "choice", "validation")}
