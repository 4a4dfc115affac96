"""`predict`: one trace -> the rounds of every exit layer and draft length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probekit.errors import InputError
from probekit.prediction.intervals import bootstrap_ratio, interval_or_none
from probekit.prediction.rounds import CUT, RoundCounts, Walk, check_lengths, expect_rounds, tally, walk_rounds
from probekit.prediction.table import SELF, Cell, Prediction, PromptRounds

if TYPE_CHECKING:
    from probekit.traces.trace import Trace

_CHUNK = 4_000_000  # cells x prompts x positions in one sweep


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
    exits = check_exits(trace, exit_layers)
    budget = max(trace.manifest.max_new_tokens, int(trace.texts["new_tokens"].max()))
    lengths, first = check_lengths(draft_lengths, budget, first_round, int(trace.texts["new_tokens"].min()))
    greedy = trace.manifest.text == "greedy"
    drafters: list[tuple[int | None, str]] = [(exit_layer, SELF) for exit_layer in exits]
    if drafter or (drafter is None and exit_layers is None and trace.manifest.drafter is not None):
        drafters.append((None, _drafter_name(trace)))

    counted: list[RoundCounts] = []
    rounds: list[PromptRounds] = []
    texts = trace.texts.set_index("prompt").loc[trace.prompts]
    tokens = texts["new_tokens"].to_numpy()
    # A text that was cut short is taken for one whose budget ended there: its last round drafts no further.
    budgets = np.where(texts["ended"] == CUT, tokens, budget)
    for chunk in _chunks(tokens, len(drafters) * len(lengths)):
        prompts = trace.prompts[chunk]
        signal = _signal(trace, prompts, tokens[chunk], drafters, agreement)
        if greedy:
            walk = walk_rounds(signal, tokens[chunk], lengths, budgets[chunk], first)
            counted.append(tally(walk, int(lengths.max())))
            if with_rounds:
                rounds += _rounds_of_walk(walk, prompts, drafters, lengths)
        else:
            counted.append(expect_rounds(signal, tokens[chunk], lengths, budgets[chunk], first)[0])
            if with_rounds:
                rounds += _probabilities(signal, prompts, tokens[chunk], drafters, lengths)

    counts = RoundCounts(*(np.concatenate(parts, axis=2) for parts in zip(*counted, strict=True)))
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


def check_exits(trace: Trace, exit_layers: Iterable[int] | None) -> list[int]:
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
    walk: Walk, prompts: Sequence[int], drafters: Sequence[tuple[int | None, str]], lengths: np.ndarray
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
    counts: RoundCounts,
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
            intervals = {key: interval_or_none(low[at], high[at]) for key, (low, high) in expected.items()}
            yield Cell(
                exit_layer=exit_layer,
                draft_length=length,
                drafter=name,
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
