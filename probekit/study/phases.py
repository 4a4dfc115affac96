"""The phases of a study: functions from finished artefacts to one artefact, in the order in which they run."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from probekit.choice.choose import Choice, choose
from probekit.choice.rank import rank, with_trees
from probekit.choice.ranking import Ranking
from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.drafting.keys import DrafterKey
from probekit.errors import InputError, Remark, SelfCheckError
from probekit.kept import Kept
from probekit.prediction.predict import predict
from probekit.prediction.table import Prediction
from probekit.progress import Progress
from probekit.settings import KeptResiduals, StudySettings, TraceSettings
from probekit.traces.draft_vocabulary import DraftVocabulary, check_draft_rows
from probekit.traces.trace import Trace
from probekit.tracing.prompts import Prompt, encode
from probekit.validation.run import validate
from probekit.validation.ways import validate_ways

if TYPE_CHECKING:
    from probekit.lens.exit_heads import ExitHead
    from probekit.models.loaded import Loaded

TIMED_PROMPTS = 6  # prompts on which a trace is timed against generation
SPREAD_PROMPTS = 4  # prompts on which the cells that were not chosen are run, and other ways of drafting than pairs
THREAD_TOKENS, THREAD_TURNS = 16, 3  # decoded to find how many threads are fastest


@dataclass(frozen=True, eq=False)
class Models:
    """The model of a study, and the one that drafts for it, where one is asked for."""

    loaded: Loaded
    drafter: Loaded | None


@dataclass(frozen=True, eq=False)
class Drafting:
    """What was learned of drafting: exit heads, and the tokens that a smaller draft head keeps. None: neither."""

    heads: dict[int, ExitHead] | None = None
    vocabulary: DraftVocabulary | None = None


@dataclass(frozen=True, eq=False)
class Validated:
    """What the decoder did. cells, ways: as in `validate --json`; rounds: one dict each."""

    cells: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    ways: list[dict[str, Any]]


def load_model(
    settings: StudySettings, reference: str, prompts: Sequence[Prompt], progress: Progress
) -> Models:  # fmt: skip
    """Load the model, and the drafter where one is asked for, and check that all of the study can be done with them."""
    from probekit.decoding.self_check import check_decodable
    from probekit.models.loaded import load
    from probekit.tracing.plan import plan_trace

    progress("load", 0, 1)
    loaded = load(reference, adapter=settings.adapter, device=settings.device, dtype=settings.dtype)
    check_decodable(loaded)
    if loaded.depth < 2:
        raise InputError(f"{loaded.name} has one layer, and so no exit to draft from: there is nothing to study.")
    _check_reach(loaded, settings)
    drafter = None
    if settings.draft_model:
        drafter = load(settings.draft_model, device=settings.device, dtype=settings.dtype)
    asked = TraceSettings(max_new_tokens=settings.max_new_tokens, sampling=settings.sampling, chat=settings.chat)
    plan_trace(loaded, prompts, asked, draft_model=drafter)  # every prompt fits
    progress("load", 1, 1)
    return Models(loaded, drafter)


def _check_reach(loaded: Loaded, settings: StudySettings) -> None:
    """What was asked for must exist in this model: found out now, not after its trace."""
    for exit_layer in settings.exit_layers or ():
        loaded.anatomy.check_exit(exit_layer)
    if settings.draft_rows is not None:
        check_draft_rows(settings.draft_rows, loaded.anatomy.vocabulary)
    reached = settings.context + max(settings.draft_lengths) + 1
    if reached > loaded.anatomy.context:
        raise InputError(
            f"a context of {settings.context} tokens and drafts of {max(settings.draft_lengths)} exceed the "
            f"{loaded.anatomy.context} tokens that {loaded.name} reads.",
            "Time the steps at a shorter --context, or ask for shorter drafts.",
        )


def settle_threads(loaded: Loaded, prompt: Prompt, kept: Kept) -> int:
    """As many CPU threads as decode fastest, until this model is done: for a small model, fewer than the cores.

    Threads that were asked for (OMP_NUM_THREADS) are left alone.
    """
    most = torch.get_num_threads()
    if loaded.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or most == 1:
        return most

    def run() -> dict[str, Any]:
        from probekit.decoding.autoregressive import Autoregressive

        ids = encode(prompt, loaded.tokenizer).ids
        best: dict[int, float] = {}
        for _ in range(THREAD_TURNS):
            for threads in sorted({1, max(1, most // 2), most}):
                torch.set_num_threads(threads)
                [done] = Autoregressive(loaded).decode([ids], max_new_tokens=THREAD_TOKENS)
                seconds = (done.seconds["total"] - done.seconds["prefill"]) / max(1, done.emitted)
                best[threads] = min(seconds, best.get(threads, seconds))
        return {"threads": min(best, key=lambda threads: best[threads]), "seconds_per_token": best}

    threads = int(kept.once("threads", run)["threads"])
    torch.set_num_threads(threads)
    return threads


def learn_drafting(
    loaded: Loaded, prompts: Sequence[Prompt], settings: StudySettings, kept: Kept, heads_file: Path, progress: Progress
) -> Drafting:
    """Fit exit heads, and count the frequent tokens, on what the model writes after prompts that are not traced."""
    if not settings.learns:
        return Drafting()
    from probekit.lens.exit_heads import fit_heads, load_heads, pack_heads
    from probekit.tracing.self_generated import as_batches, self_generated_texts

    texts = kept.once(
        "own_text",
        lambda: {"texts": list(self_generated_texts(loaded, prompts, settings.max_new_tokens, progress=progress))},
    )["texts"]
    vocabulary = heads = None
    if settings.draft_rows is not None:
        vocabulary = DraftVocabulary.counted((tokens for _, tokens in texts), f"{len(texts)} texts of {loaded.name}")
    if settings.fit_heads:
        fitted = kept.file_once(
            "exit_heads", heads_file, lambda: pack_heads(fit_heads(loaded.anatomy, as_batches(texts)))
        )
        heads = load_heads(fitted, loaded.anatomy)
    return Drafting(heads, vocabulary)


def trace_prompts(
    models: Models, prompts: Sequence[Prompt], drafting: Drafting, settings: StudySettings, folder: Path,
    progress: Progress,
) -> Trace:  # fmt: skip
    """Continue every prompt and read every layer of every token, once."""
    from probekit.tracing.tracer import trace

    return trace(
        models.loaded, prompts, folder, max_new_tokens=settings.max_new_tokens, sampling=settings.sampling,
        batch_size=settings.batch_size, draft_model=models.drafter,
        draft_vocabulary=drafting.vocabulary, exit_heads=drafting.heads, chat=settings.chat, top_prompts=3,
        keep_residuals=KeptResiduals(None, rows="scored") if settings.probes else (), resume=True, progress=progress,
    )  # fmt: skip


def attribute_texts(loaded: Loaded, trace: Trace) -> pd.DataFrame:
    """Who wrote the logits of the model's tokens: a row a prompt, position and term.

    Of the texts whose top ten are kept. Empty for a model whose layers' parts are not known, or whose logits they do
    not add up to; then it says so.
    """
    from probekit.probing.attribution import attribute

    parts = [pd.DataFrame(columns=["prompt", "position", "term", "logit"])]
    try:
        for prompt in trace.prompts[: trace.manifest.settings.top_prompts]:
            shares = attribute(loaded, [*trace.prompt_ids(prompt).tolist(), *trace.outputs(prompt).tolist()][:-1])
            rows = shares.table()[["position", "term", "logit"]].assign(prompt=prompt)
            parts.append(rows.assign(logit=rows["logit"].astype("float32")))
    except (InputError, SelfCheckError) as error:
        warnings.warn(f"The report does not say who wrote the logits: {error.problem}", Remark, stacklevel=2)
    return pd.concat(parts[1:] or parts, ignore_index=True)


def even(trace: Trace) -> Trace:
    """The prompts that the choice is made on."""
    return trace.select([prompt for prompt in trace.prompts if prompt % 2 == 0])


def odd(trace: Trace) -> Trace:
    """The prompts that have no part in the choice."""
    return trace.select([prompt for prompt in trace.prompts if prompt % 2 == 1])


def predict_rounds(trace: Trace, settings: StudySettings) -> Prediction:
    """Every round of every (exit layer, draft length), from the even prompts."""
    return predict(
        even(trace), settings.exit_layers, settings.draft_lengths, draft_rows=settings.draft_rows,
        drafter=trace.manifest.drafter is not None,
    )  # fmt: skip


def time_the_trace(
    loaded: Loaded, prompts: Sequence[Prompt], drafting: Drafting, settings: StudySettings, kept: Kept,
    progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """What a prediction costs (agreement only, all exits and draft lengths) beside generating the text that it reads,
    one prompt at a time."""
    from probekit.tracing.tracer import trace

    def run() -> dict[str, float]:
        some = trace(
            loaded, prompts[:TIMED_PROMPTS], max_new_tokens=settings.max_new_tokens, batch_size=1,
            sampling=settings.sampling, statistics="agreement" if settings.sampling.greedy else "all",
            draft_vocabulary=drafting.vocabulary, exit_heads=drafting.heads,
            chat=settings.chat,
            progress=lambda phase, *counts, **figures: progress(f"time the trace: {phase}", *counts, **figures),
        )  # fmt: skip
        with elapsed() as predicting:
            predict(some, draft_lengths=settings.draft_lengths, draft_rows=settings.draft_rows)
        timings = some.manifest.measured.timings
        return {
            "prompts": len(some.prompts),
            "tokens": timings["tokens"],
            "generation_s": timings["generation_s"],
            "agreement_trace_s": timings["trace_s"] + predicting.seconds,
        }

    return kept.once("timings", run)


def calibrate_costs(
    models: Models, trace: Trace, drafting: Drafting, settings: StudySettings, kept: Kept, progress: Progress
) -> Costs:
    """Times of a draft step, a verification pass and an autoregressive step on this device."""
    rows = settings.draft_rows
    ids = None if rows is None else trace.draft_head_ids(rows).tolist()
    measured = kept.once(
        "costs",
        lambda: measure_costs(
            models.loaded, context=settings.context, drafter=models.drafter,
            draft_lengths=with_trees(trace, settings.draft_lengths, settings.context),
            draft_vocabulary=ids, exit_heads=drafting.heads, sampling=settings.sampling, progress=progress,
        ).to_json(),
    )  # fmt: skip
    return Costs.from_json(measured)


def rank_ways(trace: Trace, costs: Costs, settings: StudySettings) -> Ranking:
    """Every way of drafting on one scale, from the even prompts."""
    return rank(even(trace), costs, settings.exit_layers, settings.draft_lengths, draft_rows=settings.draft_rows)


def choose_pair(prediction: Prediction, costs: Costs, ways: Ranking) -> Choice:
    """The best pair on the even prompts, its interval, the runners-up, or neither; and the best of all ways."""
    return choose(prediction, costs, ways=ways)


def validate_choice(
    models: Models, trace: Trace, choice: Choice, settings: StudySettings, kept: Kept, progress: Progress
) -> Validated:
    """Run the decoder on the odd prompts: the chosen pair and its runners-up, and a spread over the table; the best of
    all ways of drafting, and a spread of them. Texts are kept one by one until it has them all."""
    texts = kept.folder / "texts"

    def run() -> dict[str, Any]:
        best = [(each.key, each.draft_length) for each in choice.ranking[:3] if each.key is not None]
        spread = spread_cells(settings.exit_layers or range(1, trace.depth), settings.draft_lengths, best)
        hold = partial(
            validate, models.loaded, odd(trace), costs=choice.costs, drafter=models.drafter,
            draft_rows=settings.draft_rows, keep=texts,
        )  # fmt: skip
        thorough = hold(best, progress=_called("validate the best", progress))
        found = [thorough]
        if spread:
            found.append(hold(spread, limit=SPREAD_PROMPTS, progress=_called("validate others", progress)))
        ways: list[dict[str, Any]] = []
        if choice.ways is not None and choice.text == "greedy":
            checked = validate_ways(
                models.loaded, odd(trace), [each.way for each in choice.ways.to_run() if each.way is not None],
                draft_model=models.drafter, limit=SPREAD_PROMPTS, costs=choice.costs, keep=texts,
                progress=_called("validate ways", progress),
            )  # fmt: skip
            ways = [each.to_json() for each in checked.ways]
        return {
            "ways": ways,
            "cells": [cell for each in found for cell in each.to_json()["cells"]],
            "rounds": [rounds for each in found for rounds in each.rounds_json()],
        }

    validated = Validated(**kept.once("validation", run))
    shutil.rmtree(texts, ignore_errors=True)
    return validated


def _called(phase: str, progress: Progress) -> Progress:
    """The same progress under a name of its own."""
    return lambda _, *counts, **figures: progress(phase, *counts, **figures)


def spread_cells(
    exit_layers: Sequence[int], draft_lengths: Sequence[int], taken: Sequence[tuple[DrafterKey, int]]
) -> list[tuple[int, int]]:
    """Cells at a quarter, a half and three quarters of the exits, with the shortest and the longest draft."""
    last = len(exit_layers) - 1
    exits = sorted({exit_layers[min(last, max(0, round((last + 2) * share) - 1))] for share in (0.25, 0.5, 0.75)})
    lengths = sorted({draft_lengths[0], draft_lengths[-1]})
    known = {(key.exit_layer, length) for key, length in taken if key.is_exit}
    return [(exit_layer, length) for exit_layer in exits for length in lengths if (exit_layer, length) not in known]


@contextmanager
def own_threads() -> Iterator[None]:
    """Torch's number of threads comes back as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Elapsed:
    seconds: float = 0.0


@contextmanager
def elapsed() -> Iterator[Elapsed]:
    elapsed, began = Elapsed(), time.perf_counter()
    try:
        yield elapsed
    finally:
        elapsed.seconds = time.perf_counter() - began
