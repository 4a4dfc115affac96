"""`predict`: one trace -> the rounds of every exit layer and draft length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from probekit.drafting.drafters import Drafter, Outlook, TextDrafter, allowed_by, outlooks, sizes_of, traced_drafters
from probekit.drafting.policies import FIXED, FixedLength, Policy
from probekit.drafting.round_policies import RoundPolicy
from probekit.drafting.ways import Way
from probekit.errors import InputError, ResourceError
from probekit.prediction.intervals import SHARE, bootstrap_ratio, interval_or_none
from probekit.prediction.replay import replay
from probekit.prediction.rounds import CUT, ENDED, RoundCounts, Walk, check_lengths, expect_rounds, tally, walk_rounds
from probekit.prediction.table import Cell, Prediction, PromptRounds
from probekit.settings import whole_number
from probekit.traces.trace import Trace, as_trace

_CHUNK = 4_000_000  # cells x prompts x positions in one sweep
_MOST_BYTES = 2 * 2**30  # of all counts
_MANY = 4096  # prompts, above which counts are kept in small types


def predict(
    trace: Trace | str | Path,
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] = range(1, 9),
    first_round: str = "prefill",
    with_rounds: bool = False,
    *,
    drafter: bool | None = None,
    draft_rows: int | None = None,
    drafters: Sequence[Drafter] | None = None,
    policy: Policy = FIXED,
    agreement: Callable[[int], np.ndarray] | None = None,
    budget: int | None = None,
) -> Prediction:
    """Predict the rounds of every exit layer and draft length, and of the draft model where the trace has one.

    Parameters
    ----------
    exit_layers: 1..L-1 by default.
    draft_lengths: those far beyond the budget (and 64) are one: the budget, where no round drafts past it.
    first_round: whose convention (`probekit.prediction.rounds.CONVENTIONS`): "prefill" (our decoder: the prefill emits
        the first token), "draft" (transformers: it is drafted), "vllm" (as prefill, but K tokens are drafted also past
        the budget, and what is accepted there is counted) or "llama.cpp" (as prefill, but an accepted end-of-sequence
        token counts as the bonus unless it was the last draft).
    with_rounds: keep every round of every prompt, too.
    drafter: predict the trace's draft model, too; by default where it has one and no exit layers were named.
    draft_rows: F, for exit layers that draft with the head's rows of the F most frequent tokens only, in the order of
        the trace's draft vocabulary; by default with the whole head.
    drafters: in place of those four.
    policy: when to stop drafting before K; never by default. Greedy text only. Where a policy looks at drafts, what a
        round drafts after a mismatch is an estimate, and `exact` is False; rounds and accepted tokens stay exact.
    agreement: in place of the trace's own; given a prompt's index it answers, for layers 0..L and output positions,
        (L+1, N), with bool for greedy text and with acceptance probabilities otherwise. For another head or lens.
    budget: M, fewer tokens than were traced: what an engine drafts past it is then known, too. By default the trace's.

    `exact` is False under "vllm" where everything that is known of a text's end was accepted in its last round: the
    engine may then accept, past it, what no trace shows.

    Raises
    ------
    InputError: for an exit layer, a draft length or a convention that does not exist, and for a draft head that the
        trace does not know.

    Examples
    --------
    >>> import probekit
    >>> trace = probekit.trace("tales-layerskip", ["Once upon a time"], max_new_tokens=16)
    >>> probekit.predict(trace, exit_layers=[3], draft_lengths=[2]).cell(3, 2).tokens
    15
    """
    trace = as_trace(trace)
    if drafters is None:
        drafters = traced_drafters(trace, exit_layers, draft_model=drafter, draft_rows=draft_rows, read=agreement)
    new_tokens = trace.text_columns("new_tokens", "ended")["new_tokens"].to_numpy()
    traced = max(trace.manifest.settings.max_new_tokens, int(new_tokens.max()))
    budget = traced if budget is None else whole_number("the budget must be", budget)
    if budget > traced:
        raise InputError(f"the budget is {budget} tokens; this run was traced with {traced}.", "Trace more tokens.")
    fewest = min(budget, int(new_tokens.min()))
    lengths, convention = check_lengths(draft_lengths, budget, first_round, fewest)
    _check_size(len(drafters) * len(lengths), len(new_tokens), int(lengths.max()), budget)
    greedy = trace.manifest.settings.text == "greedy"
    if not greedy and not isinstance(policy, FixedLength):
        raise InputError(
            "a policy is predicted on greedy text: sampled drafts would need every draft's own distribution.",
            "Trace greedily, or draft with a fixed length.",
        )
    if not greedy and convention.ends_as_bonus:
        raise InputError(f"the convention of {first_round} is predicted on greedy text.", "Trace greedily.")
    if budget < traced and isinstance(policy, RoundPolicy):
        raise InputError("a policy that decides round by round is predicted with the trace's own budget.")

    # Text drafters draft the same tokens for any text: given the text, nothing about their rounds is left to chance.
    certain = [each for each in drafters if greedy or isinstance(each, TextDrafter)]
    chancy = [each for each in drafters if not (greedy or isinstance(each, TextDrafter))]

    whole: RoundCounts | None = None
    rounds: list[PromptRounds] = []
    ties: list[list[int]] = []
    overlaps: list[list[float | None]] = []
    order = [[*certain, *chancy].index(each) for each in drafters]
    everyone = np.array(trace.prompts)
    exact = trace.manifest.own_text and policy.exact
    for piece in trace.pieces():
        texts = piece.text_columns("new_tokens", "ended")
        known = texts["new_tokens"].to_numpy()
        tokens = np.minimum(known, budget)
        # A text that was cut short is taken for one whose budget ended there: its last round drafts no further.
        budgets = np.where(texts["ended"] == CUT, tokens, budget)
        ended = (texts["ended"] == ENDED).to_numpy() & (known == tokens)
        for chunk in _chunks(max(int(known.max()), int(lengths.max())), len(known), len(drafters) * len(lengths)):
            prompts = piece.prompts[chunk]
            parts = []
            if certain:
                seen = _outlooks(piece, prompts, known[chunk], certain, int(lengths.max()))
                if isinstance(policy, RoundPolicy):
                    walk = _replayed(piece.select(prompts), certain, lengths, policy, first_round)
                else:
                    allowed = _allowed(piece, prompts, seen, certain, policy, int(lengths.max()))
                    walk = walk_rounds(
                        seen.run, tokens[chunk], lengths, budgets[chunk], convention, allowed, ended[chunk]
                    )
                if convention.past_budget:
                    exact &= not ((walk.start + walk.accepted == known[chunk]) & (walk.accepted < walk.drafted)).any()
                parts.append(tally(walk, int(lengths.max())))
                if with_rounds:
                    rounds += _rounds_of_walk(walk, prompts, certain, lengths)
            if chancy:
                w = _chances(piece, prompts, known[chunk], chancy)
                parts.append(expect_rounds(w, tokens[chunk], lengths, budgets[chunk], convention, known[chunk])[0])
                exact &= not convention.past_budget or bool((known - tokens >= lengths.max() - 1).all())
                if with_rounds:
                    rounds += _probabilities(w, prompts, tokens[chunk], chancy, lengths)
            found = _joined(parts, axis=0)
            if len(prompts) == len(everyone):
                whole = RoundCounts(*(each[order] for each in found))
                continue
            whole = whole or _room_for(found, len(everyone), budget)
            places = np.searchsorted(everyone, prompts)
            for mine, theirs in zip(whole, found, strict=True):
                mine[:, :, places] = theirs[order]
        if greedy:
            ties.append(_near_ties(piece, drafters))
        elif agreement is None:
            overlaps.append(_overlaps(piece, drafters))
    if whole is None:
        raise InputError("a trace without prompts predicts nothing.")

    emitted = np.maximum(np.minimum(new_tokens, budget).astype(np.int64) - convention.first, 0)
    return Prediction(
        model=trace.manifest.model.name,
        text=trace.manifest.settings.text,
        decoding=dict(trace.manifest.settings.decoding),
        first_round=first_round,
        budget=budget,
        exact=bool(exact),
        prompts=tuple(trace.prompts),
        cells=tuple(
            _cells(
                whole,
                emitted,
                drafters,
                lengths,
                near_ties=[sum(each) for each in zip(*ties, strict=True)] if ties else None,
                overlaps=_means(overlaps, int(new_tokens.sum())) if overlaps else None,
            )
        ),
        rounds=tuple(sorted(rounds, key=lambda row: row.prompt)) if with_rounds else None,
        draft_rows=next((each.key.rows for each in drafters if each.key.is_exit), None),
        exit_heads=trace.manifest.heads_name,
        policy=policy,
    )


def _check_size(cells: int, prompts: int, longest: int, budget: int) -> None:
    """Raise ResourceError for a table that would take more than _MOST_BYTES, before any of it is made."""
    bytes_each = np.dtype(_small(budget)).itemsize if prompts > _MANY else 8
    needed = 2 * cells * prompts * (longest + 1) * bytes_each
    if needed > _MOST_BYTES:
        raise ResourceError(
            f"{cells:,} cells of up to {longest:,} drafts on {prompts:,} prompts would take {needed / 2**30:,.0f} GiB, "
            f"where {_MOST_BYTES // 2**30} are made at most.",
            "Name fewer exit layers, or fewer and shorter draft lengths.",
        )


def _small(budget: int) -> type[np.signedinteger]:
    """The smallest type that holds the counts of a text."""
    return next((kind for kind in (np.int8, np.int16) if budget <= np.iinfo(kind).max), np.int32)


def _chunks(width: int, prompts: int, cells: int) -> Iterator[slice]:
    """Slices of the prompts whose sweep stays within bounds."""
    size = max(1, _CHUNK // max(1, width * cells))
    return (slice(start, start + size) for start in range(0, prompts, size))


def _room_for(found: RoundCounts, prompts: int, budget: int) -> RoundCounts:
    """Room for the counts of all prompts; whole ones of many in the smallest type that holds those of a text."""
    small = _small(budget)
    kinds = [small if prompts > _MANY and each.dtype.kind == "i" else each.dtype for each in found]
    rooms = (
        np.empty((*each.shape[:2], prompts, *each.shape[3:]), kind) for each, kind in zip(found, kinds, strict=True)
    )
    return RoundCounts(*rooms)


def _means(totals: Sequence[Sequence[float | None]], tokens: int) -> list[float | None]:
    """The mean over tokens of sums of pieces, for each drafter; None where it has none."""
    return [None if None in each else sum(filter(None, each)) / tokens for each in zip(*totals, strict=True)]


def _joined(parts: Sequence[RoundCounts], axis: int) -> RoundCounts:
    """Counts of the same cells side by side; whole ones become floats beside expected ones."""
    return RoundCounts(*(np.concatenate(each, axis=axis) for each in zip(*parts, strict=True)))


def _outlooks(
    trace: Trace, prompts: Sequence[int], tokens: np.ndarray, drafters: Sequence[Drafter], longest: int
) -> Outlook:
    """(drafters, prompts, N) both; nothing beyond a text's end."""
    shape = len(drafters), len(prompts), int(tokens.max())
    seen = Outlook(np.zeros(shape, dtype=np.int32), np.full(shape, longest, dtype=np.int32))
    for row, drafter in enumerate(drafters):
        for place, found in enumerate(outlooks(drafter, trace, prompts, longest)):
            here = row, place, slice(tokens[place])
            seen.run[here], seen.drafted[here] = found
    return seen


