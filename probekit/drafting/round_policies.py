"""Policies that decide at the start of a round who drafts and how far, from what verification has shown so far.

What they see is the model's own text and whether drafts of it were right, which a trace knows as well as a decoder: on
greedy text their rounds are predicted exactly. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from probekit.drafting.keys import DrafterKey
from probekit.drafting.policies import Policy
from probekit.errors import InputError

NOBODY = -1
"""In place of a drafter: this round drafts nothing, and is a step of autoregressive decoding."""


class RoundChoice(NamedTuple):
    """way: the place of the drafter among those that take turns, or NOBODY. length: the most that it drafts."""

    way: int
    length: int


class Verified(NamedTuple):
    """What verification showed of a round.

    emitted: tokens, that of the verification with them. agrees: (watched drafters, emitted) bool, whether each one's
    own draft at each emitted position is the model's token.
    """

    way: int
    drafted: int
    accepted: int
    emitted: int
    agrees: np.ndarray


class Chooser(Protocol):
    """A policy at work on one text."""

    def choose(self) -> RoundChoice:
        """For the next round."""
        ...

    def observe(self, seen: Verified) -> None:
        """After each round that did not end the text."""
        ...


@runtime_checkable
class RoundPolicy(Policy, Protocol):
    """Chooses for each round. Its state is of one text: `begin` makes a chooser for each."""

    def watched(self, ways: Sequence[DrafterKey]) -> tuple[int, ...]:
        """The places of the exits whose own drafts it wants to see at every verified position.

        In a decoder each costs its norm and head over the round's rows.
        """
        ...

    def begin(self, prompt: int, ways: Sequence[DrafterKey], longest: int) -> Chooser:
        """For the text of a prompt. ways: the drafters that take turns. longest: K, the most drafts of a round."""
        ...


@dataclass(frozen=True)
class _DecidesFirst:
    """What policies share that look at nothing once their round began."""

    exact = True
    needs_confidence = False

    def keep_drafting(self, drafted: int, confidence: float) -> bool:
        return True

    def watched(self, ways: Sequence[DrafterKey]) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Heuristic(_DecidesFirst):
    """transformers' `num_assistant_tokens_schedule="heuristic"`: two drafts more after a round whose drafts were all
    accepted, one less (but one at least) after any other. first: drafts of a text's first round.

    transformers knows no greatest length; here the draft length K is.
    """

    first: int = 5

    def __post_init__(self) -> None:
        if self.first != int(self.first) or self.first < 1:
            raise InputError(f"the heuristic begins with {self.first:g} drafts; expected a whole number of at least 1.")

    def begin(self, prompt: int, ways: Sequence[DrafterKey], longest: int) -> Chooser:
        return _Growing(int(self.first), longest)


class _Growing:
    def __init__(self, length: int, longest: int) -> None:
        self.length, self.longest = length, longest

    def choose(self) -> RoundChoice:
        return RoundChoice(0, min(self.length, self.longest))

    def observe(self, seen: Verified) -> None:
        self.length = self.length + 2 if seen.accepted == seen.drafted else max(1, self.length - 1)


@dataclass(frozen=True)
class DynamicExit(_DecidesFirst):
    """The exit and length that promise most tokens for each layer that is run: DEL (arXiv 2504.05598).

    alpha(E), the chance that exit E's draft is the model's token, is estimated from every verified token, as if the
    exit had drafted it (the paper's shadow tokens), older ones counting `decay` times less for each token since. The
    round takes the E and k of the greatest

        (1 - alpha^(k+1)) / (1 - alpha) / (k E + L)

    that is tokens per loaded layer. Of the paper this leaves out its confidence threshold within a round, whose drafts
    behind a mismatch no trace knows. Not in the paper: it drafts nothing where 1 / L is more.

    Parameters
    ----------
    depth: L.
    seconds: in place of layers: {drafter: (K + 1,) seconds of a round with 0, 1, .. drafts}, and `plain_s`, those of an
        autoregressive step.
    """

    depth: int
    decay: float = 0.95
    seconds: Mapping[DrafterKey, Sequence[float]] | None = field(default=None, repr=False)
    plain_s: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.depth != int(self.depth) or self.depth < 2 or not 0 < self.decay <= 1:
            raise InputError(
                f"a dynamic exit of {self.depth:g} layers with a decay of {self.decay} makes no policy: expected 2 or "
                "more layers, and a decay in (0, 1]."
            )

    def watched(self, ways: Sequence[DrafterKey]) -> tuple[int, ...]:
        return tuple(range(len(ways)))

    def begin(self, prompt: int, ways: Sequence[DrafterKey], longest: int) -> Chooser:
        if any(not key.is_exit for key in ways):
            raise InputError("a dynamic exit chooses among exit layers only.", "Leave other drafters out.")
        drafts = np.arange(longest + 1)
        if self.seconds is None:
            price = drafts * np.array([[key.exit_layer] for key in ways]) + int(self.depth)
            plain = float(self.depth)
        else:
            price = np.array([list(self.seconds[key])[: longest + 1] for key in ways])
            plain = float(price[:, 0].min()) if self.plain_s is None else self.plain_s
        return _PerLayer(price, plain, self.decay)


class _PerLayer:
    """price: (ways, K + 1) of a round; plain: of a step without drafts."""

    def __init__(self, price: np.ndarray, plain: float, decay: float) -> None:
        self.price, self.plain, self.decay = price, plain, decay
        self.right = np.ones(len(price))  # as if each exit had been right once and wrong once
        self.seen = 2.0

    def choose(self) -> RoundChoice:
        alpha = self.right / self.seen
        tokens = np.cumsum(alpha[:, None] ** np.arange(self.price.shape[1]), axis=1)
        worth = tokens / self.price
        way, drafts = np.unravel_index(int(worth[:, 1:].argmax()), worth[:, 1:].shape)
        if worth[way, drafts + 1] <= 1 / self.plain:
            return RoundChoice(NOBODY, 0)
        return RoundChoice(int(way), int(drafts) + 1)

    def observe(self, seen: Verified) -> None:
        for right in seen.agrees.T:
            self.right = self.decay * self.right + right
            self.seen = self.decay * self.seen + 1.0


LOOK_BACK = 4
"""Verified tokens that a table looks back on."""


@dataclass(frozen=True)
class Table(_DecidesFirst):
    """What to do after each recent past, learned from a trace (`prediction.learning`).

    The past is whether exit `reference` was right about each of the last LOOK_BACK verified tokens: how often, and
    about the last. What was never seen falls back on `otherwise`.

    choices: {state: (way, length)}.
    """

    reference: int
    choices: Mapping[int, tuple[int, int]]
    otherwise: tuple[int, int]

    def watched(self, ways: Sequence[DrafterKey]) -> tuple[int, ...]:
        return (self.reference,)

    def begin(self, prompt: int, ways: Sequence[DrafterKey], longest: int) -> Chooser:
        return _Looking(self, longest)


class _Looking:
    def __init__(self, table: Table, longest: int) -> None:
        self.table, self.longest = table, longest
        self.past: list[bool] = []

    def choose(self) -> RoundChoice:
        way, length = self.table.choices.get(state_of(self.past), self.table.otherwise)
        return RoundChoice(way, min(length, self.longest))

    def observe(self, seen: Verified) -> None:
        self.past += seen.agrees[0].tolist()


def state_of(past: Sequence[bool]) -> int:
    """0 at the beginning; else how many of the last tokens were right, and whether the last one was."""
    recent = past[-LOOK_BACK:]
    return 0 if not recent else 1 + 2 * sum(recent) + int(recent[-1])


@dataclass(frozen=True)
class Planned(_DecidesFirst):
    """Rounds that were decided beforehand, by output position: the oracle (`prediction.oracle`) plays its plan so.

    plans: {prompt: (2, N) int64, the way and the length of a round that starts at each output position}. Beyond a
    plan's end, and on other prompts, nothing is drafted.
    """

    plans: Mapping[int, np.ndarray] = field(repr=False)

    def begin(self, prompt: int, ways: Sequence[DrafterKey], longest: int) -> Chooser:
        return _Following(self.plans.get(prompt, np.zeros((2, 0), dtype=np.int64)), longest)


class _Following:
    def __init__(self, plan: np.ndarray, longest: int) -> None:
        self.plan, self.longest, self.at = plan, longest, 1

    def choose(self) -> RoundChoice:
        if self.at >= self.plan.shape[1]:
            return RoundChoice(NOBODY, 0)
        way, length = self.plan[:, self.at].tolist()
        return RoundChoice(way, min(length, self.longest))

    def observe(self, seen: Verified) -> None:
        self.at += seen.emitted
