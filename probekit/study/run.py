"""`run_study`: the main job. Each model goes through the phases; what they made becomes tables, figures and a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from probekit.checksums import SUMS, write_sums
from probekit.kept import Kept
from probekit.presentation.model_card import write_card
from probekit.presentation.report import write_report
from probekit.progress import STUDY, Progress, usual_progress
from probekit.settings import Sampling, digest
from probekit.study import phases
from probekit.study.phases import elapsed
from probekit.study.plan import StudyPlan, label_of, plan_study, study_folder, study_settings, written_by_study
from probekit.study.probes import probe_texts
from probekit.study.summary import ModelStudy, Study, draw_figures, write_summary, write_tables

Made = TypeVar("Made")


def run_study(
    models: Sequence[str] | None = None,
    folder: str | Path = "study",
    *,
    prompts: str | Path | None = None,
    max_new_tokens: int = 96,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] = range(1, 9),
    context: int = 128,
    batch_size: int | None = None,
    draft_model: str | None = None,
    draft_rows: int | None = None,
    fit_heads: bool = False,
    chat: bool = False,
    adapter: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    probes: bool = False,
    progress: Progress | None = None,
) -> Study:
    """Study each model: trace, predict, choose on the even prompts, validate on the odd ones, report.

    Parameters
    ----------
    models: references as `load` takes them; the bundled models by default.
    folder: receives `summary.json`, `report.html`, `traces/`, `tables/`, `figures/`. An existing study with the same
        settings is resumed; one with other settings is refused.
    prompts: a prompts file; a bundled set of 24 by default.
    sampling: how texts are chosen; greedy by default. For sampled text every count is an expectation.
    exit_layers: that may draft; all by default. context: tokens in the cache when a step is timed.
    batch_size: most prompts in a batch of the trace; by default from the memory at hand.
    draft_rows: exit layers draft with so many rows of the head only, those of the most frequent tokens.
    fit_heads: fit exit heads, and draft through them. They, and the frequent tokens, are learned from text that the
        model writes after every fourth prompt and its beginnings; these prompts then have no part in the rest.
    adapter: a folder that holds an adapter, where one model is studied.
    probes: also keep the residuals of every layer, and probe them: is a draft accepted, is the answer linearly there?
    progress: called as `progress(phase, done, total, **figures)`.

    Raises
    ------
    InputError: before any work, when the plan cannot be carried out.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import probekit
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> file = folder / "prompts.txt"
    >>> _ = file.write_text("Once upon a time\\nThe king\\nA dog and a cat\\n")
    >>> how = {"prompts": file, "max_new_tokens": 8, "exit_layers": [3], "draft_lengths": [2], "context": 16}
    >>> study = probekit.run_study(["tales-layerskip"], folder / "study", **how)
    >>> (folder / "study" / "report.html").is_file(), len(study.to_pandas())
    (True, 1)
    """
    started = time.perf_counter()
    settings = study_settings(
        models, prompts=prompts, max_new_tokens=max_new_tokens, draft_lengths=draft_lengths, draft_model=draft_model,
        draft_rows=draft_rows, fit_heads=fit_heads, chat=chat, device=device, dtype=dtype, sampling=sampling,
        context=context, exit_layers=exit_layers, batch_size=batch_size, adapter=adapter, probes=probes,
    )  # fmt: skip
    plan = plan_study(settings, folder)
    overall = Overall(len(settings.models), usual_progress(progress))
    with study_folder(plan):
        for reference in settings.models[1:]:  # what cannot be studied is found before hours of work on the first
            phases.load_model(settings, reference, plan.prompts, overall.progress)
        studies = [study_model(plan, reference, overall) for reference in settings.models]
        with elapsed() as writing:
            (plan.folder / SUMS).unlink(missing_ok=True)  # of an earlier end; it may be damaged
            write_tables(plan.folder, studies)
            draw_figures(plan.folder, studies)
        summary = write_summary(plan, studies, writing.seconds, time.perf_counter() - started)
        write_report(plan.folder)
        write_card(plan.folder, summary)
        write_sums(plan.folder, written_by_study)
    overall.end()
    return Study(plan.folder, summary, tuple(studies))


class Overall:
    """How far the whole study is: phases that are done, weighed by the share of the time that they usually take."""

    SHARES: Mapping[str, float] = {
        "load_model": 1, "settle_threads": 3, "learn_drafting": 1, "trace_prompts": 9, "attribute_texts": 1,
        "probe_texts": 1, "predict_rounds": 1, "time_the_trace": 3, "calibrate_costs": 8, "rank_ways": 3,
        "choose_pair": 1, "validate_choice": 100,
    }  # fmt: skip
    WRITING = 8.0  # of tables, figures and report, for each model

    def __init__(self, models: int, progress: Progress) -> None:
        self.progress = progress
        self._models, self._model, self._done = models, 0, 0.0
        self._total = models * (sum(self.SHARES.values()) + self.WRITING)

    def begin_model(self) -> None:
        self._model += 1

    def begin(self, phase: str) -> None:
        place = list(self.SHARES).index(phase) + 1
        what = f"model {self._model} of {self._models}, phase {place} of {len(self.SHARES)}"
        self.progress(STUDY, self._done, self._total, says=what)

    def done(self, phase: str) -> None:
        self._done += self.SHARES[phase]

    def end(self) -> None:
        self.progress(STUDY, self._total, self._total, says="report written")


def study_model(plan: StudyPlan, reference: str, overall: Overall) -> ModelStudy:
    """One model through all phases; each takes what earlier ones made. The model is freed at the end."""
    settings, folder, name = plan.settings, plan.folder, label_of(reference)
    seconds: dict[str, float] = {}

    def run(phase: Callable[..., Made], *artefacts: Any) -> Made:
        overall.begin(phase.__name__)
        with elapsed() as spent:
            made = phase(*artefacts)
        seconds[phase.__name__] = spent.seconds
        overall.done(phase.__name__)
        return made

    def say(phase: str, *counts: Any, **figures: Any) -> None:
        overall.progress(f"{name}: {phase}", *counts, **figures)

    overall.begin_model()

    with phases.own_threads():
        models = run(phases.load_model, settings, reference, plan.prompts, say)
        loaded = models.loaded
        kept = Kept(folder / "phases" / name, digest(settings.to_json(), loaded.weights_hash))
        run(phases.settle_threads, loaded, (*plan.learned, *plan.traced)[0], kept)
        heads_file = folder / "exit_heads" / f"{name}.safetensors"
        drafting = run(phases.learn_drafting, loaded, plan.learned, settings, kept, heads_file, say)
        trace = run(phases.trace_prompts, models, plan.traced, drafting, settings, folder / "traces" / name, say)
        attribution = run(phases.attribute_texts, loaded, trace)
        probes = run(probe_texts, loaded, trace, settings, kept, say)
        prediction = run(phases.predict_rounds, trace, settings)
        timings = run(phases.time_the_trace, loaded, plan.traced, drafting, settings, kept, say)
        costs = run(phases.calibrate_costs, models, trace, drafting, settings, kept, say)
        ways = run(phases.rank_ways, trace, costs, settings)
        choice = run(phases.choose_pair, prediction, costs, ways)
        validated = run(phases.validate_choice, models, trace, choice, settings, kept, say)
    return ModelStudy(
        name, reference, trace, prediction, costs, choice, validated, timings, seconds, attribution, probes
    )
