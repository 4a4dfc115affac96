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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from probekit.errors import InputError
from probekit.prediction.grids import grid_html
from probekit.tracing.shading import Shaded

if TYPE_CHECKING:
    from probekit.tracing.traces import Trace

SCHEMA = "probekit/predict/1"
SELF = "self"
FIRST_START = {"prefill": 1, "draft": 0}
"""Output index at which the first round starts: `prefill` is our decoder's convention, `draft` that of transformers."""

CUT = "cut"
"""What `ended` says of a text that an analysis cut short: it neither ended by itself nor filled the trace's budget."""

RESAMPLES = 2000
_CHUNK = 4_000_000  # cells x prompts x positions in one sweep


# ------------------------------------------------------------------------------------------------ one text
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


def rounds_of(agrees: np.ndarray, draft_length: int, budget: int, first_round: str = "prefill") -> Rounds:
    """The rounds of one greedy text.

    agrees: (N,) bool, whether the drafter has the model's token at each output index.
    budget: M, the most tokens that the decoder was allowed; N <= M.
    """
    agrees = np.asarray(agrees, dtype=bool)
    lengths, first = _checked([draft_length], budget, first_round, len(agrees))
    walk = _walk(agrees[None, None], np.array([len(agrees)]), lengths, budget, first)
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
    lengths, first = _checked([draft_length], budget, first_round, len(w))
    counts, starts = _expect(w[None, None], np.array([len(w)]), lengths, budget, first)
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


# ------------------------------------------------------------------------------------------------ many texts
class _Walk(NamedTuple):
    """The rounds of many texts and cells at once: (rounds, drafters, draft lengths, prompts); drafted is -1 where a
    text has no more rounds."""

    start: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray


class _Counts(NamedTuple):
    """Counts of each drafter, draft length and prompt. K is the longest draft length."""

    rounds_by_drafted: np.ndarray  # (drafters, lengths, prompts, K + 1)
    accepted_by_position: np.ndarray  # (drafters, lengths, prompts, K)
    rejections: np.ndarray  # (drafters, lengths, prompts)


def _walk(agrees: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, budgets: np.ndarray | int, first: int) -> _Walk:
    """Jump from round to round in every text and cell at once.

    agrees: (drafters, prompts, N) bool, False beyond the end of a text. tokens, budgets: (prompts,) N and M of each.
    """
    drafters, prompts, width = agrees.shape
    place = np.arange(width, dtype=np.int32)
    # The next disagreement at or after each position.
    ahead = np.where(agrees, np.int32(width), place)
    ahead = np.minimum.accumulate(ahead[..., ::-1], axis=-1)[..., ::-1]
    flat = np.append(ahead.ravel(), np.int32(0))
    base = (np.arange(drafters * prompts, dtype=np.int64) * width).reshape(drafters, 1, prompts)

    lengths, tokens = lengths.astype(np.int32)[:, None], tokens.astype(np.int32)
    start = np.full((drafters, len(lengths), prompts), first, dtype=np.int32)
    steps: list[tuple[np.ndarray, ...]] = []
    while (going := start < tokens).any():
        drafted = np.minimum(lengths, np.asarray(budgets, dtype=np.int32) - 1 - start)
        left = tokens - start
        run = flat[np.where(going, base + start, 0)] - start
        accepted = np.minimum(np.minimum(run, drafted), left)
        emitted = np.minimum(accepted + 1, left)
        steps.append((start, np.where(going, drafted, -1), np.where(going, accepted, -1), np.where(going, emitted, 0)))
        start = start + steps[-1][3]
    if not steps:
        none = np.empty((0, *start.shape), dtype=np.int32)
        return _Walk(none, none, none, none)
    return _Walk(*(np.stack(column) for column in zip(*steps, strict=True)))


