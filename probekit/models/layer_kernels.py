"""The small kernels of a decoder layer in Triton: norm and residual, rotary and cache write, activation.

Each stands for several of torch's and rounds where these round, so that in bfloat16 too they differ by the order of
sums alone. They are operations of torch (`torch.ops.probekit`), one launch each: graphs record them, counters count
them, fake tensors pass through them. Positions are read on the device. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probekit.models.kernel_language import launched_on, round_to, warps

INNER = 1024  # numbers of the activation in one program


@torch.library.custom_op("probekit::norm", mutates_args=())
def norm(residual: Tensor, weight: Tensor, epsilon: float, one_plus: bool) -> Tensor:
    """RMS norm of (..., width), contiguous: weight * x / rms(x); with one_plus, (1 + weight) * x / rms(x) as Gemma."""
    normed = torch.empty_like(residual)
    width = residual.shape[-1]
    block = triton.next_power_of_2(width)
    with launched_on(residual):
        _norm[(residual.numel() // width,)](
            residual, residual, weight, weight, normed, normed, width, epsilon,
            ADD=False, BEHIND=False, ONE_PLUS=one_plus, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return normed


@norm.register_fake
def _(residual: Tensor, weight: Tensor, epsilon: float, one_plus: bool) -> Tensor:
    return torch.empty_like(residual)


@torch.library.custom_op("probekit::add_norm", mutates_args=())
def add_norm(
    residual: Tensor, added: Tensor, behind: Tensor | None, weight: Tensor, epsilon: float, one_plus: bool
) -> tuple[Tensor, Tensor]:
    """residual + added, and its RMS norm. (..., width) all, contiguous.

    behind: the weight of a norm that `added` goes through first (Gemma 2 and 3); None: it is added as it is.
    """
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    width = residual.shape[-1]
    block = triton.next_power_of_2(width)
    with launched_on(residual):
        _norm[(residual.numel() // width,)](
            residual, added, weight if behind is None else behind, weight, total, normed, width, epsilon,
            ADD=True, BEHIND=behind is not None, ONE_PLUS=one_plus, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return total, normed


@add_norm.register_fake
def _(
    residual: Tensor, added: Tensor, behind: Tensor | None, weight: Tensor, epsilon: float, one_plus: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)


# mypy: disable-error-code="no-untyped-def"
# Triton would read annotations as its own types.
@triton.jit
def _norm(
    residual, added, behind, weight, total, normed, width, epsilon,
    ADD: tl.constexpr, BEHIND: tl.constexpr, ONE_PLUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = normed.dtype.element_ty
    if ADD:
        more = tl.load(added + row + at, mask=inside, other=0.0).to(tl.float32)
        if BEHIND:
            gain = tl.load(behind + at, mask=inside, other=0.0).to(tl.float32)
            more = _normalised(more, gain, width, epsilon, ONE_PLUS, dtype)
        x = round_to(x + more, dtype)
        tl.store(total + row + at, x.to(dtype), mask=inside)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + at, _normalised(x, gain, width, epsilon, ONE_PLUS, dtype).to(dtype), mask=inside)


@triton.jit
def _normalised(x, gain, width, epsilon, ONE_PLUS: tl.constexpr, dtype: tl.constexpr):
    """x / rms(x) times the gain, rounded where the family's own norm rounds; x is 0 outside."""
    x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + epsilon))
    if ONE_PLUS:
        return round_to(x * (1.0 + gain), dtype)
    return round_to(gain * round_to(x, dtype), dtype)


