"""What a study will do: settings and prompts, checked before any work, and the folder that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probekit.errors import InputError
from probekit.files import atomic_text
from probekit.foreign.json import read_object
from probekit.models.checkpoint import check_device, check_dtype
from probekit.models.reference import TALES, find_checkpoint
from probekit.settings import StudySettings
from probekit.tracing.prompts import Prompt, bundled_prompts_for, load_prompts

SCHEMA = "probekit/study/1"
LEARNED_ON = 4  # where drafting is learned, on every fourth prompt; heads are too good on what they were fitted on


@dataclass(frozen=True)
class StudyPlan:
    """A study after all checks that need no model.

    learned, traced: the prompts that drafting is learned on, which are then not traced, and the others.
    """

    settings: StudySettings
    folder: Path
    learned: tuple[Prompt, ...]
    traced: tuple[Prompt, ...]


def study_settings(
    models: Sequence[str] | None,
    *,
    prompts: str | Path | None,
    exit_layers: Iterable[int] | None,
    draft_lengths: Iterable[int],
    adapter: str | Path | None,
    **others: Any,
) -> StudySettings:
    """Settings from what callers give: the bundled models by default, paths as text, numbers in order, each once."""
    return StudySettings(
        models=tuple(models or TALES),
        prompts=str(prompts) if prompts else None,
        exit_layers=None if exit_layers is None else tuple(sorted(set(exit_layers))),
        draft_lengths=tuple(sorted(set(draft_lengths))),
        adapter=None if adapter is None else str(adapter),
        **others,
    )


def plan_study(settings: StudySettings, folder: str | Path) -> StudyPlan:
    """Check everything that can be checked without a model's weights. Raises InputError."""
    labels = [label_of(reference) for reference in settings.models]
    if len(set(labels)) < len(labels):
        raise InputError(f"two models of this study are both called {_repeated(labels)!r}.", "Study them apart.")
    for reference in filter(None, (*settings.models, settings.draft_model)):
        find_checkpoint(reference)
    if settings.device is not None:
        check_device(settings.device)
    if settings.dtype is not None:
        check_dtype(settings.dtype)
    prompts = load_prompts(settings.prompts, chat=settings.chat) if settings.prompts else bundled_prompts_for(labels[0])
    least = 3 if settings.learns else 2
    if len(prompts) < least:
        raise InputError(
            f"a study needs at least {least} prompts, and {settings.prompts} has {len(prompts)}.",
            "It chooses on the even-numbered ones and validates on the odd ones"
            + (", and learns drafting on every fourth." if settings.learns else "."),
        )
    learned = tuple(prompt for prompt in prompts if settings.learns and prompt.index % LEARNED_ON == 0)
    traced = tuple(prompt for prompt in prompts if prompt not in learned)
    return StudyPlan(settings, Path(folder), learned, traced)


def open_folder(plan: StudyPlan) -> None:
    """Make the folder, or resume it if it holds a study with the same settings."""
    marker = plan.folder / "study.json"
    now = {"schema": SCHEMA, **plan.settings.to_json()}
    if plan.folder.exists() and not plan.folder.is_dir():
        raise InputError(f"{plan.folder} is a file; expected a folder for the study.")
    if marker.exists():
        before = read_object(marker, "Name another folder.")
        differing = plan.settings.differences(before)
        if differing:
            raise InputError(
                f"{plan.folder} holds a study with other settings ({', '.join(differing)}).",
                "Name another folder, or repeat its settings to resume it.",
            )
    elif plan.folder.exists() and any(plan.folder.iterdir()):
        raise InputError(f"{plan.folder} exists and is not a study.", "Name an empty or a new folder.")
    plan.folder.mkdir(parents=True, exist_ok=True)
    atomic_text(marker, json.dumps(now, indent=2))


def label_of(reference: str) -> str:
    """A folder's name for a model: the last part of its reference, without a suffix that names a format."""
    name = Path(reference).name
    return name.removesuffix(".gguf") or "model"


def _repeated(labels: Sequence[str]) -> str:
    return next(label for label in labels if labels.count(label) > 1)
