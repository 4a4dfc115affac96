"""Attention as the engine's own: grouped queries in one product, and, where asked for, one row at a time.

Attention over several rows in one call is shared out over threads, and where a thread's scratch lies decides of the
last bits of a row. One row at a time has the same bits in any place.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROW_BY_ROW = "probekit_row_by_row"
"""Under this name transformers' modules find `row_by_row` among the attention functions."""


def with_rows_apart(config: Any) -> Any:
    """A copy of a configuration, by which an attention module takes one row at a time; the given one is left alone."""
    copied = copy.copy(config)
    copied.rows_by = config._attn_implementation
    copied._attn_implementation_internal = ROW_BY_ROW
    return copied


def row_by_row(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *given: Any, **named: Any
) -> Any:
    """The module's own kind of attention behind transformers' interface, for one row after the other."""
    kind = module.config.rows_by  # type: ignore[union-attr]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = eager if kind == "eager" and eager is not None else ALL_ATTENTION_FUNCTIONS[kind]
    return rows_apart(attention, module, query, key, value, mask, *given, **named)


ALL_ATTENTION_FUNCTIONS.register(ROW_BY_ROW, row_by_row)


def rows_apart(
    attention: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *given: Any,
    **named: Any,
) -> tuple[Tensor, None]:
    """Call an attention function for one row after the other. query, key, value, mask: of all rows.

    `mask.counted`, where it is there, says how many rows are counted: what the others get is the last one's.
    """
    masks = once(mask, "rows", lambda mask: mask.split(1))
    real = getattr(mask, "counted", len(query))
    alone = [
        attention(module, query[row : row + 1].clone(), key[row : row + 1], value[row : row + 1], masks[row], *given,
                  **named)[0]
        for row in range(real)
    ]  # fmt: skip
    return torch.cat([*alone, *alone[-1:] * (len(query) - real)]), None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
) -> tuple[Tensor, None]:
    """Attention behind transformers' interface: the queries that share a key/value head stand as rows of one product.

    query: (rows, heads, tokens, head width); key, value: (rows, key-value heads, slots, head width);
    attention_mask: additive, (rows or 1, 1, tokens, slots), or None: one token that sees all, or causal from slot 0.
    Returns (rows, tokens, heads, head width).
    """
    rows, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    attention = functional.scaled_dot_product_attention
    if groups == 1 or (attention_mask is None and tokens > 1):
        causal = attention_mask is None and tokens > 1
        if groups > 1 and query.is_cuda and query.dtype == torch.float32:  # flash attention takes half precision only
            key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
        mixed = attention(query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=groups > 1)
        return mixed.transpose(1, 2), None
    folded = query.reshape(rows, key.shape[1], groups * tokens, width)
    mask = attention_mask
    if mask is not None:
        mask = once(mask, "folded", lambda mask: mask.repeat(1, 1, groups, 1))
    mixed = attention(folded, key, value, mask, scale=scaling)
    if tokens == 1:
        return mixed.reshape(rows, 1, heads, width), None
    # Kernels lay their result out as they like: (rows, heads, tokens, width), or tokens before heads.
    apart = mixed.unflatten(2, (groups, tokens)).permute(0, 3, 1, 2, 4)
    return apart.reshape(rows, tokens, heads, width), None


def once(tensor: Tensor, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What `make` makes of a tensor, kept with it: all layers of a pass share both."""
    made = getattr(tensor, name, None)
    if made is None:
        made = make(tensor)
        setattr(tensor, name, made)
    return made
