"""The prediction against the running decoder: round by round, token by token, and in time.

A decoder computes a row alone, or among a few others; the trace computed it among all. Two logits that are closer than
that difference can change places: such a near-tie is counted and named. Any other difference is a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import GenerationConfig

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.engine import Method
from probekit.decoding.results import Decoded
from probekit.decoding.sampling import Sampling
from probekit.decoding.self_speculative import SelfSpeculative
from probekit.decoding.speculative import Speculative
from probekit.errors import InputError
from probekit.lens.heads import ExitHead
from probekit.models.loading import Loaded
from probekit.prediction.acceptance import Cell, bootstrap_ratio, predict, rounds_of
from probekit.prediction.choice import check_draft_head, speedups
from probekit.prediction.costs import FEWEST, Costs, measure_costs
from probekit.tracing.shading import Colour, Shaded, shaded_table
from probekit.tracing.tracer import traced_heads
from probekit.tracing.traces import Trace

SCHEMA = "probekit/validate/1"
WARM_UP_TOKENS = 8

Progress = Callable[..., None]
CellName = tuple[int | None, int]


@dataclass(frozen=True)
class Difference:
    """A place where the decoder left the prediction.

    what: "tokens", "rounds" or "drafts". output: the output index that decided. kind: "near-tie", or "unexplained",
    which is a bug. predicted, measured: the token; or the accepted (drafted) tokens of the round.
    """

    prompt: int
    what: str
    output: int
    kind: str
    predicted: int | None
    measured: int | None


@dataclass(frozen=True, eq=False)
class CellValidation:
    """One cell, predicted and run on the same prompts.

    predicted, measured: counts: rounds, drafted, accepted, tokens. For sampled text expected counts, and the mean of
    the decoder's runs.
    rounds_equal, tokens_equal: every round as predicted; every token as autoregressive decoding gives it. None for
        sampled text.
    differences: where not, each place once.
    differ_interval: {count: (low, high)} of measured - predicted, for sampled text only: joint 95 % intervals of the
        three counts of all cells of a validation (Bonferroni: each at 1 - 5 % / counts), by bootstrap over prompts.
    speedup_measured: time of autoregressive decoding over the cell's, decoding only, all prompts together, the median
        of each prompt's runs; end to end, with the prefill. speedup_measured_quantiles: 20 % and 80 % of single runs.
    rounds: (prompt, round, drafted, accepted as predicted, accepted as measured), greedy text only.
    """

    exit_layer: int | None
    draft_length: int
    drafter: str
    prompts: int
    predicted: dict[str, float]
    measured: dict[str, float]
    rounds_equal: bool | None
    tokens_equal: bool | None
    differences: tuple[Difference, ...]
    differ_interval: dict[str, tuple[float, float] | None] | None
    speedup_predicted: float | None
    speedup_measured: float | None
    speedup_measured_quantiles: tuple[float, float] | None
    speedup_measured_end_to_end: float | None
    rounds: tuple[tuple[int, int, int, int | None, int | None], ...]

    @property
    def label(self) -> str:
        return self.drafter if self.exit_layer is None else f"layer {self.exit_layer}"

    @property
    def ties(self) -> int:
        return sum(difference.kind == "near-tie" for difference in self.differences)

    @property
    def unexplained(self) -> int:
        return len(self.differences) - self.ties

    @property
    def within_interval(self) -> bool | None:
        """Sampled text: every interval of measured - predicted holds 0."""
        if self.differ_interval is None:
            return None
        return all(pair is None or pair[0] <= 0 <= pair[1] for pair in self.differ_interval.values())

    def shaded(self) -> list[Shaded]:
        """A row of the table that a notebook shows: counts, what was equal, speedups."""
        counts = [
            Shaded(f"{side[name]:,.0f}" if float(side[name]).is_integer() else f"{side[name]:,.1f}")
            for name in ("rounds", "accepted")
            for side in (self.predicted, self.measured)
        ]
        equal = [
            Shaded("-") if same is None else Shaded("yes" if same else "no", 0.5, "blue" if same else "orange")
            for same in (self.rounds_equal, self.tokens_equal)
        ]
        odd = [Shaded(str(self.ties)), Shaded(str(self.unexplained), float(self.unexplained > 0), "orange")]
        speedups = [
            Shaded("-") if speedup is None else Shaded(f"{speedup:.2f}", abs(speedup - 1), _colour(speedup))
            for speedup in (self.speedup_predicted, self.speedup_measured)
        ]
        return [Shaded(str(self.draft_length)), Shaded(str(self.prompts)), *counts, *equal, *odd, *speedups]

    def to_json(self) -> dict[str, Any]:
        quantiles = self.speedup_measured_quantiles
        document: dict[str, Any] = {
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafter": self.drafter,
            "prompts": self.prompts,
            "predicted": self.predicted,
            "measured": self.measured,
            "rounds_equal": self.rounds_equal,
            "tokens_equal": self.tokens_equal,
            "ties": self.ties,
            "unexplained": self.unexplained,
            "differences": [asdict(difference) for difference in self.differences],
            "speedup_predicted": self.speedup_predicted,
            "speedup_measured": self.speedup_measured,
            "speedup_measured_quantiles": None if quantiles is None else list(quantiles),
            "speedup_measured_end_to_end": self.speedup_measured_end_to_end,
        }
        if self.differ_interval is not None:
            listed = {name: None if pair is None else list(pair) for name, pair in self.differ_interval.items()}
            document |= {"difference_interval": listed, "within_interval": self.within_interval}
        return document


def _colour(speedup: float) -> Colour:
    return "blue" if speedup >= 1 else "orange"


@dataclass(frozen=True, eq=False)
class Validation:
    """Cells that were run, beside what was predicted of them."""

    model: str
    text: str
    cells: tuple[CellValidation, ...]
    draft_rows: int | None = None
    exit_heads: str | None = None

    @property
    def holds(self) -> bool:
        """No difference but near-ties; for sampled text, every count within its interval."""
        return all(cell.unexplained == 0 and cell.within_interval is not False for cell in self.cells)

    def rounds_json(self) -> list[dict[str, Any]]:
        """A row a round: its cell, prompt, round, drafted, accepted_predicted, accepted_measured.

        Where the decoder left the prediction, one of the two may have more rounds; the other's are null.
        """
        names = ("prompt", "round", "drafted", "accepted_predicted", "accepted_measured")
        return [
            {"exit_layer": cell.exit_layer, "draft_length": cell.draft_length, "drafter": cell.drafter}
            | dict(zip(names, row, strict=True))
            for cell in self.cells
            for row in cell.rounds
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "text": self.text,
            "draft_rows": self.draft_rows,
            "exit_heads": self.exit_heads,
            "cells": [cell.to_json() for cell in self.cells],
        }

    def to_pandas(self) -> pd.DataFrame:
        """A row a cell; counts as `predicted_*` and `measured_*`."""
        rows = []
        for cell in self.cells:
            row = cell.to_json()
            for name in ("differences", "difference_interval"):
                row.pop(name, None)
            low, high = row.pop("speedup_measured_quantiles") or (np.nan, np.nan)
            for side in ("predicted", "measured"):
                row |= {f"{side}_{name}": value for name, value in row.pop(side).items()}
            rows.append({"model": self.model, **row, "speedup_measured_20": low, "speedup_measured_80": high})
        return pd.DataFrame(rows).astype({"exit_layer": "Int64"})

    def _repr_html_(self) -> str:
        heads = ["K", "prompts", "rounds predicted", "measured", "accepted predicted", "measured", "rounds equal",
                 "tokens equal", "near-ties", "unexplained", "speedup predicted", "measured"]  # fmt: skip
        return shaded_table(
            f"{self.model}: the prediction beside the running decoder, {self.text} text; speedups: blue gains, "
            "orange loses",
            "drafts at", heads, [(cell.label, cell.shaded()) for cell in self.cells],
        )  # fmt: skip


def validate(
    loaded: Loaded,
    trace: Trace,
    cells: Iterable[CellName] | None = None,
    *,
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] | None = None,
    limit: int | None = None,
    drafter: Loaded | None = None,
    draft_rows: int | None = None,
    costs: Costs | None = None,
    repeats: int = 1,
    progress: Progress | None = None,
) -> Validation:
    """Decode the trace's prompts, one at a time, and compare.

    Parameters
    ----------
    loaded, drafter: the models that were traced.
    cells: (exit layer, draft length) pairs; exit layer None is the draft model. By default every exit layer of
        `exit_layers` with every one of `draft_lengths` (all exits, 1..8), and the draft model where no exits are named.
    limit: only the first prompts of the trace.
    draft_rows: F, to draft at exit layers with the first F tokens of the trace's draft vocabulary only.
    costs: for the predicted speedup; by default measured here, in a moment, at the context of these texts.
    repeats: how often each prompt is decoded; autoregressive decoding and all cells take turns.
    progress: called as `progress("validate", done, total)`.

    Raises
    ------
    InputError: for given text, for another model than the traced one, and for cells that do not exist.
    """
    _check_models(loaded, trace, drafter)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"the limit is {limit!r} prompts; expected 1 or more.")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise InputError(f"repeats is {repeats!r}; expected 1 or more.")
    chosen = trace.select(trace.prompts[:limit])
    predicted = _predicted(chosen, cells, exit_layers, draft_lengths, drafter, draft_rows)
    heads = traced_heads(trace, loaded)
    ids = None if draft_rows is None else torch.from_numpy(trace.draft_head_ids(draft_rows))
    methods: list[Method] = [
        SelfSpeculative(
            loaded, cell.exit_layer, cell.draft_length, exit_head=heads.get(cell.exit_layer), draft_vocabulary=ids
        )
        if cell.exit_layer is not None
        else Speculative(loaded, drafter, cell.draft_length)  # type: ignore[arg-type]
        for cell in predicted
    ]
    costs = costs or _quick_costs(loaded, chosen, predicted, drafter, ids, heads)
    check_draft_head(draft_rows, trace.manifest.heads_name, costs)
    plain, *runs = _decode(chosen, [Autoregressive(loaded), *methods], repeats, progress)
    compare = _greedy if trace.manifest.text == "greedy" else partial(_sampled, cells=len(predicted))
    return Validation(
        trace.manifest.model.name,
        trace.manifest.text,
        tuple(
            CellValidation(
                exit_layer=cell.exit_layer,
                draft_length=cell.draft_length,
                drafter=cell.drafter,
                prompts=cell.prompts,
                predicted=cell.counts(),
                speedup_predicted=speedup,
                **_speedups_measured(plain, own),
                **compare(loaded, chosen, cell, own, plain, draft_rows),
            )
            for cell, own, speedup in zip(predicted, runs, speedups(predicted, costs), strict=True)
        ),
        draft_rows,
        trace.manifest.heads_name,
    )


def _check_models(loaded: Loaded, trace: Trace, drafter: Loaded | None) -> None:
    """Refuse what was not traced."""
    manifest = trace.manifest
    if manifest.text == "given":
        raise InputError(
            "this run holds given text, which the model did not write: there is no decoding to hold it against.",
            "Trace the prompts without --given.",
        )
    for role, model, record in (("model", loaded, manifest.model), ("draft model", drafter, manifest.drafter)):
        if model is None:
            continue
        if record is None:
            raise InputError("this run was traced without a draft model.", "Trace again with --draft-model.")
        if record.weights_hash != model.weights_hash:
            raise InputError(
                f"the run is of the {role} {record.name}; {model.name} is another model (other weights).",
                "Validate with the model that was traced.",
            )
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype != manifest.dtype:
            raise InputError(f"the run was traced in {manifest.dtype}, and {model.name} is loaded in {dtype}.")


def _predicted(
    trace: Trace,
    cells: Iterable[CellName] | None,
    exit_layers: Iterable[int] | None,
    draft_lengths: Iterable[int] | None,
    drafter: Loaded | None,
    draft_rows: int | None,
) -> list[Cell]:
    """The predicted cells of these prompts, in the order asked for."""
    if cells is None:
        lengths = range(1, 9) if draft_lengths is None else draft_lengths
        two_models = drafter is not None and exit_layers is None
        return list(predict(trace, exit_layers, lengths, drafter=two_models, draft_rows=draft_rows).cells)
    named = list(dict.fromkeys(cells))
    if not named:
        raise InputError("there is no cell to validate.", "Name (exit layer, draft length) pairs.")
    two_models = any(exit_layer is None for exit_layer, _ in named)
    if two_models and drafter is None:
        raise InputError("a cell of the draft model needs the draft model.", "Give `drafter`.")
    exits = dict.fromkeys(exit_layer for exit_layer, _ in named if exit_layer is not None)
    lengths = dict.fromkeys(length for _, length in named)
    table = predict(trace, exits, lengths, drafter=two_models, draft_rows=draft_rows)
    return [table.cell(*name) for name in named]


def _quick_costs(
    loaded: Loaded,
    trace: Trace,
    cells: Sequence[Cell],
    drafter: Loaded | None,
    ids: Tensor | None,
    heads: Mapping[int, ExitHead],
) -> Costs:
    """Costs at the context in the middle of these texts, from few sweeps."""
    middle = int((trace.texts["prompt_tokens"] + trace.texts["new_tokens"] / 2).median())
    longest = max(cell.draft_length for cell in cells)
    used = drafter if any(cell.exit_layer is None for cell in cells) else None
    most = min(model.anatomy.context for model in (loaded, used) if model is not None) - max(2, longest) - 1
    return measure_costs(
        loaded,
        max(1, min(middle, most)),
        draft_lengths=[longest],
        drafter=used,
        draft_vocabulary=None if ids is None else ids.tolist(),
        exit_heads=heads,
        repeats=FEWEST,
    )


def _decode(
    trace: Trace, methods: Sequence[Method], repeats: int, progress: Progress | None
) -> list[list[list[Decoded]]]:
    """Decode every prompt with every method, `repeats` times, in turns: [method][prompt][repeat]."""
    manifest = trace.manifest
    setting = {"temperature": manifest.decoding["temperature"], "top_p": manifest.decoding["top_p"]}
    prompts = [trace.prompt_ids(prompt).tolist() for prompt in trace.prompts]
    budget = manifest.max_new_tokens
    greedy = manifest.text == "greedy"
    for method in methods:  # the first passes of a process are slow
        method.decode(prompts[:1], max_new_tokens=min(budget, WARM_UP_TOKENS))
    found: list[list[list[Decoded]]] = [[[] for _ in prompts] for _ in methods]
    done, total = 0, repeats * len(prompts) * len(methods)
    for repeat in range(repeats):
        # other random numbers than the trace's, and others each time: the decoder's texts are its own
        seed = manifest.seed if greedy else manifest.seed + 1 + repeat
        sampling = Sampling(**setting, top_k=int(manifest.decoding["top_k"]), seed=seed)
        for place, ids in enumerate(prompts):
            for turn in range(len(methods)):
                which = (turn + place + repeat) % len(methods)
                found[which][place] += methods[which].decode(
                    [ids], max_new_tokens=budget, sampling=sampling, indices=[trace.prompts[place]]
                )
                done += 1
                if progress is not None:
                    progress("validate", done, total)
    return found


# ------------------------------------------------------------------------------------------------ time
def _speedups_measured(plain: Sequence[Sequence[Decoded]], own: Sequence[Sequence[Decoded]]) -> dict[str, Any]:
    """Seconds a token of autoregressive decoding over those of a cell, each prompt by the median of its runs."""

    def seconds(runs: Sequence[Decoded], prefill: bool) -> float:
        """Per token that rounds emitted."""
        return float(np.median([_seconds(run, prefill) / run.emitted for run in runs]))

    pairs = [
        (theirs, mine) for theirs, mine in zip(plain, own, strict=True) if all(run.emitted for run in (*theirs, *mine))
    ]
    if not pairs:
        return {"speedup_measured": None, "speedup_measured_quantiles": None, "speedup_measured_end_to_end": None}
    # Each prompt counts by the tokens that autoregressive decoding wrote: for greedy text, the same tokens.
    weights = np.array([np.mean([run.emitted for run in theirs]) for theirs, _ in pairs])

    def ratio(prefill: bool) -> float:
        slow = np.array([seconds(theirs, prefill) for theirs, _ in pairs])
        fast = np.array([seconds(mine, prefill) for _, mine in pairs])
        return float(weights @ slow / (weights @ fast))

    single = [
        seconds([there], False) / seconds([here], False)
        for theirs, mine in pairs
        for there, here in zip(theirs, mine, strict=True)
    ]
    low, high = np.quantile(single, [0.2, 0.8])
    return {
        "speedup_measured": ratio(prefill=False),
        "speedup_measured_quantiles": (float(low), float(high)),
        "speedup_measured_end_to_end": ratio(prefill=True),
    }


def _seconds(run: Decoded, prefill: bool) -> float:
    return run.seconds["total"] - (0.0 if prefill else run.seconds["prefill"])


# ------------------------------------------------------------------------------------------------ greedy text
def _greedy(
    loaded: Loaded,
    trace: Trace,
    cell: Cell,
    own: Sequence[Sequence[Decoded]],
    plain: Sequence[Sequence[Decoded]],
    draft_rows: int | None,
) -> dict[str, Any]:
    """The fields of CellValidation that say whether rounds and tokens are the same."""
    differences: list[Difference] = []
    rows: list[tuple[int, int, int, int | None, int | None]] = []
    rounds_equal = tokens_equal = True
    for prompt, runs, alone in zip(trace.prompts, own, plain, strict=True):
        text = _Text.of(trace, prompt, cell, draft_rows)
        run, reference = runs[0], alone[0].tokens
        rounds = rounds_of(text.agrees, cell.draft_length, trace.manifest.max_new_tokens)
        drafted, accepted = rounds.drafted.tolist(), rounds.accepted.tolist()
        rounds_equal &= drafted == run.drafted and accepted == run.accepted
        tokens_equal &= run.tokens == reference
        differences += differences_of(text, cell.draft_length, trace.manifest.max_new_tokens, run)
        if run.tokens != reference:
            differences += _apart(loaded, trace, text, run.tokens, reference)
        both = zip_longest(drafted, accepted, run.drafted, run.accepted)
        for index, (foreseen, predicted, found, measured) in enumerate(both):
            rows.append((prompt, index, found if foreseen is None else foreseen, predicted, measured))
    return {
        "measured": _counts([runs[0] for runs in own]),
        "rounds_equal": rounds_equal,
        "tokens_equal": tokens_equal,
        "differences": tuple(dict.fromkeys(differences)),
        "differ_interval": None,
        "rounds": tuple(rows),
    }


class _Text(NamedTuple):
    """What the trace says of one prompt: y, the drafter's agreement, and near-ties of the drafter and of the model."""

    prompt: int
    tokens: list[int]
    agrees: np.ndarray
    drafter_ties: np.ndarray
    model_ties: np.ndarray

    @classmethod
    def of(cls, trace: Trace, prompt: int, cell: Cell, draft_rows: int | None) -> _Text:
        rounded = trace.manifest.dtype != "float32" and trace.manifest.statistics == "all"
        ties = trace.near_ties(prompt)
        if cell.exit_layer is None:
            agrees = trace.drafter_agreement(prompt, rounded=rounded)
            own = trace.drafter_values(prompt, "near_tie")
        elif draft_rows is not None:
            agrees = trace.draft_head_agreement(prompt, draft_rows, rounded=True)[cell.exit_layer]
            own = trace.draft_head_near_ties(prompt, draft_rows)[cell.exit_layer]
        else:
            agrees, own = trace.agreement(prompt, rounded=rounded)[cell.exit_layer], ties[cell.exit_layer]
        return cls(prompt, trace.outputs(prompt).tolist(), agrees, own, ties[-1])


