"""Costs read off a roofline: the least that each step can take on a device that is not at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from probekit.costs.profile import Costs, DraftHeadKey, DraftModelCosts
from probekit.errors import InputError
from probekit.traces.draft_vocabulary import check_draft_rows


class Roof(NamedTuple):
    """bandwidth: bytes a second. flops: products and sums a second, of dense matrices, in 16-bit types where the device
    has them. source: where both figures are from."""

    bandwidth: float
    flops: float
    source: str


DEVICES = {
    "h200": Roof(4.3e12, 788e12, "measured on one: a device-to-device copy, and a bfloat16 product of 8192^3"),
    "h100": Roof(3.35e12, 989e12, "NVIDIA H100 Tensor Core GPU datasheet, SXM5; products without sparsity"),
    "a100": Roof(2.04e12, 312e12, "NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM; products without sparsity"),
    "l4": Roof(0.3e12, 121e12, "NVIDIA L4 Tensor Core GPU datasheet; half of its 242e12, which are with sparsity"),
    "m1": Roof(68.25e9, 2.6e12, "Apple newsroom, Apple unleashes M1, 2020; its memory is LPDDR4X-4266 of 128 bits"),
    "m1-max": Roof(400e9, 10.4e12, "Apple newsroom, Introducing M1 Pro and M1 Max, 2021"),
    "m2": Roof(100e9, 3.6e12, "Apple newsroom, Apple unveils M2, 2022"),
}


@dataclass(frozen=True)
class Dimensions:
    """What a roofline needs to know of a model.

    layer_parameters, head_parameters: weights of one layer (its norms with it), and of the head.
    vocabulary: rows of the head.
    key_value_width: numbers of one key (or value) of one token in one layer; None where nobody said.
    layer_bytes, head_bytes: of weights that are not stored as numbers of the dtype (quantised ones); else None.
    """

    name: str
    depth: int
    layer_parameters: int
    head_parameters: int
    vocabulary: int
    key_value_width: int | None = None
    layer_bytes: int | None = None
    head_bytes: int | None = None

    @property
    def width(self) -> int:
        return self.head_parameters // self.vocabulary

    @classmethod
    def of(cls, source: Any) -> Dimensions:
        """From a Loaded, a Described, a Trace, a ModelRecord, or the name of a shape of probekit.models.synthetic.

        Where a trace of an earlier version does not say how wide keys and values are, its roofline leaves them out.
        """
        if isinstance(source, str):
            from probekit.models.synthetic import SHAPES

            if source not in SHAPES:
                raise InputError(f"no shape is named {source!r}; there are {', '.join(SHAPES)}.")
            shape = SHAPES[source]
            queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
            layer = 2 * shape.width * (queries + keys) + 3 * shape.width * shape.inner + 2 * shape.width
            return cls(source, shape.layers, layer, shape.vocabulary * shape.width, shape.vocabulary, keys)
        if hasattr(source, "anatomy"):
            from probekit.models.anatomy import check_unchanged
            from probekit.models.states import count_numbers

            parts = check_unchanged(source.anatomy)
            layer = count_numbers(parts.layers) // parts.depth
            stored = parts.stored_bytes or (None, None)
            head = parts.vocabulary * parts.width
            return cls(source.name, parts.depth, layer, head, parts.vocabulary, parts.key_value_width, *stored)
        record = source.manifest.model if hasattr(source, "manifest") else source
        if not hasattr(record, "vocabulary"):
            from probekit.models.loaded import as_loaded

            as_loaded(source)
        table = record.vocabulary * record.width
        layers = record.parameters - table * (1 if record.tied else 2) - record.width
        return cls(
            record.name, record.depth, layers // record.depth, table, record.vocabulary,
            *(getattr(record, name, None) for name in ("key_value_width", "layer_bytes", "head_bytes")),
        )  # fmt: skip


def roofline_costs(
    source: Any,
    *,
    device: str | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    dtype: str | None = None,
    context: int = 128,
    rows: int = 1,
    weight_bits: float | None = None,
    longest_draft: int = 32,
    drafter: Any = None,
    draft_rows: int | None = None,
    exit_heads: str | None = None,
) -> Costs:
    """The least that each step can take: the larger of its bytes over bandwidth and its products over speed.

    A pass reads the weights of its layers (and head) and the keys and values of its context once, whatever its rows;
    it makes two operations for each weight and row.

    Parameters
    ----------
    source, drafter: what Dimensions.of takes.
    device: a name in DEVICES, or "cpu", whose bandwidth and speed are measured here, in a moment. By default the
        trace's, or the CPU.
    draft_rows: rows of the head that exit layers draft with; all by default.
    exit_heads: the name of the exit heads that they draft through: a map of width x width more. A trace's own by
        default.
    rows: rows in the batch: weights are read once for all of them, keys and values of each.
    weight_bits: of each weight, where they are quantised on the other device; by default those of the dtype.
    bandwidth, flops: bytes and operations a second, instead of a device's.
    dtype: of the weights; by default the trace's or the model's, or bfloat16.
    """
    model = Dimensions.of(source)
    helper = None if drafter is None else Dimensions.of(drafter)
    manifest = getattr(source, "manifest", None)
    known = source if manifest is None else manifest.settings
    dtype = str(dtype or getattr(known, "dtype", "bfloat16")).removeprefix("torch.")
    if dtype not in BYTES:
        raise InputError(f"dtype {dtype!r} is not known: it is one of {', '.join(BYTES)}.")
    name = str(device or getattr(known, "device", "cpu")).lower()
    if bandwidth is None or flops is None:
        roof = _roof(name, dtype)
        bandwidth, flops = bandwidth or roof.bandwidth, flops or roof.flops
    if not (bandwidth > 0 and flops > 0):
        raise InputError(f"a device moves and computes something: {bandwidth} bytes and {flops} operations a second.")
    if context < 0 or longest_draft < 1:
        raise InputError(f"a context of {context} and drafts of {longest_draft} tokens make no round.")
    exit_heads = exit_heads or getattr(manifest, "heads_name", None)
    share = 1.0 if draft_rows is None else check_draft_rows(draft_rows, model.vocabulary) / model.vocabulary

    if rows < 1 or (weight_bits is not None and not 0 < weight_bits <= 32):
        raise InputError(f"{rows} rows of {weight_bits} bits a weight make no batch.")

    def seconds(of: Dimensions, layers: int, heads: float, tokens: int) -> float:
        weights = layers * of.layer_parameters + heads * of.head_parameters
        cached = rows * layers * 2 * (of.key_value_width or 0) * context
        layer_bytes: float = of.layer_parameters * BYTES[dtype] if of.layer_bytes is None else of.layer_bytes
        head_bytes: float = of.head_parameters * BYTES[dtype] if of.head_bytes is None else of.head_bytes
        if weight_bits is not None:
            layer_bytes, head_bytes = (each * weight_bits / 8 for each in (of.layer_parameters, of.head_parameters))
        moved = layers * layer_bytes + heads * head_bytes + cached * BYTES[dtype]
        return max(moved / bandwidth, 2 * weights * tokens * rows / flops)

    L = model.depth
    exits, widths = range(1, L), range(1, longest_draft + 2)
    return Costs(
        source="roofline",
        device=name,
        dtype=dtype,
        context=context if model.key_value_width is not None else 0,
        depth=L,
        autoregressive_s=seconds(model, L, 1, 1),
        early_s={exit_layer: seconds(model, exit_layer, 0, 1) for exit_layer in exits},
        head_s=seconds(model, 0, share + (0.0 if exit_heads is None else model.width / model.vocabulary), 1),
        verify_s={
            (exit_layer, wide): seconds(model, L - exit_layer, 1, wide) for exit_layer in exits for wide in widths
        },
        draft_head=DraftHeadKey(draft_rows, exit_heads),
        rows=rows,
        draft_model=None
        if helper is None
        else DraftModelCosts(
            helper.name,
            step_s=seconds(helper, helper.depth, 1, 1),
            first_s=seconds(helper, helper.depth, 1, 2),
            verify_s={wide: seconds(model, L, 1, wide) for wide in widths},
        ),
    )


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _roof(name: str, dtype: str) -> Roof:
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        return _measured_roof()
    raise InputError(
        f"no roofline is known for {name!r}: it is cpu or one of {', '.join(DEVICES)}.",
        "Name one with --device, or measure the costs there.",
    )


def _measured_roof() -> Roof:
    """This processor's: the best of a few sums of an array far beyond the caches, and of float32 products."""
    array = np.ones(2**25, dtype=np.float32)
    matrix = np.ones((1024, 1024), dtype=np.float32)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    return Roof(array.nbytes / best(array.max), 2 * 1024**3 / best(lambda: matrix @ matrix), "measured")
