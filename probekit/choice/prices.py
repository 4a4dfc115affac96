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
        asked = (drafter.key, longest)
        if asked not in self._known:
            self._known[asked] = self.costs.rounds_seconds_of(drafter, longest)
        return self._known[asked]

    def watching(self, policy: Policy, drafters: Sequence[Drafter]) -> float:
        """Seconds that a policy's look at exits takes after each round: a norm and head for each."""
        if not isinstance(policy, RoundPolicy):
            return 0.0
        watched = [drafters[place].key.exit_layer for place in policy.watched([each.key for each in drafters])]
        return sum(self.costs.heads_s.get(exit_layer, self.costs.head_s) for exit_layer in watched)