def _tally(walk: _Walk, longest: int) -> _Counts:
    """Count a walk's rounds by their drafts and by what they accepted."""
    shape = walk.drafted.shape[1:]
    cells = np.arange(int(np.prod(shape))).reshape(shape) * (longest + 2)

    def histogram(values: np.ndarray) -> np.ndarray:
        """(drafters, lengths, prompts, K + 1): rounds with each value; -1, which stands for no round, is left out."""
        bins = np.bincount((cells + values + 1).ravel(), minlength=cells.size * (longest + 2))
        return bins.reshape(*shape, longest + 2)[..., 1:]

    accepted = histogram(walk.accepted)
    at_least = accepted[..., ::-1].cumsum(axis=-1)[..., ::-1]
    rejected = (walk.accepted < walk.drafted) & (walk.emitted > walk.accepted)
    return _Counts(histogram(walk.drafted), at_least[..., 1:], rejected.sum(axis=0))


def _expect(
    w: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, budgets: np.ndarray | int, first: int
) -> tuple[_Counts, np.ndarray]:
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
    return _Counts(by_drafted, by_position, rejections), starts


def _checked(draft_lengths: Iterable[int], budget: int, first_round: str, tokens: int) -> tuple[np.ndarray, int]:
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


# ------------------------------------------------------------------------------------------------ intervals
def bootstrap_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of pooled ratios: numerators.sum() / denominators.sum() over prompts that are drawn again.

    The percentile bootstrap of scipy, paired: a prompt brings its numerator and its denominator, and the same prompts
    are drawn for every ratio. A draw in which nothing was counted stands at the ratio itself.

    Parameters
    ----------
    numerators, denominators: (..., prompts), broadcast against each other.
    confidence: share of the resampled ratios that the interval holds.

    Returns low and high, (...), float64; NaN where the ratio is not defined, and with fewer than two prompts.
    """
    above, below = np.broadcast_arrays(np.asarray(numerators, np.float64), np.asarray(denominators, np.float64))
    shape, prompts = above.shape[:-1], above.shape[-1]
    above, below = above.reshape(-1, prompts), below.reshape(-1, prompts)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = above.sum(axis=1) / below.sum(axis=1)
    defined = np.isfinite(ratio)
    ratio[~defined] = 0.0
    if prompts < 2:
        return np.full(shape, np.nan), np.full(shape, np.nan)

    def pooled(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """drawn: (resamples, prompts) indices of prompts. Returns (ratios, resamples)."""
        drawn = drawn.reshape(-1, prompts).astype(np.int64)
        row = np.arange(len(drawn))[:, None] * prompts
        times = np.bincount((drawn + row).ravel(), minlength=drawn.size).reshape(-1, prompts).astype(np.float64)
        top, bottom = above @ times.T, below @ times.T
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), ratio[:, None])

    result = stats.bootstrap(
        (np.arange(prompts),),
        pooled,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // prompts),
        vectorized=True,
        axis=-1,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = (np.where(defined, end, np.nan) for end in result.confidence_interval)
    return low.reshape(shape), high.reshape(shape)


def _interval(low: float, high: float) -> tuple[float, float] | None:
    return None if np.isnan(low) else (float(low), float(high))


# ------------------------------------------------------------------------------------------------ the table
@dataclass(frozen=True, eq=False)
class Cell:
    """What one drafter does at one draft length K: counts of each prompt, and what follows from them.

    Counts are whole for greedy text and expected ones otherwise.

    Parameters
    ----------
    exit_layer: E; None for a draft model.
    drafter: "self", or the draft model's name.
    tokens_of_prompt: (prompts,) tokens that rounds emit.
    rounds_by_drafted: (prompts, K + 1) rounds with 0, 1, ... K drafts.
    accepted_at: (prompts, K) rounds that accept their first, second, ... draft.
    rejections_of_prompt: (prompts,) rounds that a rejection ended.
    expected_acceptance: mean over the generated tokens of the sum of min(p, q), the chance that one draft is accepted
        (arXiv 2211.17192, definition 3.1 and corollary 3.6); only for text that is not greedy.
    near_ties: output positions where the drafter's or the model's two top logits are closer than the noise: only
        there may a greedy decoder differ from the prediction. None for text that is not greedy.
    counts_interval: {"rounds", "drafted", "accepted"} over prompts, for expected counts only.
    """

    exit_layer: int | None
    draft_length: int
    drafter: str
    tokens_of_prompt: np.ndarray
    rounds_by_drafted: np.ndarray
    accepted_at: np.ndarray
    rejections_of_prompt: np.ndarray
    acceptance_rate_interval: tuple[float, float] | None = None
    tokens_per_round_interval: tuple[float, float] | None = None
    expected_acceptance: float | None = None
    near_ties: int | None = None
    counts_interval: dict[str, tuple[float, float] | None] | None = None

    @property
    def label(self) -> str:
        return self.drafter if self.exit_layer is None else f"layer {self.exit_layer}"

    @property
    def cell(self) -> tuple[int | None, int]:
        """(exit layer, draft length): what names it among the cells of a prediction."""
        return self.exit_layer, self.draft_length

    @property
    def prompts(self) -> int:
        return len(self.tokens_of_prompt)

    @property
    def tokens(self) -> int:
        return int(self.tokens_of_prompt.sum())

    @property
    def rounds_of_prompt(self) -> np.ndarray:
        return self.rounds_by_drafted.sum(axis=1)

    @property
    def drafted_of_prompt(self) -> np.ndarray:
        return self.rounds_by_drafted @ np.arange(self.draft_length + 1)

    @property
    def accepted_of_prompt(self) -> np.ndarray:
        return self.accepted_at.sum(axis=1)

    @property
    def rounds(self) -> int | float:
        return self.rounds_by_drafted.sum().item()

    @property
    def drafted(self) -> int | float:
        return self.drafted_of_prompt.sum().item()

    @property
    def accepted(self) -> int | float:
        return self.accepted_at.sum().item()

    @property
    def rejections(self) -> int | float:
        return self.rejections_of_prompt.sum().item()

    @property
    def accepted_by_position(self) -> list[int] | list[float]:
        return self.accepted_at.sum(axis=0).tolist()

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def alpha(self) -> float | None:
        trials = self.accepted + self.rejections
        return self.accepted / trials if trials else None

    @property
    def tokens_per_round(self) -> float | None:
        return self.tokens / self.rounds if self.rounds else None

    @property
    def tokens_per_round_closed_form(self) -> float | None:
        """An estimate beside the exact figure, which assumes independent acceptances; papers quote it."""
        return closed_form_tokens_per_round(self.alpha, self.draft_length)

    def counts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("rounds", "drafted", "accepted", "tokens")}

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafter": self.drafter,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "rejections": self.rejections,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_rate_interval": _listed(self.acceptance_rate_interval),
            "alpha": self.alpha,
            "tokens_per_round": self.tokens_per_round,
            "tokens_per_round_interval": _listed(self.tokens_per_round_interval),
            "tokens_per_round_closed_form_estimate": self.tokens_per_round_closed_form,
            "accepted_by_position": self.accepted_by_position,
        }
        if self.expected_acceptance is not None:
            document["expected_acceptance"] = self.expected_acceptance
        if self.near_ties is not None:
            document["near_ties"] = self.near_ties
        if self.counts_interval is not None:
            document["counts_interval"] = {name: _listed(pair) for name, pair in self.counts_interval.items()}
        return document


class PromptRounds(NamedTuple):
    """The rounds of one prompt in one cell; for text that is not greedy, w of each position instead."""

    prompt: int
    exit_layer: int | None
    draft_length: int
    drafter: str
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    accept_probability: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        keys = {
            "prompt": self.prompt,
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafter": self.drafter,
        }
        if self.accept_probability is not None:
            return keys | {"accept_probability": list(self.accept_probability)}
        return keys | {"drafted": list(self.drafted), "accepted": list(self.accepted)}


@dataclass(frozen=True, eq=False)
class Prediction:
    """The table over (exit layer, draft length), read off one trace.

    text: "greedy", "sampled" or "given". exact: False for given text, which is taken for a sample of the model.
    decoding: the run's temperature, top_k, top_p. budget: M. prompts: their indices. rounds: only when asked for.
    draft_rows: F, the rows of the head that exit layers draft with; None: all of them.
    exit_heads: the name (fingerprint) of the exit heads that exit layers draft through; None: none.
    """

    model: str
    text: str
    decoding: dict[str, float]
    first_round: str
    budget: int
    exact: bool
    prompts: tuple[int, ...]
    cells: tuple[Cell, ...]
    rounds: tuple[PromptRounds, ...] | None = None
    draft_rows: int | None = None
    exit_heads: str | None = None

    def cell(self, exit_layer: int | None, draft_length: int) -> Cell:
        """The cell of an exit layer (None: the draft model) and a draft length."""
        for cell in self.cells:
            if cell.cell == (exit_layer, draft_length):
                return cell
        raise InputError(f"this prediction has no cell for exit layer {exit_layer} and draft length {draft_length}.")

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "text": self.text,
            "decoding": dict(self.decoding),
            "first_round": self.first_round,
            "budget": self.budget,
            "draft_rows": self.draft_rows,
            "exit_heads": self.exit_heads,
            "exact": self.exact,
            "cells": [cell.to_json() for cell in self.cells],
        }
        if self.rounds is not None:
            document["rounds"] = [rounds.to_json() for rounds in self.rounds]
        return document

    def to_pandas(self) -> pd.DataFrame:
        """A row a cell, with the JSON's keys as columns; intervals as `_low` and `_high`."""
        rows = []
        for cell in self.cells:
            row = {"model": self.model, "text": self.text, "first_round": self.first_round, **cell.to_json()}
            row.pop("counts_interval", None)
            for name in ("acceptance_rate", "tokens_per_round"):
                low, high = row.pop(f"{name}_interval") or (np.nan, np.nan)
                row |= {f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        return pd.DataFrame(rows).astype({"exit_layer": "Int64"})

    def _repr_html_(self) -> str:
        drafter = next((cell.drafter for cell in self.cells if cell.exit_layer is None), None)
        longest = max(2.0, *(cell.tokens_per_round or 1.0 for cell in self.cells))
        about = f"{self.model}: {len(self.prompts)} prompts, {self.text} text, first round: {self.first_round}"
        rates = grid_html(
            "acceptance rate over exit layer E and draft length K",
            {cell.cell: cell.acceptance_rate for cell in self.cells},
            lambda rate: Shaded(f"{rate:.2f}", rate),
            drafter=drafter,
        )
        per_round = grid_html(
            "tokens per round",
            {cell.cell: cell.tokens_per_round for cell in self.cells},
            lambda tokens: Shaded(f"{tokens:.2f}", (tokens - 1) / (longest - 1)),
            drafter=drafter,
        )
        return f"<p>{escape(about)}</p>{rates}{per_round}"


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)


