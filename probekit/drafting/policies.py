"""When to stop drafting. A policy sees only what a running decoder can see: the drafts so far and their confidence.

The same object drives the decoder and the prediction from a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np

from probekit.errors import InputError


@runtime_checkable
class Policy(Protocol):
    """Decides after each draft whether its round drafts another; the draft length K stays the most.

    A function of its arguments alone: the rows of a batch take turns, so nothing may be kept between two calls.

    exact: whether a trace predicts the rounds exactly. needs_confidence: whether `keep_drafting` looks at it; if not,
    the host need not wait for it, and it is NaN. One that looks at another figure of the last draft's logits than its
    probability says which by an attribute `looks_at`, one of CONFIDENCES; one that looks at the residual itself is a
    ResidualPolicy.
    """

    @property
    def exact(self) -> bool: ...

    @property
    def needs_confidence(self) -> bool: ...

    def keep_drafting(self, drafted: int, confidence: float) -> bool:
        """drafted: drafts of this round so far. confidence: the drafter's probability of the last one."""
        ...


CONFIDENCES = ("probability", "entropy", "margin")
"""What a drafter can say of its last draft: its probability; the entropy (nats) of what it was drawn from; and for
greedy drafts how far its logit stands above the next one's."""


def looks_at(policy: Policy) -> str:
    """Which of CONFIDENCES a policy is told."""
    return getattr(policy, "looks_at", CONFIDENCES[0])


@runtime_checkable
class ResidualPolicy(Policy, Protocol):
    """Looks at the residual that the exit drafts from, by a function of it that both a decoder and a trace compute."""

    @property
    def exit_layer(self) -> int:
        """E: whose residuals it reads."""
        ...

    def of_residuals(self, residuals: Any) -> Any:
        """What `keep_drafting` is told of a draft. residuals: (..., width), an array or a tensor. Returns (...)."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always draft k = min(K, M - i - 1) tokens."""

    exact = True
    needs_confidence = False

    def keep_drafting(self, drafted: int, confidence: float) -> bool:
        return True


FIXED = FixedLength()


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Stop after a draft whose probability is below `threshold`; that draft is still verified.

    The probability is that of the distribution drafted from; for greedy drafts, at temperature 1. What is drafted
    after a mismatch is not in a trace: accepted tokens and rounds are predicted exactly, drafted tokens estimated.
    """

    threshold: float
    exact = False
    needs_confidence = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InputError(f"the confidence threshold must lie in [0, 1], not {self.threshold}.")

    def keep_drafting(self, drafted: int, confidence: float) -> bool:
        return confidence >= self.threshold


@dataclass(frozen=True)
class EntropyThreshold:
    """Stop after a draft that was drawn from a distribution of more than `threshold` nats; it is still verified.

    As AdaEDL (arXiv 2410.18351) bounds the chance of acceptance by the entropy, with a threshold that stays.
    """

    threshold: float
    exact = False
    needs_confidence = True
    looks_at = "entropy"

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and np.isfinite(self.threshold)):
            raise InputError(f"the entropy threshold must be a number of at least 0 (nats), not {self.threshold}.")

    def keep_drafting(self, drafted: int, confidence: float) -> bool:
        return confidence <= self.threshold


@dataclass(frozen=True)
class MarginThreshold:
    """Stop after a draft whose logit is less than `threshold` above the next one; it is still verified."""

    threshold: float
    exact = False
    needs_confidence = True
    looks_at = "margin"

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and np.isfinite(self.threshold)):
            raise InputError(f"the margin threshold must be a number of at least 0, not {self.threshold}.")

    def keep_drafting(self, drafted: int, margin: float) -> bool:
        return margin >= self.threshold


POLICIES: dict[str, Callable[..., Policy] | str] = {
    "fixed": FixedLength,
    "confidence": ConfidenceThreshold,
    "entropy": EntropyThreshold,
    "margin": MarginThreshold,
    "heuristic": "probekit.drafting.round_policies.Heuristic",
    "del": "probekit.drafting.round_policies.DynamicExit",
}
"""By the names that the command line knows; a text says where the policy is."""


PROBE = "probe"
"""In front of a file: `probe:FILE` or `probe:FILE:0.6`, a policy that a probe was exported as."""


def policy_named(text: str) -> Policy:
    """The policy that a text names: `fixed`, `confidence:0.6`, or `module.Class` of your own, `:` before each number.

    Raises InputError for a name or numbers that make no policy.
    """
    if text.partition(":")[0] == PROBE:
        from probekit.drafting.probe_policy import probe_policy_named

        return probe_policy_named(text)
    name, *numbers = text.split(":")
    known = POLICIES.get(name, name)
    make = _imported(known) if isinstance(known, str) else known
    if make is None:
        raise InputError(
            f"there is no policy {name!r}: there are {', '.join((*POLICIES, PROBE))}.",
            "Write confidence:0.6, or module.Class for one of your own.",
        )
    try:
        policy = make(*map(float, numbers))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{text!r} makes no policy: {error}.", "Write its numbers behind colons: confidence:0.6."
        ) from None
    if not isinstance(policy, Policy):
        raise InputError(f"{name} is no policy: it lacks exact, needs_confidence or keep_drafting.")
    return policy


def _imported(name: str) -> Callable[..., Policy] | None:
    module, _, attribute = name.rpartition(".")
    if not module:
        return None
    try:
        return getattr(import_module(module), attribute, None)
    except ImportError:
        return None


def drafts_allowed(policy: Policy, confidence: np.ndarray | None, positions: int, longest: int) -> np.ndarray:
    """How many drafts a policy lets a round have that starts at each output position: (positions,) int32, 1..longest.

    confidence: (positions,) the drafter's, on the model's own text; None where the policy does not look at it. Past a
    mismatch, and past the end of the text, a decoder may see another one.
    """
    allowed = np.full(positions, longest, dtype=np.int32)
    counts_none = (ConfidenceThreshold, EntropyThreshold, MarginThreshold)
    if confidence is not None and (isinstance(policy, counts_none) or getattr(policy, "counts_drafts", True) is False):
        # these do not count drafts, so that one look at each position settles all rounds
        places = np.arange(positions, dtype=np.int32)
        goes_on = [policy.keep_drafting(1, each) for each in confidence.tolist()]
        stop = np.where(goes_on, np.int32(positions + longest), places)
        return np.minimum(np.minimum.accumulate(stop[::-1])[::-1] - places + 1, longest)
    for start in range(positions):
        for drafted in range(1, longest):
            place = start + drafted - 1
            if place >= positions:
                break
            if not policy.keep_drafting(drafted, np.nan if confidence is None else float(confidence[place])):
                allowed[start] = drafted
                break
    return allowed
