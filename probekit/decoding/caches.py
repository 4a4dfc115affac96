"""A key-value cache that each pass writes at the positions it is given: rollback is only a smaller position.

Nothing is ever cut, copied or concatenated. A slot is a position of the sequence; what a rejected draft left there is
overwritten before any row can see it, because a row at position s sees the slots up to s and a pass writes its own
slots first. So layers below and above an exit may be filled to different lengths at any moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from probekit.models.anatomy import Anatomy
from probekit.models.family import LayerKind


@dataclass(frozen=True, eq=False)
class PassPositions:
    """Where the tokens of one pass stand: computed once, used by every layer that the pass runs through.

    Parameters
    ----------
    slots: (rows, key-value heads, tokens, head width) int64, the slot of each written number (an expanded view).
    visible: the pass sees slots 0..visible-1 at most.
    kinds: what the layers of each kind take: position_ids, position_embeddings, attention_mask. There is no mask
        where none is needed: one token that sees all, or a prefix that is causal from slot 0.
    layers: the kind of each layer.
    """

    slots: Tensor
    visible: int
    kinds: Mapping[LayerKind, dict[str, Any]]
    layers: Sequence[LayerKind]

    @property
    def inputs(self) -> dict[str, Any]:
        """What the first layer takes, and with it every layer of a model whose layers are alike."""
        return self.kinds[self.layers[0]]

    @property
    def each(self) -> list[dict[str, Any]]:
        """What each layer takes."""
        return [self.kinds[kind] for kind in self.layers]


class PositionCache(Cache):
    """A static cache whose layers write at `places` and return a prefix view.

    keys, values: (layers, rows, key-value heads, length, head width), zeros at first: a masked slot still takes part
    in products, so it must hold numbers.
    """

    def __init__(self, parts: Anatomy, rows: int, length: int) -> None:
        super().__init__(layers=[])
        shape = cache_shape(parts, rows, length)
        self.keys = torch.zeros(shape, dtype=parts.dtype, device=parts.device)
        self.values = torch.zeros(shape, dtype=parts.dtype, device=parts.device)
        self.rows = rows
        self.length = length
        self.places: PassPositions | None = None
        self._views = list(zip(self.keys, self.values, strict=True))

    def clear(self) -> None:
        """Zeros in all slots of all rows again: what a batch left might not be numbers."""
        self.keys.zero_()
        self.values.zero_()
        self.rows = self.keys.shape[1]
        self._views = list(zip(self.keys, self.values, strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, tokens, head width) at the places; return (rows, heads, visible, head width)."""
        places = self.places
        if places is None:
            raise RuntimeError("this cache was not told where the pass stands")
        keys, values = self._views[layer_idx]
        keys.scatter_(2, places.slots, key_states)
        values.scatter_(2, places.slots, value_states)
        return keys[:, :, : places.visible], values[:, :, : places.visible]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, key-value heads, length, head width) each: views."""
        return self._views[index]

    def slots(self, positions: Tensor) -> Tensor:
        """positions: (rows, tokens) or (1, tokens) for all rows. Returns the slots for PassPositions."""
        heads, width = self.keys.shape[2], self.keys.shape[4]
        return positions[:, None, :, None].expand(self.rows, heads, -1, width)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, in this order; each may only move to a smaller or equal number."""
        for place, row in enumerate(rows):
            if place != row:
                self.keys[:, place].copy_(self.keys[:, row])
                self.values[:, place].copy_(self.values[:, row])
        self.rows = len(rows)
        self._views = [
            (keys[: self.rows], values[: self.rows]) for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def gather(self, row: int, start: int, slots: Sequence[int]) -> None:
        """Move what a row's `slots` hold to start, start + 1, ..: a tree's accepted path becomes the text."""
        places = torch.tensor(list(slots), device=self.keys.device)
        for numbers in (self.keys, self.values):
            numbers[:, row, :, start : start + len(slots)] = numbers[:, row, :, places]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots that the present pass sees: with places given from outside there is no other length."""
        return self.places.visible if self.places is not None else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.length


def cache_shape(parts: Anatomy, rows: int, length: int) -> tuple[int, int, int, int, int]:
    """(layers, rows, key-value heads, length, head width)."""
    return parts.depth, rows, parts.key_value_heads // parts.split_over, length, parts.head_dim


def cache_bytes(parts: Anatomy, rows: int, length: int) -> int:
    """Bytes of keys and values together."""
    numbers = torch.Size(cache_shape(parts, rows, length)).numel()
    return 2 * numbers * torch.empty((), dtype=parts.dtype).element_size()
