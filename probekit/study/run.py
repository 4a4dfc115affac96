"""`run_study`: the main job."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from probekit.presentation.report import write_report
from probekit.study.phases import PHASES, ModelStudy, Progress, elapsed
from probekit.study.plan import label_of, open_folder, plan_study
from probekit.study.summary import Study, draw_figures, write_summary, write_tables


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
        study = ModelStudy(plan, reference, label_of(reference), prompt_set, progress or _silent)
        with _own_threads():
            for phase in PHASES:
                with elapsed() as spent:
                    phase(study)
                study.seconds[phase.__name__] = spent.seconds
        study.loaded = study.drafter = None  # one model in memory at a time
        studies.append(study)
    with elapsed() as writing:
        write_tables(plan.folder, studies)
        draw_figures(plan.folder, studies)
    summary = write_summary(plan, studies, writing.seconds, time.perf_counter() - started)
    write_report(plan.folder)
    return Study(plan.folder, summary)


def _silent(*_: Any, **__: Any) -> None:
    return None


@contextmanager
def _own_threads() -> Iterator[None]:
    """Torch's number of threads comes back as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
