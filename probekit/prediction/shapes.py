"""Shapes of trees for an exit: how likely each rank is the model's token, and the trees that make the most of it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from probekit.drafting.trees import MOST_NODES, TreeShape
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.traces.trace import Trace

RANKS = 8  # children of a node at most


def rank_shares(trace: Trace, exit_layer: int, ranks: int = RANKS) -> np.ndarray:
    """(ranks,): the share of generated tokens that are the exit's best, its second best, ..."""
    found = np.concatenate([trace.values(prompt, "rank")[exit_layer] for prompt in trace.prompts])
    return np.bincount(found[found < ranks], minlength=ranks) / len(found)


def grown(shares: Sequence[float] | np.ndarray, nodes: int, depth: int) -> TreeShape:
    """The tree of so many nodes, at most so deep, in which most drafts are expected to be accepted.

    Sequoia's objective (arXiv 2402.12374): with ranks that are independent from token to token, a node is accepted with
    the product of the shares along its path, and a tree expects the sum over its nodes. A child is never worth more
    than its parent, nor a rank than a better one, so the most valuable nodes make a tree: they are taken off a heap.
    """
    if nodes < 1 or nodes > MOST_NODES or depth < 1:
        raise InputError(f"a tree of {nodes} nodes in {depth} levels cannot be: it has 1 to {MOST_NODES} nodes.")
    falling = np.minimum.accumulate(np.asarray(shares, dtype=np.float64))
    heap: list[tuple[float, tuple[int, ...]]] = [(-falling[0], (0,))]
    taken: list[tuple[int, ...]] = []
    while heap and len(taken) < nodes:
        worth, path = heapq.heappop(heap)
        taken.append(path)
        before = worth / falling[path[-1]] if falling[path[-1]] else 0.0
        if path[-1] + 1 < len(falling):
            heapq.heappush(heap, (before * falling[path[-1] + 1], (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (worth * falling[0], (*path, 0)))
    return TreeShape(tuple(taken))


def expected_accepted(shape: TreeShape, shares: Sequence[float] | np.ndarray) -> float:
    """Accepted drafts of a round, expected with independent ranks. A trace gives the exact number instead."""
    return float(sum(np.prod([shares[rank] for rank in path]) for path in shape.paths))


def candidates(trace: Trace, exit_layer: int, most_nodes: int, deepest: int) -> list[TreeShape]:
    """The best trees of several sizes and depths, each once."""
    shares = rank_shares(trace, exit_layer)
    sizes = [size for size in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if size <= most_nodes]
    shapes = [grown(shares, size, depth) for depth in range(1, deepest + 1) for size in sizes]
    return list(dict.fromkeys(shapes))
