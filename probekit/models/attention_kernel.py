"""Attention of a few tokens over a long cache in Triton: lengths on the device, no mask, slots split over programs.

Two operations of torch (`torch.ops.probekit`), a launch each: the sums of each split, and what puts them together
(Flash-Decoding; Dao et al., 2023). Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probekit.models.kernel_language import LANES, launched_on, product, round_to

BLOCK = 64  # slots of the cache that a program holds at once
PROGRAMS = 256  # that one call aims at: about two for each multiprocessor
MOST_SPLITS = 64
MOST_BYTES = 512  # of a key, for whole blocks of them
MOST_ROWS = 64  # queries of half precision that a program holds at once


def splits(rows: int, heads: int, visible: int) -> tuple[int, int]:
    """(slots of a split, splits) of attention over `visible` slots: from sizes alone, so that results repeat."""
    wanted = min(-(-visible // BLOCK), max(1, PROGRAMS // (rows * heads)), MOST_SPLITS)
    slots = BLOCK * -(-visible // (BLOCK * wanted))
    return slots, -(-visible // slots)


def tile(queries: int, width: int, size: int) -> dict[str, int]:
    """What a program holds at once: so much that its loads overlap, and no more than a multiprocessor's memory takes.

    queries: of a key-value head, over all tokens. width: of a head. size: bytes of a number.
    """
    wide = max(LANES, triton.next_power_of_2(width))
    return {
        "ROWS": min(max(LANES, triton.next_power_of_2(queries)), 2 * MOST_ROWS // size),
        "WIDE": wide,
        "BLOCK": BLOCK if wide * size <= MOST_BYTES else BLOCK // 2,
        "num_stages": 3 if wide * size < MOST_BYTES else 2,
    }


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, visible: int, scale: float,
    window: int | None = None, soft_cap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each token over slots 0..its position: (rows, tokens, heads * head width). Two launches.

    qkv: as `rotate_and_write` leaves it; keys, values: (rows, key-value heads, slots, head width), the last dimension
    contiguous; positions: (rows, tokens) int64, below `visible`, which the host knows. window: the most slots that a
    token sees, the last ones. soft_cap: c of c tanh(score / c).

    The queries of all heads that share a key-value head, and of all tokens, are the rows of one product; slots are
    split over programs, whose sums are then put together (Flash-Decoding; Dao et al., 2023).
    """
    return torch.ops.probekit.put_together(
        *torch.ops.probekit.attend_in_splits(
            qkv, keys, values, positions, visible, scale, window or 0, soft_cap or 0.0
        ), positions, qkv, keys.shape[1],
    )  # fmt: skip


