"""The rounds that another engine made, held against those that a trace predicts by that engine's convention.

Engines count a round where they verify at least one draft; a step without drafts is plain decoding to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from probekit.drafting.drafters import Drafter, outlook
from probekit.errors import InputError
from probekit.prediction.rounds import CONVENTIONS, ENDED, Rounds, rounds_of
from probekit.traces.trace import Trace
from probekit.validation.differences import Difference, first_difference, token_at


class EngineRounds(NamedTuple):
    """One text of an engine: its tokens, and drafted and accepted tokens of each round that verified drafts."""

    tokens: list[int]
    drafted: list[int]
    accepted: list[int]


class Turn(NamedTuple):
    """One text of an engine, and what it took.

    plain: steps that verified nothing, the passes over the prompt among them. seconds, processor_s: of the whole
    request, by the clock and of the engine's processor. decoding_s: after the first token, by the engine's own clock.
    """

    text: EngineRounds
    plain: int
    seconds: float
    processor_s: float
    decoding_s: float | None = None


class Session(Protocol):
    """An engine with one model and one way of drafting, open and waiting. rows: the prompt so often, in one batch."""

    def __call__(
        self, prompt_ids: Sequence[int], max_new_tokens: int, *, rows: int = 1, ignore_eos: bool = False
    ) -> Turn: ...


class EngineRun(NamedTuple):
    """What an engine did with some prompts, one at a time.

    counters: its own totals, by its own names. seconds: of each text, decoding only as far as the engine says so; None
    where it does not. versions: of the engine and what it ran on.
    """

    texts: list[EngineRounds]
    counters: Mapping[str, Any]
    seconds: list[float | None]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class EngineCell:
    """One drafter at one draft length, predicted by an engine's convention and counted inside the engine.

    rounds_equal: texts whose every round is the predicted one, drafted and accepted; tokens_equal: texts whose tokens
    are the trace's. differences: where not, the first place of each text. unseen: last rounds that may accept past the
    trace, and are compared up to there.
    """

    label: str
    draft_length: int
    prompts: int
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any]
    rounds_equal: int
    tokens_equal: int
    unseen: int
    differences: tuple[Difference, ...]

    @property
    def holds(self) -> bool:
        """No difference but at near-ties."""
        return all(each.kind == "near-tie" for each in self.differences)

    def to_json(self) -> dict[str, Any]:
        return {
            "drafter": self.label, "draft_length": self.draft_length, "prompts": self.prompts,
            "predicted": dict(self.predicted), "measured": dict(self.measured),
            "rounds_equal": self.rounds_equal, "tokens_equal": self.tokens_equal, "unseen": self.unseen,
            "near_ties": sum(each.kind == "near-tie" for each in self.differences),
            "unexplained": sum(each.kind != "near-tie" for each in self.differences),
            "differences": [each.__dict__ for each in self.differences],
        }  # fmt: skip


def compared(
    trace: Trace,
    drafter: Drafter,
    draft_length: int,
    texts: Sequence[EngineRounds],
    first_round: str,
    budget: int,
    *,
    drafted: bool = True,
) -> EngineCell:
    """Hold an engine's texts, one for each prompt of a greedy trace, against the prediction.

    budget: M, the most new tokens that the engine was allowed. drafted: whether drafted tokens are held against it,
    too; transformers ends its drafts at an end-of-sequence token, wherever it is drafted.
    """
    if trace.manifest.settings.batch_invariant:
        raise InputError(
            "this run is of batch-invariant decoding, whose bits no other engine has.",
            "Trace without batch-invariance.",
        )
    expected = [_expected(trace, prompt, drafter, draft_length, first_round, budget) for prompt in trace.prompts]
    differences: list[Difference] = []
    same_rounds = same_tokens = unseen = 0
    for prompt, rounds, found in zip(trace.prompts, expected, texts, strict=True):
        said = trace.outputs(prompt).tolist()[:budget]
        open_end = CONVENTIONS[first_round].past_budget and _reaches_the_unknown(trace, prompt, rounds)
        unseen += open_end
        same_tokens += said == found.tokens
        apart = _first_apart(rounds, found, open_end, drafted)
        same_rounds += apart is None
        parted = first_difference(said, found.tokens)
        if parted is not None and (apart is None or parted <= apart.output):
            differences.append(
                Difference(
                    prompt, "tokens", parted, _kind(trace, prompt, drafter, parted), token_at(said, parted),
                    token_at(found.tokens, parted),
                )
            )  # fmt: skip
        elif apart is not None:
            kind = "unexplained" if apart.what == "drafts" else _kind(trace, prompt, drafter, apart.output)
            differences.append(Difference(prompt, apart.what, apart.output, kind, apart.predicted, apart.measured))
    return EngineCell(
        drafter.key.label,
        draft_length,
        len(trace),
        _counts(((each.drafted.tolist(), each.accepted.tolist()) for each in expected), draft_length),
        _counts(((each.drafted, each.accepted) for each in texts), draft_length),
        same_rounds,
        same_tokens,
        unseen,
        tuple(differences),
    )


def _expected(trace: Trace, prompt: int, drafter: Drafter, draft_length: int, first_round: str, budget: int) -> Rounds:
    """The rounds that verify drafts."""
    seen = outlook(drafter, trace, prompt, draft_length)
    length = min(budget, len(seen.run))
    ended = trace.ended(prompt) == ENDED and length == len(seen.run)
    rounds = rounds_of(seen, draft_length, budget, first_round, ended=ended, tokens=length)
    kept = rounds.drafted > 0
    return Rounds(*(column[kept] for column in rounds))


def _reaches_the_unknown(trace: Trace, prompt: int, rounds: Rounds) -> bool:
    """Whether everything that is known of a text's end was accepted in its last round, which drafted more."""
    if not len(rounds.start):
        return False
    known = len(trace.outputs(prompt))
    return bool(rounds.start[-1] + rounds.accepted[-1] == known and rounds.accepted[-1] < rounds.drafted[-1])


