"""Passes whose rows do not depend on each other, bit for bit: neither on how many there are nor on their places.

A product of other sizes is computed by another kernel, which adds up in another order. So every pass runs in blocks of
one size: AT_ONCE tokens, of whatever sequences, as a batch of that many rows with one token each; the last block is
filled up. All tokens of a block see the same number of slots, which follows from their positions alone, and attention
takes them one by one. A token's logits then follow from the text before it, whoever computes them: an autoregressive
step, a verification, a batch of prompts or the tracer.

That a row's place in a block decides of nothing is tried on the model at hand. Where it does (an activation whose
share of a thread ends within a vector; experts, whose products are of as many rows as chose them), blocks are of one
token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from probekit.decoding.caches import PassPositions, PositionCache
from probekit.decoding.engine import Engine, bucket
from probekit.drafting.trees import TreeShape, no_invariant_trees
from probekit.errors import Remark
from probekit.hooks.fast_forward import fast_forward, fast_head
from probekit.models.anatomy import Anatomy
from probekit.models.in_blocks import InBlocks

AT_ONCE = 8
"""Tokens of a block: a verification of up to 7 drafts is one."""

_chosen: WeakKeyDictionary[object, dict[str, int]] = WeakKeyDictionary()  # of each model, by how it runs


def open_engine(parts: Anatomy, rows: int, length: int) -> Engine:
    """An engine as the anatomy asks for: batch-invariant, or not."""
    return InvariantEngine(parts, rows, length) if parts.batch_invariant else Engine(parts, rows, length)


@dataclass(frozen=True, eq=False)
class BlockPositions(PassPositions):
    """Of one block: the sequence of each of its tokens, (tokens,), and its slot, (tokens,)."""

    sequences: Tensor


class Block(NamedTuple):
    """Some tokens of a pass. order: (AT_ONCE,) which ones, the last `real` of them over and over."""

    order: Tensor
    real: int
    positions: BlockPositions


class PassBlocks(NamedTuple):
    """The blocks of a pass. back: (rows * tokens,) where each token is, in the order of the blocks."""

    blocks: list[Block]
    back: Tensor


class BlockCache(PositionCache):
    """The same cache, written and read by tokens of any sequences at once."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (tokens, heads, 1, head width); return (tokens, heads, visible, head width)."""
        places = self.places
        if not isinstance(places, BlockPositions):
            raise RuntimeError("this cache was not told where the block stands")
        return tuple(  # type: ignore[return-value]
            self._written(held, states, places)
            for held, states in zip(self.layer(layer_idx), (key_states, value_states), strict=True)
        )

    def _written(self, held: Tensor, states: Tensor, places: BlockPositions) -> Tensor:
        held[places.sequences, :, places.slots] = states[:, :, 0]
        seen = held[:, :, : places.visible]
        return seen.expand(len(states), -1, -1, -1) if self.rows == 1 else seen[places.sequences]