def differences_from(
    trace: Trace, prompt: int, cell: Cell, run: Decoded, draft_rows: int | None = None
) -> list[Difference]:
    """Where a decoder's run of one prompt of a greedy trace leaves the prediction of a cell."""
    text = _Text.of(trace, prompt, cell, draft_rows)
    return differences_of(text, cell.draft_length, trace.manifest.max_new_tokens, run)


def differences_of(text: _Text, draft_length: int, budget: int, run: Decoded) -> list[Difference]:
    """Where a decoder's run leaves the trace: the first token that differs, and every round before it that does.

    After a round that differs, the next ones are judged from where the decoder really is.
    """
    y, N = text.tokens, len(text.tokens)
    left = _first_difference(y, run.tokens)
    found = []
    if left is not None:
        tie = left < N and bool(text.model_ties[left])
        found.append(_difference(text.prompt, "tokens", left, tie, _at(y, left), _at(run.tokens, left)))
    i, end = 1, N if left is None else left
    for drafted, accepted in zip(run.drafted, run.accepted, strict=True):
        if i >= end:
            break
        k = min(draft_length, budget - i - 1)
        if drafted != k:
            found.append(_difference(text.prompt, "drafts", i, False, k, drafted))
        breaks = np.flatnonzero(~text.agrees[i : i + drafted])
        expected = min(int(breaks[0]) if len(breaks) else drafted, N - i)
        decided = i + min(accepted, expected)
        if accepted != expected and decided < end:
            tie = bool(text.drafter_ties[decided] or text.model_ties[decided])
            found.append(_difference(text.prompt, "rounds", decided, tie, expected, accepted))
        i += accepted + 1
    return found