def _chances(trace: Trace, prompts: Sequence[int], tokens: np.ndarray, drafters: Sequence[Drafter]) -> np.ndarray:
    """(drafters, prompts, N) float64, w; nothing beyond a text's end."""
    chances = np.zeros((len(drafters), len(prompts), int(tokens.max())))
    for place, prompt in enumerate(prompts):
        for row, drafter in enumerate(drafters):
            chances[row, place, : tokens[place]] = drafter.signal(trace, prompt)
    return chances


def _allowed(
    trace: Trace,
    prompts: Sequence[int],
    seen: Outlook,
    drafters: Sequence[Drafter],
    policy: Policy,
    longest: int,
) -> np.ndarray | None:
    """(drafters, prompts, N): the most drafts that a drafter has and a policy lets it have; None: always K."""
    if isinstance(policy, FixedLength):
        return seen.drafted if any(isinstance(each, TextDrafter) for each in drafters) else None
    allowed = seen.drafted
    for place, prompt in enumerate(prompts):
        for row, drafter in enumerate(drafters):
            found = allowed_by(policy, drafter, trace, prompt, longest)
            here = row, place, slice(len(found))
            allowed[here] = np.minimum(allowed[here], found)
    return allowed


def _replayed(trace: Trace, drafters: Sequence[Drafter], lengths: np.ndarray, policy: Policy, first_round: str) -> Walk:
    """The same where a policy decides by what it has seen: round by round, each drafter by itself."""
    found = [
        [replay(trace, Way((drafter,), length, policy), first_round).rounds for length in lengths.tolist()]
        for drafter in drafters
    ]
    most = max(len(rounds.start) for cells in found for texts in cells for rounds in texts)
    shape = most, len(drafters), len(lengths), len(trace)
    none, nothing = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    walk = Walk(nothing.copy(), none.copy(), none.copy(), nothing.copy(), np.zeros(shape, dtype=bool))
    for row, cells in enumerate(found):
        for column, texts in enumerate(cells):
            for place, rounds in enumerate(texts):
                rejected = (rounds.accepted < rounds.length) & (rounds.emitted > rounds.accepted)
                for array, values in zip(
                    walk, (rounds.start, rounds.length, rounds.accepted, rounds.emitted, rejected), strict=True
                ):
                    array[: len(values), row, column, place] = values
    return walk


