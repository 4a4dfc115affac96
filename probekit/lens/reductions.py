"""Reductions of rows of logits in few passes, in place, with one tie rule: the lowest token id wins.

The maxima of short blocks are taken once, in one pass over the logits. What follows (argmax, runner-up, the next
ones, the argmax after rounding) reads those maxima and single blocks only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128  # logits in a block: long enough for vector units, short enough to be looked at again for nothing


def block_maxima(logits: Tensor) -> Tensor:
    """Largest logit of each block of the vocabulary. (..., vocabulary) -> (..., blocks)."""
    vocabulary = logits.shape[-1]
    whole = vocabulary - vocabulary % BLOCK
    found = []
    if whole:
        found.append(logits[..., :whole].unflatten(-1, (-1, BLOCK)).amax(-1))
    if whole < vocabulary:
        found.append(logits[..., whole:].amax(-1, keepdim=True))
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def topk_lowest_id(logits: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits, largest first, equal ones by token id, and their ids: (..., count) each.

    logits: (..., vocabulary); written to on the way, and restored. maxima: `block_maxima(logits)`, left alone.
    A row with fewer than `count` tokens goes on with minus infinity.
    """
    maxima = maxima.clone()
    values, ids = [], []
    for _ in range(count):
        block = maxima.argmax(-1, keepdim=True)
        values.append(maxima.gather(-1, block))
        inside = _inside(logits, block)
        place = inside.argmax(-1, keepdim=True)
        ids.append(block * BLOCK + place)
        logits.scatter_(-1, ids[-1], -math.inf)
        maxima.scatter_(-1, block, inside.scatter_(-1, place, -math.inf).amax(-1, keepdim=True))
    for value, token in zip(reversed(values), reversed(ids), strict=True):  # the first to go is the last to return
        logits.scatter_(-1, token, value)
    return torch.cat(values, -1), torch.cat(ids, -1)


def rounded_argmax(logits: Tensor, maxima: Tensor, dtype: torch.dtype) -> Tensor:
    """Argmax of the logits rounded to `dtype`: (..., vocabulary) -> (...).

    Rounding keeps order, so that the rounded maximum of a block is its maximum, rounded.
    """
    block = maxima.to(dtype).float().argmax(-1, keepdim=True)
    return (block * BLOCK + _inside(logits, block).to(dtype).float().argmax(-1, keepdim=True))[..., 0]


def rank_of_token(logits: Tensor, token: int, scratch: Tensor) -> Tensor:
    """How many tokens come before `token` in each row: larger, or equal with a lower id.

    logits: (rows, vocabulary); scratch: float32, the same shape. Returns (rows,), int32.
    """
    own = logits[:, token : token + 1]
    torch.ge(logits[:, :token], own, out=scratch[:, :token])
    torch.gt(logits[:, token:], own, out=scratch[:, token:])
    return scratch.sum(-1).int()  # exact: a sum of ones below 2^24


def rank_in_row(row: Tensor, tokens: Tensor, scratch: Tensor) -> Tensor:
    """How many tokens of one row come before each of `tokens`: larger, or equal with a lower id.

    row: (vocabulary,); tokens: (rows,); scratch: float32, (rows, vocabulary). Returns (rows,), int32.
    """
    distinct, place = tokens.unique(return_inverse=True)
    scratch = scratch[: len(distinct)]
    own = row[distinct, None]
    above = torch.gt(row, own, out=scratch).sum(-1).int()
    level = torch.ge(row, own, out=scratch).sum(-1).int()
    for i in (level - above > 1).nonzero().flatten().tolist():  # equal logits: the lower ids come before
        above[i] += (row[: distinct[i]] == own[i]).sum()
    return above[place]


def _inside(logits: Tensor, block: Tensor) -> Tensor:
    """The logits of one block of each row, minus infinity past the end. block: (..., 1). Returns (..., BLOCK)."""
    vocabulary = logits.shape[-1]
    at = block * BLOCK + torch.arange(min(BLOCK, vocabulary), device=logits.device)
    return logits.gather(-1, at.clamp(max=vocabulary - 1)).masked_fill_(at >= vocabulary, -math.inf)
