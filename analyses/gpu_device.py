"""What the device itself does, in `validate_on_gpu.py`: the models that its cells share, smoke, microbenchmarks."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarking import say, spread, timed
from gpu_plan import Cell, Part, Plan
from torch.nn import functional

from probekit.costs.profile import Costs
from probekit.costs.roofline import roofline_costs
from probekit.decoding.device_decoding import DeviceSelfSpeculative
from probekit.decoding.speculative import SelfSpeculative
from probekit.lens.lens import head_logits
from probekit.models.cuda_kernels import chosen_kernels
from probekit.models.loaded import Loaded
from probekit.models.synthetic import Shape, synthetic

ROOT = Path(__file__).parent.parent
Way = Callable[[], Any]


# ------------------------------------------------------------------------------------------------------ the models
def exit_at(shape: Shape, share: float) -> int:
    return max(1, round(shape.layers * share))


class Models:
    """The shape that was built last: cells that follow one another share it, and it goes before the next is built."""

    def __init__(self) -> None:
        self._name: tuple[Any, ...] | None = None
        self._loaded: Loaded | None = None

    def get(self, plan: Plan, name: str, exit_layer: int, dial: float = 1.0) -> Loaded:
        asked = name, exit_layer, dial, plan.dtype, plan.device
        if self._loaded is None or self._name != asked:
            self.drop()
            shape = plan.shapes[name]
            say(f"  {name}: exit {exit_layer} of {shape.layers}, dial {dial:g}")
            scale = 1.0 if shape.tied else plan.logit_scale
            made = synthetic(
                shape, dial=dial, exit_layer=exit_layer, dtype=plan.dtype, device=plan.device, logit_scale=scale
            )
            self._name, self._loaded = asked, replace(made, name=name)
        return self._loaded

    def drop(self) -> None:
        self._name = self._loaded = None
        gc.collect()
        torch.cuda.empty_cache()


MODELS = Models()


def prompts_of(loaded: Loaded, count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, loaded.anatomy.vocabulary, (count, tokens), generator=generator).tolist()


def on_a_roof(plan: Plan, loaded: Loaded, known: Mapping[str, Any], context: int, **more: Any) -> Costs:
    """The least that each step can take at the rates that were measured here."""
    rates = known["smoke"]["rates"]
    roof = {"bandwidth": rates["copy"]["p50"], "flops": rates["product"]["p50"]} | more
    longest = max(plan.draft_lengths)
    return roofline_costs(loaded, context=context, longest_draft=longest, dtype=str(loaded.dtype), **roof)


def seconds_of(plan: Plan, work: Way) -> list[float]:
    """Seconds of a call, once for each sample, after three to warm up."""
    for _ in range(3):
        work()
    return [timed(work, plan.device)[0] for _ in range(plan.samples)]


# ------------------------------------------------------------------------------------------------- part 1: smoke
def smoke(plan: Plan) -> Iterator[Cell]:
    yield Cell(Part.SMOKE, "rates", lambda known: rates(plan))
    yield Cell(Part.SMOKE, "a captured round", lambda known: captured_round(plan))
    for path in plan.smoke_tests:
        yield Cell(Part.SMOKE, path, lambda known, path=path: passes(path))


def rates(plan: Plan) -> dict[str, Any]:
    """copy: bytes read and written a second; product: sums and products a second, of square matrices."""
    dtype = getattr(torch, plan.dtype)
    here = torch.zeros(plan.copied_bytes, dtype=torch.uint8, device=plan.device)
    there = torch.empty_like(here)
    left, right = torch.randn(2, plan.product_width, plan.product_width, device=plan.device).to(dtype)
    out = torch.empty_like(left)
    copies = seconds_of(plan, lambda: there.copy_(here))
    products = seconds_of(plan, lambda: torch.mm(left, right, out=out))
    return {
        "copy": spread([2 * plan.copied_bytes / each for each in copies]),
        "product": spread([2 * plan.product_width**3 / each for each in products]),
    }


def captured_round(plan: Plan) -> dict[str, Any]:
    """A recorded round replayed where every wait for the device is an error; and its tokens against the host's."""
    name, shape = list(plan.shapes.items())[-1]
    exit_layer = exit_at(shape, plan.shares[0])
    small = replace(plan, dtype="float32")  # where tokens are equal
    loaded = MODELS.get(small, name, exit_layer, plan.dials[0])
    length = plan.draft_lengths[-1]
    method, prompts = DeviceSelfSpeculative(loaded, exit_layer, length), prompts_of(loaded, 1, plan.prompt_tokens)
    (mine,) = method.decode(prompts, max_new_tokens=plan.new_tokens)
    (theirs,) = SelfSpeculative(loaded, exit_layer, length).decode(prompts, max_new_tokens=plan.new_tokens)
    held = loaded.kept["recordings"]
    strict = torch.device(plan.device).type == "cuda"
    with torch.inference_mode(), held.graphs.running():
        if strict:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for each in held.rounds:
                held.graphs.run(each, held.rounds[each])
        finally:
            if strict:
                torch.cuda.set_sync_debug_mode("default")
    return {
        "model": name, "recordings": len(held.graphs.recorded), "waits": 0 if strict else None,
        "fused": held.engine.fused is not None,
        "same_tokens": mine.tokens == theirs.tokens, "same_rounds": mine.accepted == theirs.accepted,
    }  # fmt: skip