def _apart(
    loaded: Loaded, trace: Trace, text: _Text, tokens: Sequence[int], reference: Sequence[int]
) -> list[Difference]:
    """Where a cell and autoregressive decoding part, unless the trace has named that place already."""
    place = _first_difference(tokens, reference)
    assert place is not None
    if place == _first_difference(text.tokens, tokens):
        return []
    before = list(tokens[:place])
    if before == text.tokens[:place] and place < len(text.tokens):
        tie = bool(text.model_ties[place])
    else:  # both had left the trace together
        tie = _margin(loaded, [*trace.prompt_ids(text.prompt).tolist(), *before]) < (trace.manifest.noise or 0.0)
    return [_difference(text.prompt, "tokens", place, tie, _at(reference, place), _at(tokens, place))]


def _margin(loaded: Loaded, ids: Sequence[int]) -> float:
    """Difference of the two top logits after these tokens."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([list(ids)], device=loaded.device)).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    return first - second


def _difference(
    prompt: int, what: str, output: int, tie: bool, predicted: int | None, measured: int | None
) -> Difference:
    return Difference(prompt, what, output, "near-tie" if tie else "unexplained", predicted, measured)


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first index at which two lists differ; where one ends, if it is the other's beginning."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return None if len(left) == len(right) else min(len(left), len(right))


def _at(tokens: Sequence[int], place: int) -> int | None:
    return tokens[place] if place < len(tokens) else None


def _counts(runs: Iterable[Decoded]) -> dict[str, float]:
    totals = {"rounds": 0, "drafted": 0, "accepted": 0, "tokens": 0}
    for run in runs:
        totals["rounds"] += run.rounds
        totals["drafted"] += sum(run.drafted)
        totals["accepted"] += sum(run.accepted)
        totals["tokens"] += run.emitted
    return dict(totals)


# ------------------------------------------------------------------------------------------------ sampled text
_COMPARED = ("rounds", "drafted", "accepted")


def _sampled(
    loaded: Loaded,
    trace: Trace,
    cell: Cell,
    own: Sequence[Sequence[Decoded]],
    plain: Sequence[Sequence[Decoded]],
    draft_rows: int | None,
    *,
    cells: int,
) -> dict[str, Any]:
    """The fields of CellValidation that say whether counts agree: measured - predicted, prompt by prompt.

    Prompt by prompt both have the same expectation over the texts that the model writes, so their differences are
    centred at 0, whatever the prompts.
    """
    share = np.full(len(own), 1 / len(own))  # a ratio to the number of prompts: the interval of a sum
    confidence = 1 - 0.05 / (len(_COMPARED) * cells)
    intervals: dict[str, tuple[float, float] | None] = {}
    for name in _COMPARED:
        measured = np.array([np.mean([_counts([run])[name] for run in runs]) for runs in own])
        low, high = bootstrap_ratio(measured - getattr(cell, f"{name}_of_prompt"), share, confidence=confidence)
        intervals[name] = None if np.isnan(low) else (float(low), float(high))
    repeats = len(own[0])
    total = _counts(run for runs in own for run in runs)
    return {
        "measured": {name: count / repeats for name, count in total.items()},
        "rounds_equal": None,
        "tokens_equal": None,
        "differences": (),
        "differ_interval": intervals,
        "rounds": (),
    }


# ------------------------------------------------------------------------------------------------ transformers
class TransformersRounds(NamedTuple):
    """What transformers' own early-exit generation did: its tokens, and drafted and accepted tokens of each round.

    `drafted` is as transformers counts: its drafts stop at an end-of-sequence token. `accepted` is corrected: where
    the text ended with a drafted end-of-sequence token, transformers counts that token as the bonus, and here it is
    accepted.
    """

    tokens: list[int]
    drafted: list[int]
    accepted: list[int]


def transformers_accepted(
    loaded: Loaded, prompt_ids: Sequence[int], exit_layer: int, draft_length: int, max_new_tokens: int
) -> TransformersRounds:
    """Run `generate(assistant_early_exit=E)`, greedy, with K drafts in every round, and count them.

    Rounds follow the `draft` convention. The draft settings stand on the model's generation_config, for transformers
    ignores them as arguments with early exit; the checkpoint's own generation_config is set aside meanwhile. The model
    comes back as it was, also after an exception.
    """
    loaded.anatomy.check_exit(exit_layer)
    eos = sorted(loaded.eos_ids)
    ids = torch.tensor([list(prompt_ids)], device=loaded.device)
    candidates: list[tuple[int, Tensor]] = []  # of each round: the length before it, and the text with its drafts
    lengths: list[int] = []  # after each round
    with _plain_generation(loaded.model, draft_length, eos), _watched(loaded.model, candidates, lengths):
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            assistant_early_exit=exit_layer,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    text = output[0].tolist()
    drafted, accepted = [], []
    for (before, proposal), after in zip(candidates, lengths, strict=True):
        drafts = proposal[0, before:].tolist()
        emitted = text[before:after]
        ended_in_draft = emitted[-1] in loaded.eos_ids and drafts[: len(emitted)] == emitted
        drafted.append(len(drafts))
        accepted.append(len(emitted) - (0 if ended_in_draft else 1))
    return TransformersRounds(text[len(prompt_ids) :], drafted, accepted)


@contextmanager
def _plain_generation(model: Any, draft_length: int, eos: Sequence[int]) -> Iterator[None]:
    """A generation_config with the draft settings and nothing else; the model's own comes back."""
    own, layers = model.generation_config, model.config.num_hidden_layers
    model.generation_config = GenerationConfig(
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
        num_assistant_tokens=draft_length,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    try:
        yield
    finally:
        model.generation_config = own
        model.config.num_hidden_layers = layers  # transformers leaves it changed after an exception


@contextmanager
def _watched(model: Any, candidates: list[tuple[int, Tensor]], lengths: list[int]) -> Iterator[None]:
    """Note each round's drafts, and how long the text is after it."""
    make = model._get_candidate_generator

    def watched(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        propose, judge = generator.get_candidates, generator.update_candidate_strategy

        def get_candidates(input_ids: Tensor, *more: Any, **named: Any) -> Any:
            found = propose(input_ids, *more, **named)
            candidates.append((input_ids.shape[1], found[0]))
            return found

        def update_candidate_strategy(input_ids: Tensor, *more: Any, **named: Any) -> Any:
            lengths.append(input_ids.shape[1])
            return judge(input_ids, *more, **named)

        generator.get_candidates, generator.update_candidate_strategy = get_candidates, update_candidate_strategy
        return generator

    model._get_candidate_generator = watched
    try:
        yield
    finally:
        del model._get_candidate_generator