# ------------------------------------------------------------------------------------------- rotary and cache write
@torch.library.custom_op("probekit::rotate_and_write", mutates_args=("qkv", "keys", "values"))
def rotate_and_write(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float, one_plus: bool,
) -> None:  # fmt: skip
    """Rotate queries in their place, and write rotated keys, and values, at their positions in the cache.

    qkv: (rows, tokens, (heads + 2 key-value heads) head width), contiguous; keys, values: (rows, key-value heads,
    slots, head width), the last dimension contiguous; cos, sin: (slots, head width), contiguous; positions: (rows,
    tokens) int64, below `slots`. query_norm, key_norm: (head width,), weights of norms before the rotation (Qwen 3,
    Gemma 3); None: there are none.
    """
    rows, tokens = positions.shape
    width, own = keys.shape[3], keys.shape[1]
    heads = qkv.shape[2] // width
    half = triton.next_power_of_2(width // 2)
    with launched_on(qkv):
        _rotate[(rows * tokens, heads)](
            qkv, keys, values, cos, sin, positions, cos if query_norm is None else query_norm,
            cos if key_norm is None else key_norm, positions.stride(0), positions.stride(1), *keys.stride()[:3],
            *values.stride()[:3], tokens, heads, own, epsilon,
            NORMED=query_norm is not None, ONE_PLUS=one_plus, WIDTH=width, HALF=half, num_warps=1,
        )  # fmt: skip


@rotate_and_write.register_fake
def _(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float, one_plus: bool,
) -> None:  # fmt: skip
    return None


@triton.jit
def _rotate(
    qkv, keys, values, cos, sin, positions, query_norm, key_norm, row_step, token_step,
    key_row, key_head, key_slot, value_row, value_head, value_slot, tokens, heads, own, epsilon,
    NORMED: tl.constexpr, ONE_PLUS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one token. heads: of queries, keys and values together, `own` of them keys, as many values."""
    place, head = tl.program_id(0), tl.program_id(1)
    row, token = place // tokens, place % tokens
    position = tl.load(positions + row * row_step + token * token_step)
    source = qkv + (place * heads + head).to(tl.int64) * WIDTH
    at = tl.arange(0, HALF)
    inside = at < WIDTH // 2
    first = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + WIDTH // 2 + at, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = qkv.dtype.element_ty
    if head < heads - own:
        if NORMED:
            gain = query_norm if head < heads - 2 * own else key_norm
            squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            scale = 1.0 / tl.sqrt_rn(squares / WIDTH + epsilon)
            first = _scaled(first, scale, tl.load(gain + at, mask=inside, other=0.0), ONE_PLUS, dtype)
            second = _scaled(second, scale, tl.load(gain + WIDTH // 2 + at, mask=inside, other=0.0), ONE_PLUS, dtype)
        angle = position * WIDTH + at
        c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        c_too = tl.load(cos + angle + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
        s_too = tl.load(sin + angle + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
        turned = round_to(round_to(first * c, dtype) - round_to(second * s, dtype), dtype)
        second = round_to(round_to(second * c_too, dtype) + round_to(first * s_too, dtype), dtype)
        first = turned
    if head < heads - 2 * own:
        tl.store(source + at, first.to(dtype), mask=inside)
        tl.store(source + WIDTH // 2 + at, second.to(dtype), mask=inside)
    elif head < heads - own:
        mine = keys + row.to(tl.int64) * key_row + (head - heads + 2 * own) * key_head + position * key_slot
        tl.store(mine + at, first.to(dtype), mask=inside)
        tl.store(mine + WIDTH // 2 + at, second.to(dtype), mask=inside)
    else:
        mine = values + row.to(tl.int64) * value_row + (head - heads + own) * value_head + position * value_slot
        tl.store(mine + at, first.to(dtype), mask=inside)
        tl.store(mine + WIDTH // 2 + at, second.to(dtype), mask=inside)


@triton.jit
def _scaled(x, scale, gain, ONE_PLUS: tl.constexpr, dtype: tl.constexpr):
    if ONE_PLUS:
        return round_to(x * scale * (1.0 + gain.to(tl.float32)), dtype)
    return round_to(gain.to(tl.float32) * round_to(x * scale, dtype), dtype)


@torch.library.custom_op("probekit::activate", mutates_args=())
def activate(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up. gate_up: (.., 2 inner), contiguous; activation: "silu" or "gelu_tanh". Returns (.., inner)."""
    *shape, both = gate_up.shape
    inner = both // 2
    out = torch.empty(*shape, inner, dtype=gate_up.dtype, device=gate_up.device)
    with launched_on(gate_up):
        _activate[(out.numel() // inner, triton.cdiv(inner, INNER))](
            gate_up, out, inner, SILU=activation == "silu", BLOCK=INNER, num_warps=4
        )
    return out


@activate.register_fake
def _(gate_up: Tensor, activation: str) -> Tensor:
    *shape, both = gate_up.shape
    return torch.empty(*shape, both // 2, dtype=gate_up.dtype, device=gate_up.device)


@triton.jit
def _activate(gate_up, out, inner, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    if SILU:
        gate = gate / (1.0 + tl.exp(-gate))
    else:
        u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(2.0 * u)  # gate (1 + tanh u) / 2
    tl.store(out + row * inner + at, round_to(round_to(gate, dtype) * up, dtype).to(dtype), mask=inside)
