"""From a trace to every round of every (exit layer, draft length).

While its drafts are accepted, a draft sees exactly the tokens that the model itself writes, so what the exit layer
says at each position of the model's own text decides every round. Greedy text gives the rounds themselves; sampled
text gives their expectation, exactly, from the chance w[t] that position t is accepted if it is drafted.

A round that starts at output index i, with budget M and N tokens in the text:
    drafts    k = min(K, M - i - 1)                      a round never emits more than the budget
    accepts   a = min(run of agreements from i, k, N - i)
    emits     min(a + 1, N - i)                          the token that verification adds is in it
    a rejection ended it if and only if a < min(k, N - i)
A drafted end-of-sequence token does not shorten the draft; an accepted one ends the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probekit.drafting.drafters import Outlook, runs_of
from probekit.errors import InputError

FIRST_START = {"prefill": 1, "draft": 0}
"""Output index at which the first round starts: `prefill` is our decoder's convention, `draft` that of transformers."""
CUT = "cut"
"""Value of `ended` for a text that an analysis cut short: it neither ended by itself nor filled the trace's budget."""


class Rounds(NamedTuple):
    """The rounds of one text, in order: (rounds,) integers each."""

    start: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray

    @property
    def rejected(self) -> np.ndarray:
        """(rounds,) bool: a rejection ended the round. (An accepted ending emits no further token.)"""
        return (self.accepted < self.drafted) & (self.emitted > self.accepted)


@dataclass(frozen=True, eq=False)
class ExpectedRounds:
    """What is expected of the rounds of one sampled text, given the text.

    start_probability: (N,) chance that a round starts at each output index.
    accepted_by_position: (K,) expected number of rounds that accept their first, second, ... draft.
    rounds_by_drafted: (K + 1,) expected number of rounds with 0, 1, ... K drafts.
    """

    tokens: int
    rejections: float
    start_probability: np.ndarray
    accepted_by_position: np.ndarray
    rounds_by_drafted: np.ndarray

    @property
    def rounds(self) -> float:
        return float(self.rounds_by_drafted.sum())

    @property
    def drafted(self) -> float:
        return float(self.rounds_by_drafted @ np.arange(len(self.rounds_by_drafted)))

    @property
    def accepted(self) -> float:
        return float(self.accepted_by_position.sum())


def rounds_of(
    agrees: np.ndarray | Outlook,
    draft_length: int,
    budget: int,
    first_round: str = "prefill",
    *,
    allowed: np.ndarray | None = None,
) -> Rounds:
    """The rounds of one greedy text.

    agrees: (N,) bool, whether the drafter has the model's token at each output index; or its outlook.
    budget: M, the most tokens that the decoder was allowed; N <= M.
    allowed: (N,) the most drafts of a round that starts at each output index, where a policy has a say.
    """
    if isinstance(agrees, Outlook):
        runs, allowed = agrees.run, agrees.drafted if allowed is None else np.minimum(agrees.drafted, allowed)
    else:
        runs = runs_of(np.asarray(agrees, dtype=bool))
    lengths, first = check_lengths([draft_length], budget, first_round, len(runs))
    most = None if allowed is None else np.asarray(allowed, dtype=np.int32)[None, None]
    walk = walk_rounds(runs[None, None], np.array([len(runs)]), lengths, budget, first, most)
    drafted, accepted = walk.drafted[:, 0, 0, 0], walk.accepted[:, 0, 0, 0]
    start, emitted = walk.start[:, 0, 0, 0], walk.emitted[:, 0, 0, 0]
    return Rounds(start, drafted, accepted, emitted)


def expected_rounds(
    accept_probability: np.ndarray, draft_length: int, budget: int, first_round: str = "prefill"
) -> ExpectedRounds:
    """What is expected of the rounds of one sampled text, exactly.

    accept_probability: (N,) w[t] = min(1, q(y[t]) / p(y[t])) (Leviathan et al., arXiv 2211.17192: given the token,
        the accept/reject rule keeps a draft of it with this probability, independently across positions).
    """
    w = np.asarray(accept_probability, dtype=np.float64)
    lengths, first = check_lengths([draft_length], budget, first_round, len(w))
    counts, starts = expect_rounds(w[None, None], np.array([len(w)]), lengths, budget, first)
    return ExpectedRounds(
        tokens=max(0, len(w) - first),
        rejections=float(counts.rejections[0, 0, 0]),
        start_probability=starts[0, 0, 0],
        accepted_by_position=counts.accepted_by_position[0, 0, 0],
        rounds_by_drafted=counts.rounds_by_drafted[0, 0, 0],
    )


def closed_form_tokens_per_round(alpha: float | None, draft_length: int) -> float | None:
    """(1 - alpha^(K+1)) / (1 - alpha): an estimate, which assumes independent acceptances (arXiv 2211.17192, eq. 1)."""
    if alpha is None:
        return None
    return float(sum(alpha**power for power in range(draft_length + 1)))


class Walk(NamedTuple):
    """The rounds of many texts and cells at once: (rounds, drafters, draft lengths, prompts); drafted is -1 where a
    text has no more rounds."""

    start: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray


class RoundCounts(NamedTuple):
    """Counts of each drafter, draft length and prompt. K is the longest draft length."""

    rounds_by_drafted: np.ndarray  # (drafters, lengths, prompts, K + 1)
    accepted_by_position: np.ndarray  # (drafters, lengths, prompts, K)
    rejections: np.ndarray  # (drafters, lengths, prompts)


