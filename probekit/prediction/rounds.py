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
That is our decoder. Engines differ from it in the convention by which they are named (`CONVENTIONS`): where the first
round starts, whether they draft past the budget, and how they count an accepted end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probekit.drafting.drafters import Outlook, runs_of
from probekit.errors import InputError


class Convention(NamedTuple):
    """How an engine cuts a text into rounds, and counts them.

    first: the output index at which the first round starts. past_budget: K tokens are drafted whatever is left of the
    budget, and what is accepted past the end of the text is counted, too. ends_as_bonus: an accepted end-of-sequence
    token counts as the bonus, unless it was the last draft.
    """

    first: int
    past_budget: bool = False
    ends_as_bonus: bool = False


CONVENTIONS = {
    "prefill": Convention(1),
    "draft": Convention(0),
    "vllm": Convention(1, past_budget=True),
    "llama.cpp": Convention(1, ends_as_bonus=True),
}
"""`prefill` is our decoder's, `draft` that of transformers; vLLM's and llama.cpp's go by their names.

transformers beside it ends its drafts at a drafted end-of-sequence token, and counts an accepted one as the bonus
(`probekit.validation.transformers` counts it as accepted).
"""
FIRST_START = {name: each.first for name, each in CONVENTIONS.items() if name in ("prefill", "draft")}
"""Those of decoders whose rounds a policy may shape."""
ENDED = "eos"
"""Value of `ended` for a text that ended with an end-of-sequence token."""
CUT = "cut"
"""Value of `ended` for a text that an analysis cut short: it neither ended by itself nor filled the trace's budget."""
LONGEST_NAMED = 64
"""Drafts of a round: a longer one that is beyond the budget, too, is the same as this, or as the budget."""
LONGEST = 10_000
"""Drafts of a round of an engine that drafts past the budget, whatever is left of it."""


class Rounds(NamedTuple):
    """The rounds of one text, in order: (rounds,) integers each; rejected: bool, a rejection ended the round."""

    start: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray
    rejected: np.ndarray


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
    ended: bool = False,
    tokens: int | None = None,
) -> Rounds:
    """The rounds of one greedy text.

    agrees: (N,) bool, whether the drafter has the model's token at each output index; or its outlook.
    budget: M, the most tokens that the decoder was allowed; N <= M.
    allowed: (N,) the most drafts of a round that starts at each output index, where a policy has a say.
    ended: whether the text ends with an end-of-sequence token, which some conventions count otherwise.
    tokens: where the decoder stops, if that is before N: what lies beyond is known, and vLLM's convention counts it.
    """
    if isinstance(agrees, Outlook):
        runs, allowed = agrees.run, agrees.drafted if allowed is None else np.minimum(agrees.drafted, allowed)
    else:
        runs = runs_of(np.asarray(agrees, dtype=bool))
    lengths, convention = check_lengths([draft_length], budget, first_round, tokens or len(runs))
    most = None if allowed is None else np.asarray(allowed, dtype=np.int32)[None, None]
    stops = np.array([len(runs) if tokens is None else tokens])
    walk = walk_rounds(runs[None, None], stops, lengths, budget, convention, most, np.array([ended]))
    return Rounds(*(column[:, 0, 0, 0] for column in walk))


