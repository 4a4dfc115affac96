"""A way of drafting: who drafts, how far, and by which policy. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probekit.drafting.drafters import Drafter, check_reads
from probekit.drafting.keys import MODEL, DrafterKey, check_draft_length
from probekit.drafting.policies import FIXED, Policy
from probekit.drafting.round_policies import RoundPolicy
from probekit.errors import InputError


@dataclass(frozen=True, eq=False)
class Way:
    """Simulated from a trace (`prediction.replay`) and run by a decoder (`decoding.speculative.Speculative`) alike.

    Parameters
    ----------
    drafters: who drafts; several take turns where the policy chooses one for each round.
    draft_length: K, the most drafts of a round.
    policy: when to stop drafting, or whom to ask; never, by default.
    name: of the policy, as tables show it.
    """

    drafters: tuple[Drafter, ...]
    draft_length: int
    policy: Policy = FIXED
    name: str = "fixed"

    def __post_init__(self) -> None:
        check_draft_length(self.draft_length)
        check_turns(self.keys, self.policy)

    @property
    def keys(self) -> tuple[DrafterKey, ...]:
        return tuple(drafter.key for drafter in self.drafters)

    @property
    def label(self) -> str:
        """Who drafts, as tables show it."""
        return self.keys[0].label if len(self.keys) == 1 else f"{len(self.keys)} drafters in turn"

    @property
    def method(self) -> str:
        exits = all(key.is_exit for key in self.keys)
        return DrafterKey.exit(1).method if exits else self.keys[0].method


def check_turns(keys: Sequence[DrafterKey], policy: Policy) -> None:
    """Raise InputError for drafters that cannot take turns, and for a policy that reads another exit."""
    if not keys or len(set(keys)) != len(keys):
        raise InputError("a way of drafting needs drafters, each of them once.")
    check_reads(keys[0], policy)
    if len(keys) > 1 and not isinstance(policy, RoundPolicy):
        raise InputError(
            f"{len(keys)} drafters take turns, and {type(policy).__name__} does not say whose turn it is.",
            "Give one drafter, or a policy that chooses for each round.",
        )
    if len(keys) > 1 and any(key.kind == MODEL for key in keys):
        raise InputError(
            "a draft model cannot take turns with other drafters: it would have missed what they wrote.",
            "Let exits and lookups take turns.",
        )
