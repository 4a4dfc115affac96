"""What the rounds of a trace cost: seconds by drafter and number of drafts, asked for once each. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from probekit.costs.profile import Costs
from probekit.drafting.drafters import Drafter
from probekit.drafting.keys import DrafterKey
from probekit.drafting.policies import Policy
from probekit.drafting.round_policies import RoundPolicy


@dataclass(frozen=True)
class Prices:
    """Costs, and the most drafts of a round."""

    costs: Costs
    longest: int
    _known: dict[tuple[DrafterKey, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def plain_s(self) -> float:
        return self.costs.autoregressive_s

    def of(self, drafters: Sequence[Drafter], longest: int | None = None) -> np.ndarray:
        """(drafters, K + 1)."""
        return np.stack([self.row(each, longest or self.longest) for each in drafters])

    def row(self, drafter: Drafter, longest: int) -> np.ndarray:
        """(K + 1,) of one drafter."""
        # The row of a shorter draft is the beginning of a longer one's, but where recorded rounds draft all of theirs.
        whole = longest if self.costs.engine == "cuda" else max(longest, self.longest)
        asked = (drafter.key, whole)
        if asked not in self._known:
            self._known[asked] = self.costs.rounds_seconds_of(drafter, whole)
        return self._known[asked][: longest + 1]

    def watching(self, policy: Policy, drafters: Sequence[Drafter], longest: int) -> np.ndarray:
        """(K + 1,) seconds that a policy's look at exits takes after a round with 0, 1, .. drafts: a norm and head for
        each, over all rows that were verified."""
        if not isinstance(policy, RoundPolicy):
            return np.zeros(longest + 1)
        watched = [drafters[place].key.exit_layer for place in policy.watched([each.key for each in drafters])]
        return sum((self.look(exit_layer, longest) for exit_layer in watched), np.zeros(longest + 1))

    def look(self, exit_layer: int, longest: int) -> np.ndarray:
        """(K + 1,) seconds of one exit's norm and head over the rows of a round with 0, 1, .. drafts."""
        return np.array([self.costs.head_seconds(exit_layer, drafts + 1) for drafts in range(longest + 1)])