def expected_rounds(
    accept_probability: np.ndarray, draft_length: int, budget: int, first_round: str = "prefill"
) -> ExpectedRounds:
    """What is expected of the rounds of one sampled text, exactly.

    accept_probability: (N,) w[t] = min(1, q(y[t]) / p(y[t])) (Leviathan et al., arXiv 2211.17192: given the token,
        the accept/reject rule keeps a draft of it with this probability, independently across positions).
    """
    w = np.asarray(accept_probability, dtype=np.float64)
    lengths, convention = check_lengths([draft_length], budget, first_round, len(w))
    counts, starts = expect_rounds(w[None, None], np.array([len(w)]), lengths, budget, convention)
    return ExpectedRounds(
        tokens=max(0, len(w) - convention.first),
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
    text has no more rounds. rejected: bool."""

    start: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray
    rejected: np.ndarray


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
    convention: Convention,
    allowed: np.ndarray | None = None,
    ended: np.ndarray | None = None,
) -> Walk:
    """Jump from round to round in every text and cell at once.

    agrees: (drafters, prompts, N) bool, False beyond what is known of a text; or int32, the run of acceptances of a
        round that starts at each position, where it depends on the start. tokens, budgets: (prompts,) of each, where it
        ends, and M.
    allowed: (drafters, prompts, N) the most drafts of a round that starts at each position, where a policy has a say.
    ended: (prompts,) bool, whether a text ends with an end-of-sequence token.
    """
    runs = runs_of(agrees) if agrees.dtype == bool else agrees
    drafters, prompts, width = runs.shape
    flat = np.append(runs.ravel(), np.int32(0))
    base = (np.arange(drafters * prompts, dtype=np.int64) * width).reshape(drafters, 1, prompts)

    most = None if allowed is None else np.append(allowed.ravel(), np.int32(0))

    lengths, tokens = lengths.astype(np.int32)[:, None], tokens.astype(np.int32)
    start = np.full((drafters, len(lengths), prompts), convention.first, dtype=np.int32)
    steps: list[tuple[np.ndarray, ...]] = []
    while (going := start < tokens).any():
        drafted = np.broadcast_to(lengths, start.shape)
        if not convention.past_budget:
            drafted = np.minimum(drafted, np.asarray(budgets, dtype=np.int32) - 1 - start)
        here = np.where(going, base + start, 0)
        if most is not None:
            drafted = np.minimum(drafted, most[here])
        left = tokens - start
        accepted = np.minimum(flat[here], drafted)  # a run ends where nothing more is known
        emitted = np.minimum(accepted + 1, left)
        rejected = going & (accepted < drafted) & (emitted > accepted)
        if convention.ends_as_bonus and ended is not None:
            accepted = accepted - (ended & (accepted == left) & (accepted < drafted))
        counted = (np.where(going, each, none) for each, none in ((drafted, -1), (accepted, -1), (emitted, 0)))
        steps.append((start, *counted, rejected))
        start = start + steps[-1][3]
    if not steps:
        none = np.empty((0, *start.shape), dtype=np.int32)
        return Walk(none, none, none, none, none.astype(bool))
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
    return RoundCounts(histogram(walk.drafted), at_least[..., 1:], walk.rejected.sum(axis=0))


def expect_rounds(
    w: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
    budgets: np.ndarray | int,
    convention: Convention,
    known: np.ndarray | None = None,
) -> tuple[RoundCounts, np.ndarray]:
    """The recursion over the chance that a round starts at i, in every text and cell at once.

    w: (drafters, prompts, N) float64. tokens, budgets: (prompts,) of each, where it ends, and M. known: (prompts,)
    how far w is known, where that is further. Returns the expected counts, and the chances (drafters, lengths, prompts,
    N).
    """
    drafters, prompts, width = w.shape
    longest = int(lengths.max())
    shape = (drafters, len(lengths), prompts)
    # Leading axes are positions, so that each step works on whole blocks; index N and beyond: the text has ended.
    starts = np.zeros((width + 2, *shape))
    starts[convention.first] = 1.0
    known = tokens if known is None else known
    by_position = np.zeros((longest, *shape))
    by_drafted = np.zeros((longest + 1, *shape))
    rejections = np.zeros(shape)
    chances = np.ascontiguousarray(np.moveaxis(w, -1, 0))[:, :, None, :]
    which, whose = np.arange(len(lengths))[:, None], np.arange(prompts)
    for i in range(convention.first, width):
        live = starts[i] = starts[i] * (i < tokens)
        # (lengths, prompts): what a round would draft, and the most that can be accepted; no round starts past a text
        most = longest if convention.past_budget else np.broadcast_to(budgets, tokens.shape) - i - 1
        drafted = np.clip(np.broadcast_to(most, tokens.shape), 0, lengths[:, None])
        by_drafted[drafted, :, which, whose] += np.moveaxis(live, 0, -1)
        reach = np.minimum(drafted, known - i)
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


def check_lengths(
    draft_lengths: Iterable[int], budget: int, first_round: str, tokens: int
) -> tuple[np.ndarray, Convention]:
    """Draft lengths, (lengths,) int64, each once, and the convention by its name; or InputError.

    Where no round drafts past the budget, one that is far beyond it is what `within_budget` makes of it.
    """
    lengths = list(dict.fromkeys(draft_lengths))
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise InputError(f"draft length {length!r} is out of range: a draft length is 1 or more.")
    if not lengths:
        raise InputError("no draft length was given; expected one or more, each 1 or more.")
    if first_round not in CONVENTIONS:
        raise InputError(f"first round {first_round!r} is not known: it is one of {', '.join(CONVENTIONS)}.")
    if not 1 <= tokens <= budget:
        raise InputError(f"a text of {tokens} tokens does not fit a budget of {budget}.")
    convention = CONVENTIONS[first_round]
    if convention.past_budget and max(lengths) > LONGEST:
        raise InputError(f"draft length {max(lengths)} is out of range: expected 1 to {LONGEST:,}.")
    kept = lengths if convention.past_budget else within_budget(lengths, budget)
    return np.array(kept, dtype=np.int64), convention


def within_budget(draft_lengths: Iterable[int], budget: int) -> list[int]:
    """The same draft lengths, each once; one beyond the budget and LONGEST_NAMED is the larger of the two."""
    most = max(budget, LONGEST_NAMED)
    return list(dict.fromkeys(min(length, most) for length in draft_lengths))