def _rounds_of_walk(
    walk: Walk, prompts: Sequence[int], drafters: Sequence[Drafter], lengths: np.ndarray
) -> Iterator[PromptRounds]:
    many = (walk.drafted >= 0).sum(axis=0)
    for place, prompt in enumerate(prompts):
        for row, drafter in enumerate(drafters):
            for column, length in enumerate(lengths.tolist()):
                here = slice(many[row, column, place]), row, column, place
                drafted = sizes_of(drafter, length)[walk.drafted[here]].tolist()
                accepted = walk.accepted[here].tolist()
                yield PromptRounds(prompt, drafter.key, length, tuple(drafted), tuple(accepted))


def _probabilities(
    signal: np.ndarray, prompts: Sequence[int], tokens: np.ndarray, drafters: Sequence[Drafter], lengths: np.ndarray
) -> Iterator[PromptRounds]:
    for place, prompt in enumerate(prompts):
        for row, drafter in enumerate(drafters):
            w = tuple(signal[row, place, : tokens[place]].tolist())
            for length in lengths.tolist():
                yield PromptRounds(prompt, drafter.key, length, accept_probability=w)


def _near_ties(trace: Trace, drafters: Sequence[Drafter]) -> list[int]:
    """Output positions of each drafter where it or the model is near a tie."""
    totals = [0] * len(drafters)
    for prompt in trace.prompts:
        model = trace.near_ties(prompt)[-1]
        for row, drafter in enumerate(drafters):
            totals[row] += int((drafter.near_ties(trace, prompt) | model).sum())
    return totals


