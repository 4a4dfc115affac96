"""When to stop drafting. A policy sees only what a running decoder can see: the drafts so far and their confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from probekit.errors import InputError


class Policy(Protocol):
    """Decides after each draft whether its round drafts another; the draft length K stays the most.

    exact: whether a trace predicts the rounds exactly. needs_confidence: whether `goes_on` looks at it; if not, the
    host need not wait for it.
    """

    exact: bool
    needs_confidence: bool

    def goes_on(self, drafted: int, confidence: float) -> bool:
        """drafted: drafts of this round so far. confidence: the drafter's probability of the last one."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always draft k = min(K, M - i - 1) tokens."""

    exact = True
    needs_confidence = False

    def goes_on(self, drafted: int, confidence: float) -> bool:
        return True


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Stop after a draft whose probability is below `threshold`; that draft is still verified.

    The probability is that of the distribution drafted from; for greedy drafts, at temperature 1. Predictions for
    this policy are estimates: what is drafted after a mismatch is not in a trace.
    """

    threshold: float
    exact = False
    needs_confidence = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InputError(f"the confidence threshold must lie in [0, 1], not {self.threshold}.")

    def goes_on(self, drafted: int, confidence: float) -> bool:
        return confidence >= self.threshold