class _Apart(NamedTuple):
    what: str
    output: int
    predicted: int | None
    measured: int | None


def _first_apart(rounds: Rounds, found: EngineRounds, open_end: bool, with_drafted: bool) -> _Apart | None:
    """The first round that differs, and the output position that decided it."""
    for place, (start, drafted, accepted) in enumerate(zip(rounds.start, rounds.drafted, rounds.accepted, strict=True)):
        if place >= len(found.drafted):
            return _Apart("rounds", int(start), int(accepted), None)
        if with_drafted and found.drafted[place] != drafted:
            return _Apart("drafts", int(start), int(drafted), found.drafted[place])
        last = place == len(rounds.start) - 1
        if found.accepted[place] != accepted and not (last and open_end and found.accepted[place] > accepted):
            at = int(start) + min(int(accepted), found.accepted[place])
            return _Apart("rounds", at, int(accepted), found.accepted[place])
    if len(found.drafted) > len(rounds.start):
        end = int(rounds.start[-1] + rounds.emitted[-1]) if len(rounds.start) else 0
        return _Apart("rounds", end, None, found.accepted[len(rounds.start)])
    return None


def _kind(trace: Trace, prompt: int, drafter: Drafter, output: int) -> str:
    ties = drafter.near_ties(trace, prompt) | trace.near_ties(prompt)[-1]
    return "near-tie" if output < len(ties) and bool(ties[output]) else "unexplained"


def _counts(texts: Any, draft_length: int) -> dict[str, Any]:
    """Rounds that verified drafts, drafted, accepted, and accepted by position, over all texts."""
    drafted, accepted, places, rounds = 0, 0, np.zeros(draft_length, dtype=np.int64), 0
    for theirs, taken in texts:
        rounds += len(theirs)
        drafted += sum(theirs)
        accepted += sum(taken)
        for count in taken:
            places[:count] += 1
    return {"rounds": rounds, "drafted": drafted, "accepted": accepted, "accepted_by_position": places.tolist()}