def predict(
    trace: Trace,
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] = range(1, 9),
    first_round: str = "prefill",
    with_rounds: bool = False,
    *,
    drafter: bool | None = None,
    draft_rows: int | None = None,
    agreement: Callable[[int], np.ndarray] | None = None,
) -> Prediction:
    """Predict the rounds of every exit layer and draft length, and of the draft model where the trace has one.

    Parameters
    ----------
    exit_layers: 1..L-1 by default.
    first_round: "prefill" (our decoder: the prefill emits the first token) or "draft" (transformers: it is drafted).
    with_rounds: keep every round of every prompt, too.
    drafter: predict the trace's draft model, too; by default where it has one and no exit layers were named.
    draft_rows: F, for exit layers that draft with the head's rows of the F most frequent tokens only, in the order of
        the trace's draft vocabulary; by default with the whole head.
    agreement: in place of the trace's own; given a prompt's index it answers, for layers 0..L and output positions,
        (L+1, N), with bool for greedy text and with acceptance probabilities otherwise. For another head or lens.

    Raises
    ------
    InputError: for an exit layer, a draft length or a convention that does not exist, and for a draft head that the
        trace does not know.
    """
    if draft_rows is not None:
        draft_rows = len(trace.draft_head_ids(draft_rows))
        agreement = agreement or _draft_head_agreement(trace, draft_rows)
    exits = _exits(trace, exit_layers)
    budget = max(trace.manifest.max_new_tokens, int(trace.texts["new_tokens"].max()))
    lengths, first = _checked(draft_lengths, budget, first_round, int(trace.texts["new_tokens"].min()))
    greedy = trace.manifest.text == "greedy"
    drafters: list[tuple[int | None, str]] = [(exit_layer, SELF) for exit_layer in exits]
    if drafter or (drafter is None and exit_layers is None and trace.manifest.drafter is not None):
        drafters.append((None, _drafter_name(trace)))

    counted: list[_Counts] = []
    rounds: list[PromptRounds] = []
    texts = trace.texts.set_index("prompt").loc[trace.prompts]
    tokens = texts["new_tokens"].to_numpy()
    # A text that was cut short is taken for one whose budget ended there: its last round drafts no further.
    budgets = np.where(texts["ended"] == CUT, tokens, budget)
    for chunk in _chunks(tokens, len(drafters) * len(lengths)):
        prompts = trace.prompts[chunk]
        signal = _signal(trace, prompts, tokens[chunk], drafters, agreement)
        if greedy:
            walk = _walk(signal, tokens[chunk], lengths, budgets[chunk], first)
            counted.append(_tally(walk, int(lengths.max())))
            if with_rounds:
                rounds += _rounds_of_walk(walk, prompts, drafters, lengths)
        else:
            counted.append(_expect(signal, tokens[chunk], lengths, budgets[chunk], first)[0])
            if with_rounds:
                rounds += _probabilities(signal, prompts, tokens[chunk], drafters, lengths)

    counts = _Counts(*(np.concatenate(parts, axis=2) for parts in zip(*counted, strict=True)))
    emitted = np.maximum(tokens.astype(np.int64) - first, 0)
    return Prediction(
        model=trace.manifest.model.name,
        text=trace.manifest.text,
        decoding=dict(trace.manifest.decoding),
        first_round=first_round,
        budget=budget,
        exact=trace.manifest.text != "given",
        prompts=tuple(trace.prompts),
        cells=tuple(
            _cells(
                counts,
                emitted,
                drafters,
                lengths,
                near_ties=_near_ties(trace, drafters, draft_rows) if greedy else None,
                overlaps=None if greedy or agreement is not None else _overlaps(trace, drafters),
            )
        ),
        rounds=tuple(sorted(rounds, key=lambda row: row.prompt)) if with_rounds else None,
        draft_rows=draft_rows,
        exit_heads=trace.manifest.heads_name,
    )


