"""What a batch costs while it empties: costs at a few numbers of rows, and straight lines between. Needs no torch.

Our own decoder starts a batch together, and a row whose text has ended leaves it; so a batch of 8 also makes rounds of
7, .. 1 rows. Engines that fill a batch up again are priced at one number of rows (`EngineProfile.costs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from probekit.costs.blocks import redrawn
from probekit.costs.profile import Costs
from probekit.drafting.drafters import Drafter
from probekit.errors import InputError


@dataclass(frozen=True)
class BatchCosts:
    """by_rows: {rows: costs there}, one row among them; all else about them is the same."""

    by_rows: Mapping[int, Costs]

    def __post_init__(self) -> None:
        if 1 not in self.by_rows or any(costs.rows != rows for rows, costs in self.by_rows.items()):
            raise InputError("costs of a batch are those of 1 row, and of more, each of its own number of rows.")
        for costs in self.by_rows.values():
            same = (costs.depth, costs.draft_head, costs.drafter, costs.engine, costs.dtype, costs.device)
            one = self.by_rows[1]
            if same != (one.depth, one.draft_head, one.drafter, one.engine, one.dtype, one.device):
                raise InputError("these costs are of different models, devices or draft heads: they make no batch.")

    @property
    def rows(self) -> int:
        """Rows of the batch when it starts."""
        return max(self.by_rows)

    @property
    def whole(self) -> Costs:
        """The costs of the whole batch."""
        return self.by_rows[self.rows]

    @property
    def longest_draft(self) -> int:
        return min(costs.longest_draft for costs in self.by_rows.values())

    def plain_seconds(self) -> np.ndarray:
        """(rows + 1,) seconds of a step of autoregressive decoding over 0, 1, .. rows."""
        return self._by_rows(lambda costs: np.array([costs.autoregressive_s]))[:, 0]

    def rounds_seconds(self, drafter: Drafter, draft_length: int) -> np.ndarray:
        """(rows + 1, draft_length + 1) seconds of a round over 0, 1, .. rows with 0, 1, .. drafts."""
        return self._by_rows(lambda costs: costs.rounds_seconds_of(drafter, draft_length))

    def redrawn(self, resamples: int) -> Iterator[BatchCosts]:
        """Costs made again from blocks that are drawn again, each number of rows from its own."""
        drawn = {rows: redrawn(costs, resamples, seed=rows) for rows, costs in self.by_rows.items()}
        for each in zip(*drawn.values(), strict=False):  # ends where one of them has no blocks
            yield BatchCosts(dict(zip(drawn, each, strict=True)))

    @classmethod
    def of(cls, rows: int, measure: Callable[[int], Costs]) -> BatchCosts:
        """Of 1, 2, 4, .. and `rows` rows, each as `measure` says."""
        return cls({size: measure(size) for size in sorted({*(2**power for power in range(rows.bit_length())), rows})})

    def _by_rows(self, seconds: Callable[[Costs], np.ndarray]) -> np.ndarray:
        """(rows + 1, ...); no rows take no time."""
        known = sorted(self.by_rows)
        table = np.stack([seconds(self.by_rows[rows]) for rows in known], axis=1)
        lines = [np.interp(np.arange(1, self.rows + 1), known, each) for each in table]
        return np.concatenate([np.zeros((1, len(lines))), np.stack(lines, axis=1)])
