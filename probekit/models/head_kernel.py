"""The model's token in Triton: the head's product and its argmax, without the logits in between.

Two operations of torch (`torch.ops.probekit`), a launch each: the best token of each block of the vocabulary, and the
best of these. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probekit.models.kernel_language import LANES, launched_on, product, round_to, warps

TOKENS, WIDTH = 64, 128  # in one program: tokens of the vocabulary, and numbers of a state at once


def best_tokens(states: Tensor, weight: Tensor) -> Tensor:
    """The argmax of the head's products, rounded to the weights' dtype; of equal ones the lowest token. Two launches.

    states: (..., width), contiguous; weight: (vocabulary, width), contiguous. Returns (...), int64.
    """
    return torch.ops.probekit.best_of_blocks(*torch.ops.probekit.best_in_blocks(states, weight), weight.shape[0])


def _leaders(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    shape = *states.shape[:-1], triton.cdiv(weight.shape[0], TOKENS)
    largest = torch.empty(shape, dtype=torch.float32, device=states.device)
    return largest, torch.empty(shape, dtype=torch.int32, device=states.device)


@torch.library.custom_op("probekit::best_in_blocks", mutates_args=())
def _best_in_blocks(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The largest product of each block of the vocabulary, and its token."""
    largest, best = _leaders(states, weight)
    width = states.shape[-1]
    rows = states.numel() // width
    with launched_on(states):
        _head[(largest.shape[-1], triton.cdiv(rows, LANES))](
            states, weight, largest, best, rows, width, weight.shape[0],
            ROWS=LANES, TOKENS=TOKENS, WIDTH=WIDTH, num_warps=4,
        )  # fmt: skip
    return largest, best


@_best_in_blocks.register_fake
def _(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _leaders(states, weight)


# mypy: disable-error-code="no-untyped-def"
# Triton would read annotations as its own types.
@triton.jit
def _head(
    states, weight, largest, best, rows, width, vocabulary,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, lane = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = block * TOKENS + tl.arange(0, TOKENS)
    real, known = lane < rows, token < vocabulary
    products = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, width, WIDTH):
        at = start + tl.arange(0, WIDTH)
        inside = at < width
        state = tl.load(
            states + lane.to(tl.int64)[:, None] * width + at[None, :], mask=real[:, None] & inside[None, :], other=0.0
        )
        row = tl.load(
            weight + token.to(tl.int64)[None, :] * width + at[:, None], mask=known[None, :] & inside[:, None], other=0.0
        )
        products += product(state, row)
    products = tl.where(known[None, :], round_to(products, states.dtype.element_ty), -float("inf"))
    top = tl.max(products, 1)
    first = tl.min(tl.where(products == top[:, None], token[None, :], 0x7FFFFFFF), 1)
    out = lane * tl.num_programs(0) + block
    tl.store(largest + out, top, mask=real)
    tl.store(best + out, first, mask=real)


@torch.library.custom_op("probekit::best_of_blocks", mutates_args=())
def _best_of_blocks(largest: Tensor, best: Tensor, vocabulary: int) -> Tensor:
    blocks = largest.shape[-1]
    out = torch.empty(largest.shape[:-1], dtype=torch.int64, device=largest.device)
    block = triton.next_power_of_2(blocks)
    with launched_on(largest):
        _leader[(largest.numel() // blocks,)](
            largest, best, out, blocks, vocabulary, BLOCK=block, num_warps=warps(block)
        )
    return out


@_best_of_blocks.register_fake
def _(largest: Tensor, best: Tensor, vocabulary: int) -> Tensor:
    return torch.empty(largest.shape[:-1], dtype=torch.int64, device=largest.device)


@triton.jit
def _leader(largest, best, out, blocks, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < blocks
    top = tl.load(largest + row * blocks + at, mask=inside, other=-float("inf"))
    token = tl.load(best + row * blocks + at, mask=inside, other=0x7FFFFFFF)
    first = tl.min(tl.where(top == tl.max(top, 0), token, 0x7FFFFFFF), 0)
    tl.store(out + row, tl.minimum(first, vocabulary - 1).to(tl.int64))  # also of a row that is no number
