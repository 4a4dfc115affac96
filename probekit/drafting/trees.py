"""What one round drafts: a tree of tokens below each row's last one. A chain is the simplest tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probekit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class DraftTree(NamedTuple):
    """The drafts of one round, k nodes in each row; all rows have the same shape.

    written: (rows, 1 + k), each row's last token, the root, and its drafts.
    parents: (k,) the place in `written` of what each draft follows; 0 is the root.
    probabilities: (rows, k, vocabulary) what the drafts were drawn from; None when greedy, or without a draft.
    limits: how many of the k count in each row.
    branches: whether the drafts were written as a tree, whose accepted path is moved together; a chain needs no moving.
    """

    written: Tensor
    parents: tuple[int, ...]
    probabilities: Tensor | None
    limits: list[int]
    branches: bool = False

    @classmethod
    def chain(cls, written: Tensor, probabilities: Tensor | None, limits: list[int]) -> DraftTree:
        """Each draft follows the one before it."""
        return cls(written, tuple(range(written.shape[1] - 1)), probabilities, limits)

    @property
    def tokens(self) -> Tensor:
        """(rows, k)."""
        return self.written[:, 1:]

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))


MOST_NODES = 256


@dataclass(frozen=True)
class TreeShape:
    """Which drafts a tree holds, by ranks: the node (1, 0) is the drafter's best token after its second best.

    paths: of each node below the root, level by level; a node's parent is there as well, and so are better ranks.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        there = {(), *self.paths}
        for path in self.paths:
            better = (*path[:-1], path[-1] - 1) if path and path[-1] > 0 else path[:-1]
            if not path or min(path) < 0 or path[:-1] not in there or better not in there:
                raise InputError(f"a tree cannot hold {path} without its parent and every better rank beside it.")
        if not self.paths or len(there) != len(self.paths) + 1 or len(self.paths) > MOST_NODES:
            raise InputError(f"a tree has 1 to {MOST_NODES} distinct nodes, not {len(self.paths)}.")
        object.__setattr__(self, "paths", tuple(sorted(self.paths, key=lambda path: (len(path), path))))

    @classmethod
    def of_widths(cls, widths: Iterable[int]) -> TreeShape:
        """Every node of a level has so many children: 4, 2, 1 makes 4 + 8 + 8 nodes."""
        paths: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for width in widths:
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
            if len(paths) > MOST_NODES:
                break
        return cls(tuple(paths))

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    @cached_property
    def depths(self) -> np.ndarray:
        """(1 + nodes,) of each node, the root first."""
        return np.array([0, *map(len, self.paths)])

    @cached_property
    def sizes(self) -> np.ndarray:
        """(depth + 1,) nodes down to each level: those of a round that may accept no more."""
        return np.array([int((self.depths <= level).sum()) - 1 for level in range(self.depth + 1)])

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """(nodes,) the place of each node's parent, the root at 0."""
        place = {(): 0} | {path: 1 + at for at, path in enumerate(self.paths)}
        return tuple(place[path[:-1]] for path in self.paths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """(1 + nodes,) the places of each node's children, the best rank first."""
        found: list[list[int]] = [[] for _ in range(1 + len(self.paths))]
        for at, parent in enumerate(self.parents):
            found[parent].append(1 + at)
        return tuple(map(tuple, found))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """(depth + 1,) nodes of each level, the root's first."""
        return tuple(np.bincount(self.depths).tolist())

    @cached_property
    def parents_by_level(self) -> tuple[int, ...]:
        """(depth + 1,) nodes of each level that have children."""
        above = [bool(each) for each in self.children]
        return tuple(int(each) for each in np.bincount(self.depths, weights=above))

    @cached_property
    def ancestors(self) -> np.ndarray:
        """(1 + nodes, 1 + nodes) bool: whether a node (row) is or follows another (column)."""
        table = np.eye(1 + len(self.paths), dtype=bool)
        for at, parent in enumerate(self.parents):
            table[1 + at] |= table[parent]
        return table

    def runs(self, ranks: np.ndarray, levels: int) -> np.ndarray:
        """(N,) int32: how many levels down, `levels` at most, the text's tokens lead from each position.

        ranks: (N,) of the text's tokens among the drafter's, each given the text before it.
        """
        nowhere = 1 + len(self.paths)
        widest = max(map(len, self.children))
        below = np.full((nowhere + 1, widest + 1), nowhere)  # the last column and row lead nowhere
        for node, children in enumerate(self.children):
            below[node, : len(children)] = children
        capped = np.append(np.minimum(ranks, widest), np.full(levels, widest))  # past its end a text has no token
        here, run = np.zeros(len(ranks), dtype=np.int64), np.zeros(len(ranks), dtype=np.int32)
        for level in range(levels):
            here = below[here, capped[level : level + len(ranks)]]
            run += here < nowhere
        return run

    def __str__(self) -> str:
        """As `tree_shape_named` reads it: widths where all nodes of a level are alike, else the children of each."""
        return self._text

    @cached_property
    def _text(self) -> str:
        widths = []
        for level in range(self.depth):
            counts = {len(self.children[place]) for place in np.flatnonzero(self.depths == level).tolist()}
            if len(counts) > 1:
                return "/".join(str(len(each)) for each in self.children)
            widths.append(str(counts.pop()))
        return "x".join(widths)


def tree_shape_named(text: str) -> TreeShape:
    """The shape that a text names: `4x2x1`, the children of every node of each level; or `2/1/0/0`, those of each node,
    the root first and level by level. Raises InputError for what names none."""
    try:
        if "/" not in text:
            widths = [int(width) for width in text.split("x")]
            if min(widths) < 1:
                raise ValueError
            return TreeShape.of_widths(widths)
        paths: list[tuple[int, ...]] = [()]
        for place, count in enumerate(map(int, text.split("/"))):
            paths += [(*paths[place], rank) for rank in range(count)]
        if len(paths) != len(text.split("/")):
            raise ValueError
        return TreeShape(tuple(paths[1:]))
    except (ValueError, IndexError):
        raise InputError(
            f"{text!r} names no shape of a tree.", "Write 4x2x1: the children of every node of each level."
        ) from None


def no_invariant_trees() -> InputError:
    return InputError(
        "a tree of drafts is not verified batch-invariantly: its keys stand in another order than the text's.",
        "Draft chains, or leave batch-invariance out.",
    )