def _exits(trace: Trace, exit_layers: Iterable[int] | None) -> list[int]:
    exits = list(range(1, trace.depth)) if exit_layers is None else list(dict.fromkeys(exit_layers))
    for exit_layer in exits:
        whole = isinstance(exit_layer, (int, np.integer)) and not isinstance(exit_layer, bool)
        if not whole or not 1 <= exit_layer < trace.depth:
            raise InputError(f"exit layer {exit_layer!r} is out of range: this model has exits 1..{trace.depth - 1}.")
    return [int(exit_layer) for exit_layer in exits]


def _drafter_name(trace: Trace) -> str:
    if trace.manifest.drafter is None:
        raise InputError("this trace has no draft model.", "Trace again with --draft-model.")
    return trace.manifest.drafter.name


def _draft_head_agreement(trace: Trace, rows: int) -> Callable[[int], np.ndarray]:
    return lambda prompt: trace.draft_head_agreement(prompt, rows, rounded=True)


def _chunks(tokens: np.ndarray, cells: int) -> Iterator[slice]:
    """Slices of the prompts whose sweep stays within bounds."""
    size = max(1, _CHUNK // max(1, int(tokens.max()) * cells))
    return (slice(start, start + size) for start in range(0, len(tokens), size))


def _signal(
    trace: Trace,
    prompts: Sequence[int],
    tokens: np.ndarray,
    drafters: Sequence[tuple[int | None, str]],
    agreement: Callable[[int], np.ndarray] | None,
) -> np.ndarray:
    """(drafters, prompts, N): agreement, bool, for greedy text, else w, float64; nothing beyond a text's end."""
    greedy = trace.manifest.text == "greedy"
    # A decoder that runs in a 16-bit type compares rounded logits.
    rounded = trace.manifest.dtype != "float32" and trace.manifest.statistics == "all"
    signal = np.zeros((len(drafters), len(prompts), int(tokens.max())), dtype=bool if greedy else np.float64)
    exits = [exit_layer for exit_layer, _ in drafters if exit_layer is not None]
    for index, prompt in enumerate(prompts):
        if agreement is not None:
            layers = np.asarray(agreement(prompt))
            if layers.shape != (trace.depth + 1, tokens[index]):
                expected = (trace.depth + 1, int(tokens[index]))
                raise InputError(f"the agreement of prompt {prompt} has shape {layers.shape}; expected {expected}.")
        elif exits:
            layers = trace.agreement(prompt, rounded=rounded) if greedy else trace.accept_probability(prompt)
        if exits:
            signal[: len(exits), index, : tokens[index]] = layers[exits]
        if len(exits) < len(drafters):
            own = trace.drafter_agreement(prompt, rounded=rounded) if greedy else None
            signal[-1, index, : tokens[index]] = trace.drafter_accept_probability(prompt) if own is None else own
    return signal


def _rounds_of_walk(
    walk: _Walk, prompts: Sequence[int], drafters: Sequence[tuple[int | None, str]], lengths: np.ndarray
) -> Iterator[PromptRounds]:
    many = (walk.drafted >= 0).sum(axis=0)
    for place, prompt in enumerate(prompts):
        for row, (exit_layer, name) in enumerate(drafters):
            for column, length in enumerate(lengths.tolist()):
                here = slice(many[row, column, place]), row, column, place
                drafted, accepted = walk.drafted[here].tolist(), walk.accepted[here].tolist()
                yield PromptRounds(prompt, exit_layer, length, name, tuple(drafted), tuple(accepted))


def _probabilities(
    signal: np.ndarray,
    prompts: Sequence[int],
    tokens: np.ndarray,
    drafters: Sequence[tuple[int | None, str]],
    lengths: np.ndarray,
) -> Iterator[PromptRounds]:
    for place, prompt in enumerate(prompts):
        for row, (exit_layer, name) in enumerate(drafters):
            w = tuple(signal[row, place, : tokens[place]].tolist())
            for length in lengths.tolist():
                yield PromptRounds(prompt, exit_layer, length, name, accept_probability=w)


def _near_ties(trace: Trace, drafters: Sequence[tuple[int | None, str]], draft_rows: int | None) -> list[int]:
    """Output positions of each drafter where it or the model is near a tie."""
    totals = [0] * len(drafters)
    for prompt in trace.prompts:
        model = trace.near_ties(prompt)[-1]
        layers = trace.near_ties(prompt) if draft_rows is None else trace.draft_head_near_ties(prompt, draft_rows)
        for row, (exit_layer, _) in enumerate(drafters):
            own = trace.drafter_values(prompt, "near_tie") if exit_layer is None else layers[exit_layer]
            totals[row] += int((own | model).sum())
    return totals


def _overlaps(trace: Trace, drafters: Sequence[tuple[int | None, str]]) -> list[float]:
    """Mean over the generated tokens of the sum of min(p, q), for each drafter."""
    totals = np.zeros(len(drafters))
    for prompt in trace.prompts:
        layers = trace.values(prompt, "overlap")
        for row, (exit_layer, _) in enumerate(drafters):
            own = trace.drafter_values(prompt, "overlap") if exit_layer is None else layers[exit_layer]
            totals[row] += own.sum(dtype=np.float64)
    return (totals / int(trace.texts["new_tokens"].sum())).tolist()


def _cells(
    counts: _Counts,
    tokens: np.ndarray,
    drafters: Sequence[tuple[int | None, str]],
    lengths: np.ndarray,
    near_ties: Sequence[int] | None,
    overlaps: Sequence[float] | None,
) -> Iterator[Cell]:
    rounds = counts.rounds_by_drafted.sum(axis=-1)
    drafted = counts.rounds_by_drafted @ np.arange(counts.rounds_by_drafted.shape[-1])
    accepted = counts.accepted_by_position.sum(axis=-1)
    rate = bootstrap_ratio(accepted, drafted)
    per_round = bootstrap_ratio(tokens, rounds)
    expected = {}
    if near_ties is None:
        share = 1 / len(tokens)  # a ratio to the number of prompts: the interval of a sum
        named = {"rounds": rounds, "drafted": drafted, "accepted": accepted}
        expected = {name: bootstrap_ratio(each, np.full(len(tokens), share)) for name, each in named.items()}
    for row, (exit_layer, name) in enumerate(drafters):
        for column, length in enumerate(lengths.tolist()):
            at = row, column
            intervals = {key: _interval(low[at], high[at]) for key, (low, high) in expected.items()}
            yield Cell(
                exit_layer=exit_layer,
                draft_length=length,
                drafter=name,
                tokens_of_prompt=tokens,
                rounds_by_drafted=counts.rounds_by_drafted[row, column, :, : length + 1],
                accepted_at=counts.accepted_by_position[row, column, :, :length],
                rejections_of_prompt=counts.rejections[row, column],
                acceptance_rate_interval=_interval(rate[0][at], rate[1][at]),
                tokens_per_round_interval=_interval(per_round[0][at], per_round[1][at]),
                expected_acceptance=None if overlaps is None else overlaps[row],
                near_ties=None if near_ties is None else near_ties[row],
                counts_interval=intervals or None,
            )


# ------------------------------------------------------------------------------------------------ runs
@dataclass(frozen=True, eq=False)
class RunLengths:
    """How long agreement lasts, against the geometric law that independent acceptances would follow.

    Parameters
    ----------
    exit_layer: E.
    chance: share of the output positions that agree: the law's parameter a.
    counts: (longest + 1,) runs of 0, 1, 2, ... agreements that a disagreement ended; a run starts at the beginning
        of a text and after each disagreement. What the end of a text cut off is not counted.
    geometric: (longest + 1,) how many are expected when every position agrees with chance a by itself, in texts of
        these lengths: a^r (1 - a) (1 + (N - 1 - r) (1 - a)) in a text of N > r tokens.
    """

    exit_layer: int
    chance: float
    counts: np.ndarray
    geometric: np.ndarray

    def to_pandas(self) -> pd.DataFrame:
        """Columns exit_layer, run, count, geometric."""
        run = np.arange(len(self.counts))
        columns = {"exit_layer": self.exit_layer, "run": run, "count": self.counts, "geometric": self.geometric}
        return pd.DataFrame(columns)


def run_lengths(trace: Trace, exit_layers: Iterable[int] | None = None) -> list[RunLengths]:
    """Run lengths of agreement over the generated tokens, for each exit layer."""
    exits = _exits(trace, exit_layers)
    texts = [trace.agreement(prompt) for prompt in trace.prompts]
    tokens = np.array([text.shape[1] for text in texts])
    longest = int(tokens.max()) - 1
    r = np.arange(longest + 1)
    found = []
    for exit_layer in exits:
        runs: list[np.ndarray] = []
        agreed = 0
        for text in texts:
            breaks = np.flatnonzero(~text[exit_layer])
            runs.append(np.diff(breaks, prepend=-1) - 1)
            agreed += int(text[exit_layer].sum())
        a = agreed / int(tokens.sum())
        places = tokens[:, None] - 1 - r  # starts that a run of r and its end leave room for, but for the first
        expected = np.where(places >= 0, a**r * (1 - a) * (1 + places * (1 - a)), 0.0).sum(axis=0)
        counts = np.bincount(np.concatenate(runs), minlength=longest + 1)
        found.append(RunLengths(exit_layer, a, counts, expected))
    return found
