"""Any way of drafting along the texts of a greedy trace: its rounds, one after the other, as a decoder would run them.

Exact in every round for policies that decide at its start. For one that looks at drafts, rounds and accepted tokens are
exact and drafted ones estimated: behind a mismatch it is taken to see what it would have seen on the model's own text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probekit.drafting.drafters import Outlook, allowed_by, outlook, sizes_of
from probekit.drafting.policies import FixedLength
from probekit.drafting.round_policies import NOBODY, RoundChoice, RoundPolicy, Verified
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.prediction.rounds import CUT, FIRST_START

if TYPE_CHECKING:
    from probekit.traces.trace import Trace


class WayRounds(NamedTuple):
    """The rounds of one text, in order: (rounds,) int64 each.

    way: the place of the drafter, or NOBODY. length: drafts one after the other; of a tree its levels. drafted: tokens.
    """

    start: np.ndarray
    way: np.ndarray
    length: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray


@dataclass(frozen=True, eq=False)
class Replay:
    """What a way of drafting does along the texts of a trace.

    prompts: their indices. rounds: of each. tokens_of_prompt: (prompts,) tokens that rounds emit.
    exact: whether drafted tokens are exact, too.
    """

    way: Way
    prompts: tuple[int, ...]
    rounds: tuple[WayRounds, ...]
    tokens_of_prompt: np.ndarray
    exact: bool

    def of_prompt(self, name: str) -> np.ndarray:
        """(prompts,): the sum of "drafted" or "accepted" over each text's rounds; or the number of "rounds"."""
        if name == "rounds":
            return np.array([len(each.start) for each in self.rounds])
        return np.array([int(getattr(each, name).sum()) for each in self.rounds])

    def counts(self) -> dict[str, int]:
        """Over all prompts."""
        named = {name: int(self.of_prompt(name).sum()) for name in ("rounds", "drafted", "accepted")}
        return named | {"tokens": int(self.tokens_of_prompt.sum())}

    def seconds_of_prompt(self, seconds: np.ndarray, plain_s: float, watch_s: np.ndarray | float = 0.0) -> np.ndarray:
        """(prompts,) predicted seconds of each text's rounds.

        seconds: (drafters, K + 1) of a round with 0, 1, .. drafts (levels of a tree). plain_s: of a step without a
        drafter. watch_s: (K + 1,) of what the policy wants to see after a round with 0, 1, .. drafts.
        """
        watch = np.broadcast_to(watch_s, seconds.shape[1:])
        table = np.concatenate([seconds, np.full((1, seconds.shape[1]), plain_s)])  # NOBODY is the last row
        return np.array([float((table[each.way, each.length] + watch[each.length]).sum()) for each in self.rounds])


def replay(trace: Trace, way: Way, first_round: str = "prefill") -> Replay:
    """The rounds of a way along every text of a trace.

    Raises InputError for text that is not greedy: where a round starts would then be a matter of chance, and what a
    policy has seen by then with it.
    """
    if trace.manifest.settings.text != "greedy":
        raise InputError(
            "ways of drafting are replayed along greedy text; policies see other rounds in every sampled text.",
            "Trace greedily; `predict` gives the expectation of fixed lengths on sampled text.",
        )
    if first_round not in FIRST_START:
        raise InputError(
            f"first round {first_round!r} is not known here: it is one of {', '.join(FIRST_START)}.",
            "The conventions of other engines are predicted for drafts of a fixed length.",
        )
    first = FIRST_START[first_round]
    rounds = tuple(_rounds(trace, prompt, way, first) for prompt in trace.prompts)
    tokens = np.array([max(0, len(trace.outputs(prompt)) - first) for prompt in trace.prompts])
    return Replay(way, tuple(trace.prompts), rounds, tokens, way.policy.exact)


def budget_of(trace: Trace, prompt: int) -> int:
    """M; of a text that was cut short its own length: its last round drafts no further."""
    tokens = len(trace.outputs(prompt))
    return tokens if trace.ended(prompt) == CUT else max(trace.manifest.settings.max_new_tokens, tokens)


def bounded_outlook(trace: Trace, prompt: int, way: Way, place: int = 0) -> Outlook:
    """The outlook of one of a way's drafters, with what its policy lets a round draft."""
    seen = outlook(way.drafters[place], trace, prompt, way.draft_length)
    if isinstance(way.policy, (FixedLength, RoundPolicy)):
        return seen
    allowed = allowed_by(way.policy, way.drafters[place], trace, prompt, way.draft_length)
    return Outlook(seen.run, np.minimum(seen.drafted, allowed))


def _rounds(trace: Trace, prompt: int, way: Way, first: int) -> WayRounds:
    outlooks = [bounded_outlook(trace, prompt, way, place) for place in range(len(way.drafters))]
    budget, N = budget_of(trace, prompt), len(trace.outputs(prompt))
    chooser, agrees = None, np.zeros((0, N), dtype=bool)
    if isinstance(way.policy, RoundPolicy):
        chooser = way.policy.begin(prompt, way.keys, way.draft_length)
        watched = [way.drafters[place] for place in way.policy.watched(way.keys)]
        agrees = np.array([each.signal(trace, prompt) for each in watched], dtype=bool).reshape(len(watched), N)
    sizes = [sizes_of(drafter, way.draft_length) for drafter in way.drafters]
    found: list[tuple[int, int, int, int, int, int]] = []
    i = first
    while i < N:
        choice = RoundChoice(0, way.draft_length) if chooser is None else chooser.choose()
        length = drafted = accepted = 0
        if choice.way != NOBODY:
            seen = outlooks[choice.way]
            length = max(0, min(choice.length, int(seen.drafted[i]), budget - i - 1))
            drafted = int(sizes[choice.way][length])
            accepted = min(int(seen.run[i]), length, N - i)
        emitted = min(accepted + 1, N - i)
        found.append((i, choice.way, length, drafted, accepted, emitted))
        if chooser is not None:
            chooser.observe(Verified(choice.way, drafted, accepted, emitted, agrees[:, i : i + emitted]))
        i += emitted
    return WayRounds(*np.array(found, dtype=np.int64).reshape(-1, 6).T)