def passes(path: str) -> dict[str, Any]:
    """A file of the tests on this machine, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "not long", "-p", "no:cacheprovider", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {"passed": done.returncode == 0, "says": lines[-1] if lines else "nothing"}


# --------------------------------------------------------------------------------------------- part 2: microbenchmarks
def micro(plan: Plan) -> Iterator[Cell]:
    name, shape = next(iter(plan.shapes.items()))
    heads = shape.head_dim * (shape.heads + 2 * shape.key_value_heads)
    maps = {
        "qkv": (heads, shape.width), "output": (shape.width, shape.heads * shape.head_dim),
        "gate and up": (2 * shape.inner, shape.width), "down": (shape.width, shape.inner),
        "head and argmax": (shape.vocabulary, shape.width),
    }  # fmt: skip
    for each, sizes in maps.items():
        yield Cell(Part.MICRO, f"{name} {each}", partial(linear_map, plan, each.startswith("head"), sizes))
    for context in plan.contexts:
        yield Cell(Part.MICRO, f"{name} attention at {context}", partial(attention, plan, shape, context))
    yield Cell(Part.MICRO, f"{name} head's product", partial(lens_product, plan, name))
    yield Cell(Part.MICRO, f"{name} row kernel", partial(row_kernel, plan, shape.vocabulary))


def linear_map(plan: Plan, best: bool, sizes: tuple[int, int], known: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds for 1, 5, 9 rows, and the share of the copy's bandwidth at which weights come."""
    dtype = getattr(torch, plan.dtype)
    weight = torch.randn(sizes, device=plan.device).to(dtype)
    rows = []
    for width in plan.widths:
        inputs = torch.randn(width, sizes[1], device=plan.device).to(dtype)

        def work(inputs: torch.Tensor = inputs) -> Any:
            products = functional.linear(inputs, weight)
            return products.argmax(-1) if best else products

        found = seconds_of(plan, work)
        moved = weight.numel() * weight.element_size()
        share = [moved / each / known["smoke"]["rates"]["copy"]["p50"] for each in found]
        rows.append({"rows": width, "seconds": spread(found), "share_of_copy": spread(share)})
        if best and torch.device(plan.device).type == "cuda":
            from probekit.models.head_kernel import best_tokens

            rows[-1]["fused"] = spread(seconds_of(plan, partial(best_tokens, inputs, weight)))
    return {"sizes": list(sizes), "rows": rows}


@torch.inference_mode()
def attention(plan: Plan, shape: Shape, context: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """One token over so many slots, with the groups folded into the query, with a mask and without."""
    dtype, groups = getattr(torch, plan.dtype), shape.heads // shape.key_value_heads
    query = torch.randn(1, shape.key_value_heads, groups, shape.head_dim, device=plan.device).to(dtype)
    key, value = torch.randn(
        2, 1, shape.key_value_heads, context, shape.head_dim, device=plan.device
    ).to(dtype)  # fmt: skip
    mask = torch.zeros(1, 1, groups, context, dtype=dtype, device=plan.device)
    split = {}
    if torch.device(plan.device).type == "cuda":
        split = {"in_splits": spread(split_attention(plan, shape, context, key, value))}
    with chosen_kernels(torch.device(plan.device)):
        masked = seconds_of(plan, lambda: functional.scaled_dot_product_attention(query, key, value, mask))
        plain = seconds_of(plan, lambda: functional.scaled_dot_product_attention(query, key, value))
    return {"context": context, "masked": spread(masked), "without": spread(plain)} | split


def split_attention(plan: Plan, shape: Shape, context: int, key: torch.Tensor, value: torch.Tensor) -> list[float]:
    """Seconds of the same by the split kernel, which reads the length on the device."""
    from probekit.models.attention_kernel import attend

    heads = shape.heads + 2 * shape.key_value_heads
    qkv = torch.randn(1, 1, heads * shape.head_dim, device=plan.device).to(key.dtype)
    position = torch.full((1, 1), context - 1, device=plan.device)
    return seconds_of(plan, lambda: attend(qkv, key, value, position, context, shape.head_dim**-0.5))


@torch.inference_mode()
def lens_product(plan: Plan, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The head over many rows, float32 out of the weights' dtype: the share of the square product's rate."""
    loaded = MODELS.get(plan, name, exit_at(plan.shapes[name], plan.shares[0]))
    parts = loaded.anatomy
    states = torch.randn(plan.lens_rows, parts.width, device=plan.device).to(parts.dtype)
    out = torch.empty(plan.lens_rows, parts.vocabulary, device=plan.device)
    found = seconds_of(plan, lambda: head_logits(parts, states, out))
    work = 2 * plan.lens_rows * parts.vocabulary * parts.width
    share = [work / each / known["smoke"]["rates"]["product"]["p50"] for each in found]
    return {"rows": plan.lens_rows, "seconds": spread(found), "share_of_product": spread(share)}


@torch.inference_mode()
def row_kernel(plan: Plan, vocabulary: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """Rows a second of the lens's kernel, and the share of the copy's bandwidth if each row is read once."""
    if torch.device(plan.device).type != "cuda":
        return {"skipped": "a kernel's speed in an interpreter says nothing"}
    from probekit.lens.row_kernel import row_statistics

    logits = torch.randn(plan.lens_rows // 32, 32, vocabulary, device=plan.device)
    ids = torch.zeros(len(logits), dtype=torch.long, device=plan.device)
    found = seconds_of(plan, lambda: row_statistics(logits, logits[:, 0], ids, ids))
    moved = logits.numel() * logits.element_size()
    share = [moved / each / known["smoke"]["rates"]["copy"]["p50"] for each in found]
    rows = spread([logits.shape[0] * logits.shape[1] / each for each in found])
    return {"rows_per_s": rows, "share_of_copy": spread(share)}
