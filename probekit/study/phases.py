"""The phases of a study, in their order: from the loaded model to the validated choice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probekit.choice.choose import Choice, choose
from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.prediction.predict import predict
from probekit.prediction.table import Prediction
from probekit.study.plan import StudyPlan
from probekit.traces.draft_vocabulary import DraftVocabulary, check_draft_rows
from probekit.traces.storage import atomic_text
from probekit.traces.trace import Trace
from probekit.tracing.prompts import Prompt, encode
from probekit.validation.run import validate

if TYPE_CHECKING:
    from probekit.lens.exit_heads import ExitHead
    from probekit.models.loaded import Loaded

TIMED_PROMPTS = 6  # prompts on which a trace is timed against generation
SPREAD_PROMPTS = 4  # prompts on which the cells that were not chosen are run
CONTEXT = 128  # tokens in the cache when a step is timed
THREAD_TOKENS, THREAD_TURNS = 16, 3  # decoded to find how many threads are fastest
Progress = Callable[..., None]


@dataclass
class ModelStudy:
    """One model on its way through the phases; each phase fills in its own fields."""

    plan: StudyPlan
    reference: str
    name: str
    prompts: list[Prompt]
    progress: Progress
    loaded: Loaded | None = None
    drafter: Loaded | None = None
    heads: dict[int, ExitHead] | None = None
    vocabulary: DraftVocabulary | None = None
    trace: Trace | None = None
    prediction: Prediction | None = None
    costs: Costs | None = None
    choice: Choice | None = None
    validation: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def learned_prompts(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts if self.plan.learns_on(prompt)]

    @property
    def traced_prompts(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts if not self.plan.learns_on(prompt)]

    def kept(self, phase: str) -> Path:
        return self.plan.folder / "phases" / self.name / f"{phase}.json"

    @property
    def model(self) -> Loaded:
        assert self.loaded is not None
        return self.loaded

    @property
    def pair(self) -> tuple[int | None, int] | None:
        """The chosen (exit layer, draft length), the exit layer None for a draft model; None: do not speculate."""
        choice = self.choice
        return choice.best.cell if choice is not None and choice.speculate else None

    @property
    def draft_ids(self) -> list[int] | None:
        """Tokens that exit layers draft among; None: all."""
        rows = self.plan.draft_rows
        return None if rows is None or self.trace is None else self.trace.draft_head_ids(rows).tolist()

    @property
    def even(self) -> Trace:
        assert self.trace is not None
        return self.trace.select([prompt for prompt in self.trace.prompts if prompt % 2 == 0])

    @property
    def odd(self) -> Trace:
        assert self.trace is not None
        return self.trace.select([prompt for prompt in self.trace.prompts if prompt % 2 == 1])


def load_model(study: ModelStudy) -> None:
    """Load the model, and the drafter where one is asked for."""
    from probekit.models.loaded import load

    study.progress(f"{study.name}: load", 0, 1)
    study.loaded = load(study.reference, device=study.plan.device, dtype=study.plan.dtype)
    if study.plan.draft_rows is not None:
        check_draft_rows(study.plan.draft_rows, study.loaded.anatomy.vocabulary)
    if study.plan.draft_model:
        study.drafter = load(study.plan.draft_model, device=study.plan.device, dtype=study.plan.dtype)
    study.progress(f"{study.name}: load", 1, 1)


def settle_threads(study: ModelStudy) -> None:
    """As many CPU threads as decode fastest, until this model is done: for a small model, fewer than the cores.

    Threads that were asked for (OMP_NUM_THREADS) are left alone.
    """
    most = torch.get_num_threads()
    if study.model.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or most == 1:
        return

    def run() -> dict[str, Any]:
        from probekit.decoding.autoregressive import Autoregressive

        ids = encode(study.prompts[0], study.model.tokenizer).ids
        best: dict[int, float] = {}
        for _ in range(THREAD_TURNS):
            for threads in sorted({1, max(1, most // 2), most}):
                torch.set_num_threads(threads)
                [done] = Autoregressive(study.model).decode([ids], max_new_tokens=THREAD_TOKENS)
                seconds = (done.seconds["total"] - done.seconds["prefill"]) / max(1, done.emitted)
                best[threads] = min(seconds, best.get(threads, seconds))
        return {"threads": min(best, key=lambda threads: best[threads]), "seconds_per_token": best}

    torch.set_num_threads(_once(study.kept("threads"), run)["threads"])


def learn_drafting(study: ModelStudy) -> None:
    """Fit exit heads, and count the frequent tokens, on what the model writes after prompts that are not traced."""
    if not study.plan.learns:
        return
    from probekit.lens.exit_heads import fit_heads, load_heads, save_heads
    from probekit.tracing.self_generated import self_generated_texts

    def run() -> dict[str, Any]:
        texts = self_generated_texts(
            study.model, study.learned_prompts, study.plan.max_new_tokens, progress=_named(study)
        )
        return {"texts": list(texts)}

    texts = _once(study.kept("own_text"), run)["texts"]
    if study.plan.draft_rows is not None:
        source = f"{len(texts)} texts of {study.name}"
        study.vocabulary = DraftVocabulary.counted((tokens for _, tokens in texts), source)
    if study.plan.fit_heads:
        path = study.plan.folder / "exit_heads" / f"{study.name}.safetensors"
        if not path.exists():
            heads = fit_heads(study.model.anatomy, (torch.tensor([prompt + tokens]) for prompt, tokens in texts))
            path.parent.mkdir(exist_ok=True)
            save_heads(path, heads)
        study.heads = load_heads(path, study.model.anatomy)


def trace_prompts(study: ModelStudy) -> None:
    """Continue every prompt and read every layer of every token, once."""
    from probekit.tracing.tracer import trace

    folder = study.plan.folder / "traces" / study.name
    study.trace = trace(
        study.model, study.traced_prompts, folder, max_new_tokens=study.plan.max_new_tokens, draft_model=study.drafter,
        draft_vocabulary=study.vocabulary, exit_heads=study.heads, chat=study.plan.chat, top_prompts=3, resume=True,
        progress=_named(study),
    )  # fmt: skip


def predict_rounds(study: ModelStudy) -> None:
    """Every round of every (exit layer, draft length), from the even prompts."""
    study.prediction = predict(study.even, draft_lengths=study.plan.draft_lengths, draft_rows=study.plan.draft_rows)


def time_the_trace(study: ModelStudy) -> None:
    """What a prediction costs (agreement only, all exits and draft lengths) beside generating the text that it reads,
    one prompt at a time."""
    from probekit.tracing.tracer import trace

    def run() -> dict[str, float]:
        some = trace(
            study.model, study.traced_prompts[:TIMED_PROMPTS], max_new_tokens=study.plan.max_new_tokens, batch_size=1,
            statistics="agreement", draft_vocabulary=study.vocabulary, exit_heads=study.heads, chat=study.plan.chat,
            progress=_named(study, "time the trace: "),
        )  # fmt: skip
        with elapsed() as predicting:
            predict(some, draft_lengths=study.plan.draft_lengths, draft_rows=study.plan.draft_rows)
        timings = some.manifest.timings
        return {
            "prompts": len(some.prompts),
            "tokens": timings["tokens"],
            "generation_s": timings["generation_s"],
            "agreement_trace_s": timings["trace_s"] + predicting.seconds,
        }

    study.timings = _once(study.kept("timings"), run)


def calibrate_costs(study: ModelStudy) -> None:
    """Times of a draft step, a verification pass and an autoregressive step on this device."""
    kept = _once(
        study.kept("costs"),
        lambda: measure_costs(
            study.model, context=CONTEXT, draft_lengths=study.plan.draft_lengths, drafter=study.drafter,
            draft_vocabulary=study.draft_ids, exit_heads=study.heads, progress=_named(study),
        ).to_json(),
    )  # fmt: skip
    study.costs = Costs.from_json(kept)


def choose_pair(study: ModelStudy) -> None:
    """The best pair on the even prompts, its interval, the runners-up, or neither."""
    assert study.prediction is not None and study.costs is not None
    study.choice = choose(study.prediction, study.costs)


def validate_choice(study: ModelStudy) -> None:
    """Run the decoder on the odd prompts: the chosen pair and its runners-up, and a spread over the table."""
    loaded, choice = study.model, study.choice
    assert choice is not None

    def run() -> dict[str, Any]:
        best = [candidate.cell for candidate in choice.ranking[:3]]
        spread = spread_cells(loaded.depth, study.plan.draft_lengths, set(best))
        hold = partial(
            validate, loaded, study.odd, costs=study.costs, drafter=study.drafter, draft_rows=study.plan.draft_rows,
            progress=_named(study),
        )  # fmt: skip
        thorough, wide = hold(best), hold(spread, limit=SPREAD_PROMPTS)
        return {
            "cells": [*thorough.to_json()["cells"], *wide.to_json()["cells"]],
            "rounds": [*thorough.rounds_json(), *wide.rounds_json()],
        }

    study.validation = _once(study.kept("validation"), run)


PHASES: tuple[Callable[[ModelStudy], None], ...] = (
    load_model,
    settle_threads,
    learn_drafting,
    trace_prompts,
    predict_rounds,
    time_the_trace,
    calibrate_costs,
    choose_pair,
    validate_choice,
)


def spread_cells(
    depth: int, draft_lengths: Sequence[int], taken: set[tuple[int | None, int]]
) -> list[tuple[int | None, int]]:
    """Cells at a quarter, a half and three quarters of the depth, with the shortest and the longest draft."""
    exits = sorted({min(depth - 1, max(1, round(depth * share))) for share in (0.25, 0.5, 0.75)})
    lengths = sorted({draft_lengths[0], draft_lengths[-1]})
    return [(exit_layer, length) for exit_layer in exits for length in lengths if (exit_layer, length) not in taken]


def _named(study: ModelStudy, prefix: str = "") -> Progress:
    """The study's progress, with the model's name before each phase."""
    return lambda phase, *counts, **figures: study.progress(f"{study.name}: {prefix}{phase}", *counts, **figures)


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a phase made: read from `path` if it was made before, else made and kept there."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_text(path, json.dumps(made))
    return json.loads(path.read_text(encoding="utf-8"))


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
