"""The prediction against the running decoder: round by round, token by token, and in time.

A decoder computes a row alone, or among a few others; the trace computed it among all. Two logits that are closer than
that difference can change places: such a near-tie is counted and named. Any other difference is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from probekit.choice.choose import speedups
from probekit.costs.measure import FEWEST, measure_costs
from probekit.costs.profile import Costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.decoder import Decoder
from probekit.decoding.device_decoding import on_engine
from probekit.decoding.results import Decoded
from probekit.decoding.self_check import check_decodable
from probekit.decoding.speculative import Speculative
from probekit.drafting.drafters import Drafter, DraftModel, ExitLayer, equipped, sizes_of, traced_drafters
from probekit.drafting.keys import MODEL, DrafterKey, check_exits
from probekit.drafting.policies import FIXED, Policy
from probekit.errors import InputError
from probekit.lens.exit_heads import ExitHead
from probekit.models.loaded import Loaded, as_loaded, batch_invariant, unchanged
from probekit.prediction.intervals import bootstrap_ratio
from probekit.prediction.predict import predict
from probekit.prediction.rounds import rounds_of
from probekit.prediction.table import Cell
from probekit.progress import Progress
from probekit.ranks import Ranks, joined
from probekit.settings import digest
from probekit.traces.trace import Trace, as_trace
from probekit.tracing.plan import traced_heads
from probekit.validation.differences import Difference, PredictedText, apart, differences_of, with_margin
from probekit.validation.in_turns import decode_all
from probekit.validation.kept_texts import KeptTexts, keeping_texts
from probekit.validation.results import CellValidation, Validation


def validate(
    loaded: Loaded | str | Path,
    trace: Trace | str | Path,
    cells: Iterable[tuple[DrafterKey | int | None, int]] | None = None,
    *,
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] | None = None,
    limit: int | None = None,
    drafter: Loaded | None = None,
    draft_rows: int | None = None,
    drafters: Sequence[Drafter] | None = None,
    policy: Policy = FIXED,
    costs: Costs | None = None,
    repeats: int = 1,
    engine: str = "host",
    keep: str | Path | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> Validation:
    """Decode the trace's prompts, one at a time, and compare.

    Parameters
    ----------
    loaded, drafter: the models that were traced.
    cells: (drafter, draft length) pairs: a drafter's key, an exit layer, or None for the draft model, as JSON names
        them. By default every exit layer of `exit_layers` with every one of `draft_lengths` (all exits, 1..8), and the
        draft model where no exits are named.
    limit: only the first prompts of the trace.
    draft_rows: F, to draft at exit layers with the first F tokens of the trace's draft vocabulary only.
    drafters: in place of the cells: these, with every one of `draft_lengths`.
    policy: when rounds stop drafting early, in the prediction and in the decoder; never by default. Where it looks at
        drafts, the drafted tokens are estimated, and are not held against the decoder's.
    costs: for the predicted speedup; by default measured here, in a moment, at the context of these texts.
    repeats: how often each prompt is decoded; autoregressive decoding and all cells take turns.
    engine: who decodes, and whose costs are measured here, as for `probekit.decode`.
    keep: a folder for what was decoded: a call that was ended goes on from there when it is made again, by any number
        of processes. Nothing in it is needed once the call returns. None keeps nothing.
    ranks: processes that share the cells, each of which makes this same call; each measures speedups against its own
        autoregressive decoding. All get the whole result. Of a model that is split over them (`load(..,
        tensor_parallel=True)`) all run all cells, in step: `replace(ranks, in_step=True)`.
    progress: called as `progress("validate", done, total)`.

    Raises
    ------
    InputError: for given text, for another model than the traced one, and for cells that do not exist.

    Examples
    --------
    >>> import probekit
    >>> trace = probekit.trace("tales-layerskip", ["Once upon a time"], max_new_tokens=16)
    >>> probekit.validate("tales-layerskip", trace, [(3, 2)])
    Validation(tales-layerskip: 1 cells, greedy text, holds)
    """
    loaded, drafter, trace = as_loaded(loaded), None if drafter is None else as_loaded(drafter), as_trace(trace)
    loaded, drafter = as_traced(trace, loaded), None if drafter is None else as_traced(trace, drafter)
    check_models(loaded, trace, drafter)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"the limit is {limit!r} prompts; expected 1 or more.")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise InputError(f"repeats is {repeats!r}; expected 1 or more.")
    chosen = trace.select(trace.prompts[:limit])
    lengths = range(1, 9) if draft_lengths is None else draft_lengths
    with joined(ranks) as ranks:
        predicted = ranks.agreed(
            lambda: (
                _predicted(chosen, cells, exit_layers, draft_lengths, drafter, draft_rows, policy)
                if drafters is None
                else list(predict(chosen, draft_lengths=lengths, drafters=drafters, policy=policy).cells)
            )
        )
        names = [_name(cell, policy) for cell in predicted]
        with keeping_texts(keep, texts_digest(loaded, trace, engine), names, ranks) as kept:

            def run(mine: Sequence[Cell]) -> list[CellValidation]:
                everything = len(predicted), drafter, policy, costs, repeats, engine, kept, progress
                return _ran(loaded, chosen, mine, *everything)

            ran = ranks.shared_out(predicted, run)
    return Validation(
        trace.manifest.model.name,
        trace.manifest.settings.text,
        tuple(ran),
        draft_rows,
        trace.manifest.heads_name,
        policy,
    )


def _ran(
    loaded: Loaded,
    trace: Trace,
    cells: Sequence[Cell],
    many: int,
    drafter: Loaded | None,
    policy: Policy,
    costs: Costs | None,
    repeats: int,
    engine: str,
    kept: KeptTexts,
    progress: Progress | None,
) -> list[CellValidation]:
    """Some cells, run beside autoregressive decoding. many: how many there are in all."""
    heads = traced_heads(trace, loaded)
    decoders: list[Decoder] = [
        Speculative(
            loaded,
            equipped(cell.drafts, draft_model=drafter, exit_heads=heads),
            cell.draft_length,
            policy=policy,
        )
        for cell in cells
    ]
    plainly, *decoders = [on_engine(each, engine) for each in (Autoregressive(loaded), *decoders)]
    costs = costs or quick_costs(loaded, trace, cells, drafter, heads, policy, engine)
    costs.check_draft_head(cell.key for cell in cells)
    names = [_name(cell, policy) for cell in cells]
    named = dict(zip(names, decoders, strict=True))
    runs = decode_all(trace, plainly, named, repeats, kept, progress, whole=engine == "cuda")
    turns = [runs[name] for name in names]
    greedy = trace.manifest.settings.text == "greedy"
    compare = partial(_greedy, policy=policy) if greedy else partial(_sampled, cells=many)
    return [
        CellValidation(
            key=cell.key,
            draft_length=cell.draft_length,
            prompts=cell.prompts,
            predicted=cell.counts(),
            speedup_predicted=speedup,
            **speedups_measured(plain, own),
            **compare(loaded, trace, cell, own, plain),
        )
        for cell, (plain, own), speedup in zip(cells, turns, speedups(cells, costs), strict=True)
    ]


def _name(cell: Cell, policy: Policy) -> str:
    """Of a cell, for what is kept of it: who drafts and how, and what is predicted of it, prompt by prompt."""
    predicted = [getattr(cell, f"{name}_of_prompt").tolist() for name in _COMPARED]
    return digest(repr(cell.key), cell.draft_length, repr(policy), predicted)


def texts_digest(loaded: Loaded, trace: Trace, engine: str) -> str:
    """Of what decoded texts, and their times, depend on beside who drafts."""
    manifest = trace.manifest
    models = [each and each.weights_hash for each in (manifest.model, manifest.drafter)]
    made_with = asdict(manifest.settings), manifest.provenance.prompts_hash, models
    return digest(str(made_with), engine, str(loaded.device), str(loaded.dtype), loaded.anatomy.split_over)


def as_traced(trace: Trace, loaded: Loaded) -> Loaded:
    """A model of the run, decoding as the run was traced."""
    return batch_invariant(loaded) if trace.manifest.settings.batch_invariant else loaded


def check_models(loaded: Loaded, trace: Trace, drafter: Loaded | None) -> None:
    """Refuse what was not traced."""
    manifest = trace.manifest
    if manifest.settings.text == "given":
        raise InputError(
            "this run holds given text, which the model did not write: there is no decoding to hold it against.",
            "Trace the prompts without --given.",
        )
    for role, model, record in (("model", loaded, manifest.model), ("draft model", drafter, manifest.drafter)):
        if model is None:
            continue
        unchanged(model)
        check_decodable(model)
        if record is None:
            raise InputError("this run was traced without a draft model.", "Trace again with --draft-model.")
        if record.weights_hash != model.weights_hash:
            raise InputError(
                f"the run is of the {role} {record.name}; {model.name} is another model (other weights).",
                "Validate with the model that was traced.",
            )
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype != manifest.settings.dtype:
            raise InputError(f"the run was traced in {manifest.settings.dtype}, and {model.name} is loaded in {dtype}.")


def _predicted(
    trace: Trace,
    cells: Iterable[tuple[DrafterKey | int | None, int]] | None,
    exit_layers: Iterable[int] | None,
    draft_lengths: Iterable[int] | None,
    drafter: Loaded | None,
    draft_rows: int | None,
    policy: Policy,
) -> list[Cell]:
    """The predicted cells of these prompts, in the order asked for."""
    if cells is None:
        lengths = range(1, 9) if draft_lengths is None else draft_lengths
        two_models = drafter is not None and exit_layers is None
        drafters = traced_drafters(trace, exit_layers, draft_model=two_models, draft_rows=draft_rows)
        return list(predict(trace, draft_lengths=lengths, drafters=drafters, policy=policy).cells)
    named = list(dict.fromkeys(cells))
    if not named:
        raise InputError("there is no cell to validate.", "Name (exit layer, draft length) pairs.")
    known = traced_drafters(trace, draft_rows=draft_rows)
    asked = [_named(known, name, trace) for name, _ in named]
    if any(isinstance(each, DraftModel) for each in asked) and drafter is None:
        raise InputError("a cell of the draft model needs the draft model.", "Give `drafter`.")
    lengths = dict.fromkeys(length for _, length in named)
    table = predict(trace, draft_lengths=lengths, drafters=list(dict.fromkeys(asked)), policy=policy)
    return [table.cell(each.key, length) for each, (_, length) in zip(asked, named, strict=True)]


def _named(known: Sequence[Drafter], name: DrafterKey | int | None, trace: Trace) -> Drafter:
    found = next((each for each in known if each.key.names(name)), None)
    if found is None:
        if isinstance(name, int):
            check_exits([name], trace.depth)
        what = "a draft model" if name is None else name.label if isinstance(name, DrafterKey) else name
        raise InputError(f"this run was traced without {what}.", "Trace again with it.")
    return found


def quick_costs(
    loaded: Loaded,
    trace: Trace,
    cells: Sequence[Cell],
    drafter: Loaded | None,
    heads: Mapping[int, ExitHead],
    policy: Policy,
    engine: str = "host",
) -> Costs:
    """Costs at the context in the middle of these texts, from few sweeps."""
    middle = int((trace.texts["prompt_tokens"] + trace.texts["new_tokens"] / 2).median())
    longest = max(int(sizes_of(cell.drafts, cell.draft_length)[-1]) for cell in cells)
    used = drafter if any(cell.key.kind == MODEL for cell in cells) else None
    most = min(model.anatomy.context for model in (loaded, used) if model is not None) - max(2, longest) - 1
    ids = next((cell.drafts.draft_ids for cell in cells if isinstance(cell.drafts, ExitLayer)), None)
    return measure_costs(
        loaded,
        max(1, min(middle, most)),
        draft_lengths=[longest],
        drafter=used,
        draft_vocabulary=ids,
        exit_heads=heads,
        policy=policy,
        repeats=FEWEST,
        engine=engine,
    )


def speedups_measured(plain: Sequence[Sequence[Decoded]], own: Sequence[Sequence[Decoded]]) -> dict[str, Any]:
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


def _greedy(
    loaded: Loaded,
    trace: Trace,
    cell: Cell,
    own: Sequence[Sequence[Decoded]],
    plain: Sequence[Sequence[Decoded]],
    *,
    policy: Policy,
) -> dict[str, Any]:
    """The fields of CellValidation that say whether rounds and tokens are the same.

    Where the policy looks at drafts, drafted tokens are estimated: rounds are held against the accepted ones only.
    """
    differences: list[Difference] = []
    rows: list[tuple[int, int, int, int | None, int | None]] = []
    rounds_equal = tokens_equal = True
    excusable = positions = 0
    for prompt, runs, alone in zip(trace.prompts, own, plain, strict=True):
        text = PredictedText.of(trace, prompt, cell, policy)
        run, reference = runs[0], alone[0].tokens
        excusable += int((text.drafter_ties | text.model_ties).sum())
        positions += len(text.tokens)
        rounds = rounds_of(text.outlook, cell.draft_length, trace.manifest.settings.max_new_tokens)
        drafted, accepted = sizes_of(cell.drafts, cell.draft_length)[rounds.drafted].tolist(), rounds.accepted.tolist()
        rounds_equal &= accepted == run.accepted and (drafted == run.drafted or not policy.exact)
        tokens_equal &= run.tokens == reference
        differences += differences_of(
            text, cell.draft_length, trace.manifest.settings.max_new_tokens, run, exact=policy.exact
        )
        if run.tokens != reference:
            differences += apart(loaded, trace, text, run.tokens, reference)
        both = zip_longest(drafted, accepted, run.drafted, run.accepted)
        for index, (foreseen, predicted, found, measured) in enumerate(both):
            rows.append((prompt, index, found if foreseen is None else foreseen, predicted, measured))
    return {
        "measured": counts_of([runs[0] for runs in own]),
        "rounds_equal": rounds_equal,
        "tokens_equal": tokens_equal,
        "differences": tuple(with_margin(each, trace, cell) for each in dict.fromkeys(differences)),
        "excusable_share": excusable / max(1, positions),
        "differ_interval": None,
        "rounds": tuple(rows),
    }


def counts_of(runs: Iterable[Decoded]) -> dict[str, float]:
    totals = {"rounds": 0, "drafted": 0, "accepted": 0, "tokens": 0}
    for run in runs:
        totals["rounds"] += run.rounds
        totals["drafted"] += sum(run.drafted)
        totals["accepted"] += sum(run.accepted)
        totals["tokens"] += run.emitted
    return dict(totals)


_COMPARED = ("rounds", "drafted", "accepted")


def _sampled(
    loaded: Loaded,
    trace: Trace,
    cell: Cell,
    own: Sequence[Sequence[Decoded]],
    plain: Sequence[Sequence[Decoded]],
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
        measured = np.array([np.mean([counts_of([run])[name] for run in runs]) for runs in own])
        low, high = bootstrap_ratio(measured - getattr(cell, f"{name}_of_prompt"), share, confidence=confidence)
        intervals[name] = None if np.isnan(low) else (float(low), float(high))
    repeats = len(own[0])
    total = counts_of(run for runs in own for run in runs)
    return {
        "measured": {name: count / repeats for name, count in total.items()},
        "rounds_equal": None,
        "tokens_equal": None,
        "differences": (),
        "differ_interval": intervals,
        "rounds": (),
    }
