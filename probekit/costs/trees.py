"""What rounds that draft a tree cost beside rounds that draft a chain: passes and heads over several rows, the tree's
mask and positions, the choice of several tokens, the walk from the root down.

A few trees are drafted and verified by the decoder's own proposer at two exits. Passes of the early layers and heads
are timed by how many rows they have, and read off straight lines between; what the verification takes longer than a
chain's of as many rows is fitted as a line in the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.drafting.trees import TreeShape

WIDTHS = ((2,), (3,), (2, 1, 1), (4, 1), (3, 2, 1), (8, 1))
"""Of the trees that are timed, as far as the costs know passes as wide; and one level as wide as that."""


@dataclass(frozen=True)
class TreeCosts:
    """Seconds of the steps of a tree's round.

    early_s: {(E, rows): layers 0..E-1 over the nodes of one level; one row is the root, the round's first pass}.
    head_s: {rows: norm, head and choice of the children of so many nodes}.
    once_s, node_s: what the verification takes longer than a chain's of as many rows, once and for each node.
    """

    early_s: Mapping[tuple[int, int], float]
    head_s: Mapping[int, float]
    once_s: float
    node_s: float

    def drafting_seconds(self, exit_layer: int, shape: TreeShape, levels: int) -> float:
        """Of the first levels of a tree: a pass for the root and each level, a head before each level."""
        passes = {width: seconds for (at, width), seconds in self.early_s.items() if at == exit_layer}
        early = sum(read_off(passes, rows) for rows in shape.widths[: levels + 1])
        return early + sum(read_off(self.head_s, rows) for rows in shape.parents_by_level[:levels])

    def longer_seconds(self, nodes: int) -> float:
        """What the verification of so many nodes takes longer than a chain's."""
        return max(0.0, self.once_s + self.node_s * nodes)

    def to_json(self) -> dict[str, Any]:
        return {
            "early_s": [{"exit_layer": at, "rows": rows, "seconds": each} for (at, rows), each in self.early_s.items()],
            "head_s": [{"rows": rows, "seconds": each} for rows, each in self.head_s.items()],
            "once_s": self.once_s,
            "node_s": self.node_s,
        }

    @staticmethod
    def values(document: Mapping[str, Any]) -> dict[str, Any]:
        """The fields by name, of what `to_json` wrote."""
        return {
            "early_s": {(row["exit_layer"], row["rows"]): row["seconds"] for row in document["early_s"]},
            "head_s": {row["rows"]: row["seconds"] for row in document["head_s"]},
            "once_s": document["once_s"],
            "node_s": document["node_s"],
        }


def read_off(seconds: Mapping[int, float], rows: int) -> float:
    """Seconds at so many rows, on straight lines between those that were timed, and on the last one beyond them."""
    widths = sorted(seconds)
    if rows > widths[-1] and len(widths) > 1:
        low, high = widths[-2:]
        slope = max(0.0, (seconds[high] - seconds[low]) / (high - low))
        return seconds[high] + slope * (rows - high)
    return float(np.interp(rows, widths, [seconds[width] for width in widths]))


def timed_shapes(longest: int) -> list[TreeShape]:
    """The trees to time where a verification is at most longest + 1 rows wide."""
    shapes = [TreeShape.of_widths(widths) for widths in (*WIDTHS, (longest,))]
    return list(dict.fromkeys(shape for shape in shapes if len(shape.paths) <= longest))


def timed_exits(depth: int) -> list[int]:
    """The exits to time them at: the first, and the one in the middle."""
    return sorted({1, max(1, depth // 2)})


def assemble_trees(
    median: Mapping[str, float], depth: int, verify_s: Mapping[tuple[int, int], float]
) -> TreeCosts | None:
    """From the medians of the steps by name (`costs.timing`); None where no tree was timed.

    verify_s: {(E, rows)} of chains.
    """
    passes, heads, longer = dict[int, dict[int, float]](), dict[int, float](), list[tuple[int, float]]()
    for step, seconds in median.items():
        match step.split():
            case ["tree", "early", exit_layer, rows]:
                passes.setdefault(int(rows), {})[int(exit_layer)] = seconds + median["tree level"]
            case ["tree", "head", rows]:
                heads[int(rows)] = seconds
            case ["tree", "verify", exit_layer, rows]:
                longer.append((int(rows) - 1, seconds - verify_s[int(exit_layer), int(rows)]))
    if not passes:
        return None
    slope, once = _line(longer)
    early = {(at, rows): _along(known, at) for rows, known in sorted(passes.items()) for at in range(1, depth)}
    return TreeCosts(early, dict(sorted(heads.items())), once, slope)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Slope and intercept; of one place, no slope."""
    nodes, seconds = np.array(points, dtype=float).T
    if len(set(nodes)) < 2:
        return 0.0, float(seconds.mean())
    slope, intercept = np.polyfit(nodes, seconds, 1)
    return float(slope), float(intercept)


def _along(known: Mapping[int, float], exit_layer: int) -> float:
    """On the line through two exits; proportional to the layers where one was timed. Never less than nothing."""
    exits = sorted(known)
    if len(exits) == 1:
        return known[exits[0]] * exit_layer / exits[0]
    low, high = exits[0], exits[-1]
    slope = max(0.0, (known[high] - known[low]) / (high - low))
    return known[low] + slope * (exit_layer - low)