def _partial(qkv: Tensor, keys: Tensor, positions: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    rows, tokens = positions.shape
    _, own, _, width = keys.shape
    queries = tokens * (qkv.shape[2] // width - 2 * own) // own
    number = splits(rows, own, visible)[1]
    sums = torch.empty(rows, own, number, queries, width, dtype=torch.float32, device=qkv.device)
    return sums, torch.empty(2, rows, own, number, queries, dtype=torch.float32, device=qkv.device)


@torch.library.custom_op("probekit::attend_in_splits", mutates_args=())
def _attend_in_splits(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, visible: int, scale: float, window: int,
    soft_cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of each split: sums of values times exp(score - largest), and (largest, sum of exp)."""
    sums, scales = _partial(qkv, keys, positions, visible)
    rows, own, number, queries, width = sums.shape
    slots, _ = splits(rows, own, visible)
    with launched_on(qkv):
        sizes = tile(queries, width, qkv.element_size())
        _attend[(rows * own, number, triton.cdiv(queries, sizes["ROWS"]))](
            qkv, keys, values, positions, sums, scales, positions.stride(0), positions.stride(1), *keys.stride()[:3],
            *values.stride()[:3], own, positions.shape[1], queries, number, slots, visible, scale, window, soft_cap,
            WINDOW=window > 0, CAPPED=soft_cap > 0, WIDTH=width, **sizes, num_warps=4,
        )  # fmt: skip
    return sums, scales


@_attend_in_splits.register_fake
def _(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, visible: int, scale: float, window: int,
    soft_cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _partial(qkv, keys, positions, visible)


# mypy: disable-error-code="no-untyped-def"
# Triton would read annotations as its own types.
@triton.jit
def _attend(
    qkv, keys, values, positions, sums, scales, row_step, token_step, key_row, key_head, key_slot, value_row,
    value_head, value_slot, own, tokens, queries, number, slots, seen, scale, window, soft_cap,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one key-value head: lane i is query head i // tokens of its group, token i % tokens."""
    program, split = tl.program_id(0), tl.program_id(1)
    row, head = program // own, program % own
    groups = queries // tokens
    lane = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = lane < queries
    token = lane % tokens
    stands = tl.load(positions + row * row_step + token * token_step, mask=real, other=0)
    at = tl.arange(0, WIDE)
    inside = at < WIDTH
    heads = own * (groups + 2)
    own_head = (row * tokens + token) * heads + head * groups + lane // tokens
    query = tl.load(
        qkv + own_head.to(tl.int64)[:, None] * WIDTH + at[None, :], mask=real[:, None] & inside[None, :], other=0.0
    )
    furthest = tl.max(tl.where(real, stands, 0), 0)
    first = (split * slots).to(tl.int64)
    last = tl.minimum(tl.minimum(first + slots, furthest + 1), seen)
    if WINDOW:
        nearest = tl.min(tl.where(real, stands, 0x7FFFFFFF), 0)
        first = tl.maximum(first, nearest - window + 1)
    mine = keys + row.to(tl.int64) * key_row + head * key_head
    theirs = values + row.to(tl.int64) * value_row + head * value_head

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(first, last, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        there = slot < last
        key = tl.load(mine + slot[None, :] * key_slot + at[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        score = product(query, key) * scale
        if CAPPED:
            score = soft_cap * (2.0 * tl.sigmoid(2.0 * score / soft_cap) - 1.0)
        shown = there[None, :] & (slot[None, :] <= stands[:, None])
        if WINDOW:
            shown = shown & (slot[None, :] > stands[:, None] - window)
        score = tl.where(shown, score, -float("inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # a lane that has seen nothing so far
        before = tl.exp(largest - base)
        weight = tl.exp(score - base[:, None])
        total = total * before + tl.sum(weight, 1)
        value = tl.load(
            theirs + slot[:, None] * value_slot + at[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        mixed = mixed * before[:, None] + product(weight.to(value.dtype), value)
        largest = larger

    out = (program * number + split).to(tl.int64) * queries + lane
    tl.store(sums + out[:, None] * WIDTH + at[None, :], mixed, mask=real[:, None] & inside[None, :])
    tl.store(scales + out, largest, mask=real)
    tl.store(scales + tl.num_programs(0).to(tl.int64) * number * queries + out, total, mask=real)


@torch.library.custom_op("probekit::put_together", mutates_args=())
def _put_together(sums: Tensor, scales: Tensor, positions: Tensor, qkv: Tensor, own: int) -> Tensor:
    rows, _, number, queries, width = sums.shape
    tokens = positions.shape[1]
    groups = queries // tokens
    out = torch.empty(rows, tokens, own * groups * width, dtype=qkv.dtype, device=qkv.device)
    with launched_on(qkv):
        _together[(rows * tokens, own * groups)](
            sums, scales, out, tokens, own, groups, queries, number,
            WIDTH=width, WIDE=triton.next_power_of_2(width), SPLITS=triton.next_power_of_2(number), num_warps=4,
        )  # fmt: skip
    return out


@_put_together.register_fake
def _(sums: Tensor, scales: Tensor, positions: Tensor, qkv: Tensor, own: int) -> Tensor:
    rows, tokens = positions.shape
    width = sums.shape[4]
    return torch.empty(rows, tokens, qkv.shape[2] - 2 * own * width, dtype=qkv.dtype, device=qkv.device)


@triton.jit
def _together(
    sums, scales, out, tokens, own, groups, queries, number,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One head of one token: the splits' sums, each at its own scale, put together."""
    place, head = tl.program_id(0), tl.program_id(1)
    row, token = place // tokens, place % tokens
    program = row * own + head // groups
    lane = (head % groups) * tokens + token
    split = tl.arange(0, SPLITS)
    some = split < number
    there = (program * number + split).to(tl.int64) * queries + lane
    every = (tl.num_programs(0) // tokens * own).to(tl.int64) * number * queries
    largest = tl.load(scales + there, mask=some, other=-float("inf"))
    total = tl.load(scales + every + there, mask=some, other=0.0)
    share = tl.exp(largest - tl.max(largest, 0))
    at = tl.arange(0, WIDE)
    inside = at < WIDTH
    mixed = tl.load(sums + there[:, None] * WIDTH + at[None, :], mask=some[:, None] & inside[None, :], other=0.0)
    found = tl.sum(mixed * share[:, None], 0) / tl.sum(total * share, 0)
    dtype: tl.constexpr = out.dtype.element_ty
    mine = out + (place * own * groups + head).to(tl.int64) * WIDTH
    tl.store(mine + at, round_to(found, dtype).to(dtype), mask=inside)