class InvariantEngine(Engine):
    """The layers of a model over a cache, in blocks; passes are those of `Engine`.

    at_once: tokens of a block; by default as many as the model allows, AT_ONCE or one.
    """

    def __init__(self, parts: Anatomy, rows: int, length: int, at_once: int | None = None) -> None:
        super().__init__(parts, rows, bucket(length))
        self.at_once = tokens_at_once(parts) if at_once is None else at_once
        self.parts = in_blocks(parts, self.at_once)
        self._head = self.by_row(fast_head(parts))
        self.cache = BlockCache(parts, rows, bucket(length))

    def by_row(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return InBlocks(function, self.at_once)

    def places(self, starts: Sequence[int], tokens: int) -> Any:
        """A pass over each row's next `tokens` tokens, cut into blocks: earlier positions first."""
        starts = [*starts] * self.cache.rows if len(starts) == 1 else starts  # one position for all
        every = [(start + at, row) for row, start in enumerate(starts) for at in range(tokens)]
        order = sorted(range(len(every)), key=lambda place: every[place])
        blocks = []
        for visible, group in groupby(order, key=lambda place: bucket(every[place][0] + 1)):
            same = list(group)
            for first in range(0, len(same), self.at_once):
                blocks.append(self._block(same[first : first + self.at_once], every, visible))
        return PassBlocks(blocks, torch.tensor(order, device=self.parts.device).argsort())

    def _block(self, chosen: list[int], every: list[tuple[int, int]], visible: int) -> Block:
        filled = [*chosen, *chosen[-1:] * (self.at_once - len(chosen))]
        table = torch.tensor([(place, *every[place]) for place in filled], device=self.parts.device)
        order, slots, sequences = table.unbind(1)
        positions = slots[:, None]
        kinds = {}
        for kind, (cos, sin) in self._rotary.items():
            mask: Any = self.parts.family.mask(kind, positions, visible, self.parts.dtype)
            mask.counted = len(chosen)  # as `hooks.attention.rows_apart` reads it
            kinds[kind] = self._layer_inputs(mask, positions, (cos[0][positions], sin[0][positions]))
        return Block(order, len(chosen), BlockPositions(slots, visible, kinds, self._kinds, sequences))

    def tree_places(self, starts: Sequence[int], shape: TreeShape, nodes: range) -> PassPositions:
        raise no_invariant_trees()

    def early(self, tokens: Tensor, places: Any, exit_layer: int) -> Tensor:
        return self._in_turn(partial(super().early, exit_layer=exit_layer), tokens, places)

    def late(self, residual: Tensor, places: Any, exit_layer: int) -> Tensor:
        return self._in_turn(partial(super().late, exit_layer=exit_layer), residual, places)

    def _in_turn(self, run: Callable[[Tensor, PassPositions], Tensor], given: Tensor, places: PassBlocks) -> Tensor:
        """One block after the other. given: (rows, tokens[, width]). Returns (rows, tokens, width)."""
        shape, flat = given.shape[:2], given.flatten(0, 1)[:, None]
        before, kept, found = self.watched, {site: list[Tensor]() for site in self.watched}, list[Tensor]()

        def put_together(pieces: list[Tensor]) -> Tensor:
            return torch.cat(pieces)[places.back].view(*shape, -1)

        try:
            for block in places.blocks:
                self.watched = {site: [] for site in before}
                found.append(run(flat[block.order], block.positions)[: block.real])
                for site, passes in self.watched.items():
                    kept[site] += [each[: block.real] for each in passes]
        finally:
            self.watched = before
        for site, pieces in kept.items():
            before[site] += [put_together(pieces)] if pieces else []
        return put_together(found)


def in_blocks(parts: Anatomy, at_once: int | None = None) -> Anatomy:
    """`parts` with fast layers that take blocks of one-token rows, and with norm and head of any rows, in blocks."""
    rows = tokens_at_once(parts) if at_once is None else at_once
    fast: Any = fast_forward(parts, apart=rows > 1)
    return replace(fast, norm=InBlocks(fast.norm, rows), head=InBlocks(fast_head(parts), rows))


@torch.inference_mode()
def tokens_at_once(parts: Anatomy) -> int:
    """Tokens of a block for this model, in its dtype, on its device, with these threads: AT_ONCE, or 1.

    Tried once, on a block whose tokens change places. Warns (Remark) where it must be one.
    """
    known = _chosen.setdefault(parts.model, {})
    how = f"{parts.dtype} {parts.device} {parts.config._attn_implementation} {torch.get_num_threads()}"
    if how not in known:
        known[how] = AT_ONCE if _places_are_alike(parts) else 1
        if known[how] == 1:
            warnings.warn(
                "what this model computes of a token depends on its place among others: batch-invariant passes take "
                "one token at a time, and a verification costs as much as that many steps.",
                Remark,
                stacklevel=2,
            )
    return known[how]


def _places_are_alike(parts: Anatomy) -> bool:
    """Whether a token's logits are the same bits in every place of a block, whatever stands in the others."""
    engine = InvariantEngine(parts, AT_ONCE, 1, at_once=AT_ONCE)
    places, many = engine.places([0] * AT_ONCE, 1), torch.arange(AT_ONCE, device=parts.device)[:, None]

    def logits(ids: Tensor) -> Tensor:
        return engine.logits(engine.full(ids % parts.vocabulary, places))

    ids = many * 7919 + 13
    first = logits(ids)
    for shift in range(1, AT_ONCE):
        others = (many + shift * AT_ONCE) * 104729 + 17
        others[shift] = ids[0]
        moved = logits(ids.roll(shift, 0)).roll(-shift, 0)
        if not (torch.equal(moved, first) and torch.equal(logits(others)[shift], first[0])):
            return False
    return True
