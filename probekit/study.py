"""The main job: from which layer should each model draft, how many tokens, and what will it gain?

A study is a plan, checked before any work, and a list of named phases that every model goes through. What a phase
made stays on disk, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

import probekit
from probekit.errors import InputError
from probekit.prediction.acceptance import Prediction, predict
from probekit.prediction.choice import Choice, choose
from probekit.prediction.costs import Costs, measure_costs
from probekit.prediction.validation import validate
from probekit.presentation import tables
from probekit.presentation.previews import draw_previews
from probekit.presentation.report import write_report
from probekit.tracing.draft_vocabulary import DraftVocabulary, check_draft_rows
from probekit.tracing.prompts import Prompt, bundled_prompts_for, encode, load_prompts
from probekit.tracing.traces import Trace, atomic_text

if TYPE_CHECKING:
    from probekit.lens.heads import ExitHead
    from probekit.models.loading import Loaded

SCHEMA = "probekit/study/1"
TIMED_PROMPTS = 6  # prompts on which a trace is timed against generation
SPREAD_PROMPTS = 4  # prompts on which the cells that were not chosen are run
CONTEXT = 128  # tokens in the cache when a step is timed
THREAD_TOKENS, THREAD_TURNS = 16, 3  # decoded to find how many threads are fastest
LEARNED_ON = 4  # where drafting is learned, on every fourth prompt; heads are too good on what they were fitted on
MISSED = 0.15  # a prediction that is further off than this share is remarked on

Progress = Callable[..., None]


@dataclass(frozen=True)
class StudyPlan:
    """What a study will do; two studies with equal settings are the same study."""

    models: tuple[str, ...]
    folder: Path
    prompts: str | None
    max_new_tokens: int
    draft_lengths: tuple[int, ...]
    draft_model: str | None
    chat: bool
    device: str | None
    dtype: str | None
    draft_rows: int | None = None
    fit_heads: bool = False

    @property
    def learns(self) -> bool:
        """Whether drafting is learned from text."""
        return self.fit_heads or self.draft_rows is not None

    def learns_on(self, prompt: Prompt) -> bool:
        """Drafting is learned on prompts 0, 4, 8, .., which are then not traced."""
        return self.learns and prompt.index % LEARNED_ON == 0

    def settings(self) -> dict[str, Any]:
        kept = asdict(self)
        del kept["folder"]
        return {"schema": SCHEMA, **kept, "models": list(self.models), "draft_lengths": list(self.draft_lengths)}


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


@dataclass(frozen=True)
class Study:
    """A finished study: its folder and its summary (the contents of `summary.json`)."""

    folder: Path
    summary: dict[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """A row a model: the choice, its predicted speedup with its interval, and what was measured of it."""
        rows = []
        for model in self.summary["models"]:
            choice, measured = model["choice"], model["chosen_validation"] or {}
            low, high = choice["interval"] or (np.nan, np.nan)
            row = {name: choice[name] for name in ("speculate", "drafter", "exit_layer", "draft_length", "speedup")}
            rows.append(
                {"model": model["name"], **row, "speedup_low": low, "speedup_high": high,
                 "speedup_measured": measured.get("speedup_measured", np.nan)}
            )  # fmt: skip
        return pd.DataFrame(rows).astype({"exit_layer": "Int64", "draft_length": "Int64"})

    def _repr_html_(self) -> str:
        """The recommendations, the table, and the agreement of each layer as the study drew it."""
        sentences = "".join(f"<li>{escape(model['sentence'])}</li>" for model in self.summary["models"])
        table = self.to_pandas().to_html(index=False, float_format="{:.2f}".format, na_rep="-")
        picture = self.folder / "figures" / "agreement.png"
        image = ""
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode("ascii")
            image = f'<img alt="agreement by layer" style="max-width:100%" src="data:image/png;base64,{data}">'
        where = escape(str(self.folder / "report.html"))
        return f"<ul>{sentences}</ul>{table}{image}<p>The whole report: <code>{where}</code></p>"


def run_study(
    models: Sequence[str] | None = None,
    folder: str | Path = "study",
    *,
    prompts: str | Path | None = None,
    max_new_tokens: int = 96,
    draft_lengths: Iterable[int] = range(1, 9),
    draft_model: str | None = None,
    draft_rows: int | None = None,
    fit_heads: bool = False,
    chat: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Study:
    """Study each model: trace, predict, choose on the even prompts, validate on the odd ones, report.

    Parameters
    ----------
    models: references as `load` takes them; the bundled models by default.
    folder: receives `summary.json`, `report.html`, `traces/`, `tables/`, `figures/`. An existing study with the same
        settings is resumed; one with other settings is refused.
    prompts: a prompts file; a bundled set of 24 by default.
    draft_rows: exit layers draft with so many rows of the head only, those of the most frequent tokens.
    fit_heads: fit exit heads, and draft through them. They, and the frequent tokens, are learned from text that the
        model writes after every fourth prompt and its beginnings; these prompts then have no part in the rest.
    progress: called as `progress(phase, done, total, **figures)`.

    Raises
    ------
    InputError: before any work, when the plan cannot be carried out.
    """
    started = time.perf_counter()
    plan, prompt_set = plan_study(
        models, folder, prompts, max_new_tokens, draft_lengths, draft_model, draft_rows, fit_heads, chat, device, dtype
    )
    open_folder(plan)
    studies = []
    for reference in plan.models:
        study = ModelStudy(plan, reference, _label(reference), prompt_set, progress or _silent)
        with _own_threads():
            for phase in PHASES:
                with _elapsed() as spent:
                    phase(study)
                study.seconds[phase.__name__] = spent.seconds
        study.loaded = study.drafter = None  # one model in memory at a time
        studies.append(study)
    with _elapsed() as writing:
        write_tables(plan.folder, studies)
        draw_figures(plan.folder, studies)
    summary = write_summary(plan, studies, writing.seconds, time.perf_counter() - started)
    write_report(plan.folder)
    return Study(plan.folder, summary)


def plan_study(
    models: Sequence[str] | None,
    folder: str | Path,
    prompts: str | Path | None,
    max_new_tokens: int,
    draft_lengths: Iterable[int],
    draft_model: str | None,
    draft_rows: int | None,
    fit_heads: bool,
    chat: bool,
    device: str | None,
    dtype: str | None,
) -> tuple[StudyPlan, list[Prompt]]:
    """Check everything that can be checked without a model."""
    from probekit.models.loading import TALES

    lengths = tuple(sorted(set(draft_lengths)))
    if not lengths or lengths[0] < 1:
        raise InputError(f"draft lengths are {list(lengths)}; expected one or more, each 1 or more.")
    if max_new_tokens < 1:
        raise InputError(f"the budget is {max_new_tokens} new tokens; expected 1 or more.")
    if draft_rows is not None and draft_rows < 1:
        raise InputError(f"a draft head of {draft_rows} rows is out of range: expected 1 or more.")
    references = tuple(models or TALES)
    labels = [_label(reference) for reference in references]
    if len(set(labels)) < len(labels):
        raise InputError(f"two models of this study are both called {_repeated(labels)!r}.", "Study them apart.")
    plan = StudyPlan(
        models=references, folder=Path(folder), prompts=str(prompts) if prompts else None,
        max_new_tokens=max_new_tokens, draft_lengths=lengths, draft_model=draft_model, draft_rows=draft_rows,
        fit_heads=fit_heads, chat=chat, device=device, dtype=dtype,
    )  # fmt: skip
    chosen = load_prompts(prompts, chat=chat) if prompts else bundled_prompts_for(labels[0])
    least = 3 if plan.learns else 2
    if len(chosen) < least:
        raise InputError(
            f"a study needs at least {least} prompts, and {plan.prompts} has {len(chosen)}.",
            "It chooses on the even-numbered ones and validates on the odd ones"
            + (", and learns drafting on every fourth." if plan.learns else "."),
        )
    return plan, chosen


def open_folder(plan: StudyPlan) -> None:
    """Make the folder, or resume it if it holds a study with the same settings."""
    marker = plan.folder / "study.json"
    if plan.folder.exists() and not plan.folder.is_dir():
        raise InputError(f"{plan.folder} is a file; expected a folder for the study.")
    if marker.exists():
        before = json.loads(marker.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(plan.settings()))
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differing:
            raise InputError(
                f"{plan.folder} holds a study with other settings ({', '.join(differing)}).",
                "Name another folder, or repeat its settings to resume it.",
            )
    elif plan.folder.exists() and any(plan.folder.iterdir()):
        raise InputError(f"{plan.folder} exists and is not a study.", "Name an empty or a new folder.")
    plan.folder.mkdir(parents=True, exist_ok=True)
    atomic_text(marker, json.dumps(plan.settings(), indent=2))


# The phases. ---------------------------------------------------------------------------------------------------------


def load_model(study: ModelStudy) -> None:
    """Load the model, and the drafter where one is asked for."""
    from probekit.models.loading import load

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
    from probekit.lens.heads import fit_heads, load_heads, save_heads
    from probekit.tracing.own_text import own_texts

    def run() -> dict[str, Any]:
        texts = own_texts(study.model, study.learned_prompts, study.plan.max_new_tokens, progress=_named(study))
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
        with _elapsed() as predicting:
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


# What a study leaves behind. -----------------------------------------------------------------------------------------


def write_tables(folder: Path, studies: Sequence[ModelStudy]) -> None:
    """One CSV file a table, the models below one another."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for study in studies:
        assert study.trace is not None and study.prediction is not None and study.costs is not None
        rounds = pd.DataFrame([{"model": study.name, **row} for row in study.validation["rounds"]])
        for name, table in (
            ("layers", tables.layers_table(study.trace, study.name)),
            ("cells", tables.cells_table(study.prediction, study.choice, study.name)),
            ("validation", tables.validation_table(study.validation, study.name, rounds)),
            ("rounds", rounds),
            ("run_lengths", tables.run_lengths_table(study.trace, model=study.name)),
            ("costs", tables.costs_table(study.costs, study.name)),
        ):
            parts.setdefault(name, []).append(table)
    (folder / "tables").mkdir(exist_ok=True)
    for name, each in parts.items():
        atomic_text(folder / "tables" / f"{name}.csv", pd.concat(each, ignore_index=True).to_csv(index=False))