def _overlaps(trace: Trace, drafters: Sequence[Drafter]) -> list[float | None]:
    """Over the generated tokens, the sum of the sums of min(p, q), for each drafter; None where it has no q."""
    totals: list[float | None] = [None if isinstance(each, TextDrafter) else 0.0 for each in drafters]
    for prompt in trace.prompts:
        for row, drafter in enumerate(drafters):
            if (so_far := totals[row]) is not None:
                totals[row] = so_far + float(drafter.overlap(trace, prompt).sum(dtype=np.float64))
    return totals


def _cells(
    counts: RoundCounts,
    tokens: np.ndarray,
    drafters: Sequence[Drafter],
    lengths: np.ndarray,
    near_ties: Sequence[int] | None,
    overlaps: Sequence[float | None] | None,
) -> Iterator[Cell]:
    by_drafted, accepted_at = counts.rounds_by_drafted, counts.accepted_by_position
    longest, whole = by_drafted.shape[-1] - 1, by_drafted.dtype.kind == "i"
    kind = np.int32 if whole and len(tokens) > _MANY else by_drafted.dtype  # of a prompt's sums
    rounds, accepted = by_drafted.sum(axis=-1, dtype=kind), accepted_at.sum(axis=-1, dtype=kind)
    drafted = np.empty_like(rounds)
    for mine, own, each in zip(drafted, by_drafted, drafters, strict=True):
        mine[:] = own @ sizes_of(each, longest)
    rate = bootstrap_ratio(accepted, drafted, bounds=SHARE)
    per_round = bootstrap_ratio(tokens, rounds, bounds=(1.0, np.inf))
    expected = {}
    if near_ties is None:
        share = 1 / len(tokens)  # a ratio to the number of prompts: the interval of a sum
        named = {"rounds": rounds, "drafted": drafted, "accepted": accepted}
        expected = {name: bootstrap_ratio(each, np.full(len(tokens), share)) for name, each in named.items()}
    for row, drafter in enumerate(drafters):
        for column, length in enumerate(lengths.tolist()):
            at = row, column
            intervals = {key: interval_or_none(low[at], high[at]) for key, (low, high) in expected.items()}
            yield Cell(
                drafts=drafter,
                draft_length=length,
                tokens_of_prompt=tokens,
                rounds_by_drafted=counts.rounds_by_drafted[row, column, :, : length + 1],
                accepted_at=counts.accepted_by_position[row, column, :, :length],
                rejections_of_prompt=counts.rejections[row, column],
                acceptance_rate_interval=interval_or_none(rate[0][at], rate[1][at]),
                tokens_per_round_interval=interval_or_none(per_round[0][at], per_round[1][at]),
                expected_acceptance=None if overlaps is None else overlaps[row],
                near_ties=None if near_ties is None else near_ties[row],
                counts_interval=intervals or None,
            )