def walk_rounds(
    agrees: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
    budgets: np.ndarray | int,
    first: int,
    allowed: np.ndarray | None = None,
) -> Walk:
    """Jump from round to round in every text and cell at once.

    agrees: (drafters, prompts, N) bool, False beyond the end of a text; or int32, the run of acceptances of a round
        that starts at each position, where it depends on the start. tokens, budgets: (prompts,) N and M of each.
    allowed: (drafters, prompts, N) the most drafts of a round that starts at each position, where a policy has a say.
    """
    runs = runs_of(agrees) if agrees.dtype == bool else agrees
    drafters, prompts, width = runs.shape
    flat = np.append(runs.ravel(), np.int32(0))
    base = (np.arange(drafters * prompts, dtype=np.int64) * width).reshape(drafters, 1, prompts)

    most = None if allowed is None else np.append(allowed.ravel(), np.int32(0))

    lengths, tokens = lengths.astype(np.int32)[:, None], tokens.astype(np.int32)
    start = np.full((drafters, len(lengths), prompts), first, dtype=np.int32)
    steps: list[tuple[np.ndarray, ...]] = []
    while (going := start < tokens).any():
        drafted = np.minimum(lengths, np.asarray(budgets, dtype=np.int32) - 1 - start)
        here = np.where(going, base + start, 0)
        if most is not None:
            drafted = np.minimum(drafted, most[here])
        left = tokens - start
        accepted = np.minimum(flat[here], drafted)  # a run ends with its text
        emitted = np.minimum(accepted + 1, left)
        steps.append((start, np.where(going, drafted, -1), np.where(going, accepted, -1), np.where(going, emitted, 0)))
        start = start + steps[-1][3]
    if not steps:
        none = np.empty((0, *start.shape), dtype=np.int32)
        return Walk(none, none, none, none)
    return Walk(*(np.stack(column) for column in zip(*steps, strict=True)))


def tally(walk: Walk, longest: int) -> RoundCounts:
    """Count a walk's rounds by their drafts and by what they accepted."""
    shape = walk.drafted.shape[1:]
    cells = np.arange(int(np.prod(shape))).reshape(shape) * (longest + 2)

    def histogram(values: np.ndarray) -> np.ndarray:
        """(drafters, lengths, prompts, K + 1): rounds with each value; -1 (no round) is left out."""
        bins = np.bincount((cells + values + 1).ravel(), minlength=cells.size * (longest + 2))
        return bins.reshape(*shape, longest + 2)[..., 1:]

    accepted = histogram(walk.accepted)
    at_least = accepted[..., ::-1].cumsum(axis=-1)[..., ::-1]
    rejected = (walk.accepted < walk.drafted) & (walk.emitted > walk.accepted)
    return RoundCounts(histogram(walk.drafted), at_least[..., 1:], rejected.sum(axis=0))


def expect_rounds(
    w: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, budgets: np.ndarray | int, first: int
) -> tuple[RoundCounts, np.ndarray]:
    """The recursion over the chance that a round starts at i, in every text and cell at once.

    w: (drafters, prompts, N) float64. tokens, budgets: (prompts,) N and M of each. Returns the expected counts, and the
    chances (drafters, lengths, prompts, N).
    """
    drafters, prompts, width = w.shape
    longest = int(lengths.max())
    shape = (drafters, len(lengths), prompts)
    # Leading axes are positions, so that each step works on whole blocks; index N and beyond: the text has ended.
    starts = np.zeros((width + 2, *shape))
    starts[first] = 1.0
    by_position = np.zeros((longest, *shape))
    by_drafted = np.zeros((longest + 1, *shape))
    rejections = np.zeros(shape)
    chances = np.ascontiguousarray(np.moveaxis(w, -1, 0))[:, :, None, :]
    which, whose = np.arange(len(lengths))[:, None], np.arange(prompts)
    for i in range(first, width):
        live = starts[i] = starts[i] * (i < tokens)
        # (lengths, prompts): what a round would draft, and the most that can be accepted; no round starts past a text
        drafted = np.clip(np.broadcast_to(budgets, tokens.shape) - i - 1, 0, lengths[:, None])
        by_drafted[drafted, :, which, whose] += np.moveaxis(live, 0, -1)
        reach = np.minimum(drafted, tokens - i)
        for j in range(max(0, int(reach.max())) + 1):
            done = j >= reach
            if done.any():  # everything was accepted: the bonus token comes at i + j, or the text ended before it
                starts[i + j + 1] += np.where(done, live, 0.0)
                live = np.where(done, 0.0, live)
            if j < longest and i + j < width:
                kept = live * chances[i + j]
                lost = live - kept
                by_position[j] += kept
                rejections += lost
                starts[i + j + 1] += lost
                live = kept
    back = (np.moveaxis(each, 0, -1) for each in (by_drafted, by_position, starts[:width]))
    by_drafted, by_position, starts = back
    return RoundCounts(by_drafted, by_position, rejections), starts


def check_lengths(draft_lengths: Iterable[int], budget: int, first_round: str, tokens: int) -> tuple[np.ndarray, int]:
    """Draft lengths, (lengths,) int64, and the output index of the first round; or InputError."""
    lengths = list(dict.fromkeys(draft_lengths))
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise InputError(f"draft length {length!r} is out of range: a draft length is 1 or more.")
    if not lengths:
        raise InputError("no draft length was given; expected one or more, each 1 or more.")
    if first_round not in FIRST_START:
        raise InputError(f"first round {first_round!r} is not known: it is one of {', '.join(FIRST_START)}.")
    if not 1 <= tokens <= budget:
        raise InputError(f"a text of {tokens} tokens does not fit a budget of {budget}.")
    return np.array(lengths, dtype=np.int64), FIRST_START[first_round]