def draw_figures(folder: Path, studies: Sequence[ModelStudy]) -> None:
    """Previews; `python -m figures --study DIR` draws a paper's."""
    read = {name: pd.read_csv(folder / "tables" / f"{name}.csv") for name in ("layers", "cells", "validation")}
    traces = {study.name: study.trace for study in studies if study.trace is not None}
    chosen = {study.name: study.pair for study in studies}
    draw_previews(folder / "figures", read, traces, chosen)


def write_summary(plan: StudyPlan, studies: Sequence[ModelStudy], writing_s: float, total_s: float) -> dict[str, Any]:
    """`summary.json`: what was asked, what came out, and what it took."""
    summary = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"probekit": probekit.__version__}
        | {name: version(name) for name in ("torch", "transformers", "numpy", "nnsight")},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads()},
        "settings": plan.settings(),
        "seconds": {"tables_and_figures": writing_s, "total": total_s},
        "models": [_summary_of(study) for study in studies],
    }  # fmt: skip
    atomic_text(plan.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    return summary


def _summary_of(study: ModelStudy) -> dict[str, Any]:
    trace, choice = study.trace, study.choice
    assert trace is not None and choice is not None
    model = trace.manifest.model
    document = choice.to_json()
    best = choice.ranking[0]
    cells = [{key: value for key, value in cell.items() if key != "rounds"} for cell in study.validation["cells"]]
    chosen = next(
        (cell for cell in cells if (cell["exit_layer"], cell["draft_length"]) == best.cell and document["speculate"]),
        None,
    )
    agreement = np.mean(np.concatenate([trace.agreement(prompt) for prompt in trace.prompts], axis=1), axis=1)
    return {
        "name": study.name,
        "label": study.name,
        "reference": study.reference,
        "trace": f"traces/{study.name}",
        "anatomy": {"layers": model.depth, "width": model.width, "vocabulary": model.vocabulary, "tied": model.tied,
                    "parameters": model.parameters},
        "threads": int(trace.manifest.versions["threads"]),
        "sentence": recommendation(choice, chosen),
        "choice": document,
        "chosen_validation": chosen,
        "validation": {"schema": "probekit/validate/1", "cells": cells},
        "agreement": agreement.tolist(),
        "looped": float(np.average(trace.texts["looped"], weights=trace.texts["new_tokens"])),
        "timings": study.timings,
        "seconds": study.seconds,
    }  # fmt: skip


def recommendation(choice: Choice, chosen: dict[str, Any] | None) -> str:
    """The choice in a sentence or two, with what the decoder then did on prompts that had no part in it.

    chosen: the validation of the chosen pair, as in `validate --json`; None where nothing was chosen.
    """
    measured = None if chosen is None else chosen["speedup_measured"]
    if measured is None:
        return choice.sentence()
    said = f"{choice.sentence()} Measured on the other prompts: {measured:.2f}x."
    if measured <= 1:
        return said + " That is no gain: do not speculate here, or study again while the machine does nothing else."
    foreseen = chosen["speedup_predicted"] if chosen else None
    if foreseen is not None and abs(foreseen / measured - 1) > MISSED:
        said += (
            f" Predicted for those prompts: {foreseen:.2f}x; a miss of over {MISSED:.0%} mostly means that something "
            "else ran while steps were timed."
        )
    return said


# Small help. ---------------------------------------------------------------------------------------------------------


def _label(reference: str) -> str:
    """A folder's name for a model: the last part of its reference, without a suffix that names a format."""
    name = Path(reference).name
    return name.removesuffix(".gguf") or "model"


def _repeated(labels: Sequence[str]) -> str:
    return next(label for label in labels if labels.count(label) > 1)


def _silent(*_: Any, **__: Any) -> None:
    return None


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


@contextmanager
def _own_threads() -> Iterator[None]:
    """Torch's number of threads comes back as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Elapsed:
    seconds: float = 0.0


@contextmanager
def _elapsed() -> Iterator[_Elapsed]:
    elapsed, began = _Elapsed(), time.perf_counter()
    try:
        yield elapsed
    finally:
        elapsed.seconds = time.perf_counter() - began
