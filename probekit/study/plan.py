"""What a study will do: settings and prompts, checked before any work, and the folder that keeps it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from probekit.errors import InputError, Remark
from probekit.files import (
    LOCK,
    UNFINISHED,
    atomic_text,
    check_folder_target,
    check_unlocked,
    clear_unfinished,
    entries,
    locked,
)
from probekit.foreign.json import read_object
from probekit.models.checkpoint import check_device, check_dtype
from probekit.models.reference import find_checkpoint
from probekit.models.shipped import TALES
from probekit.settings import StudySettings
from probekit.tracing.prompts import Prompt, bundled_prompts_for, load_prompts

SCHEMA = "probekit/study/1"
MARKER = "study.json"
# What a study writes into its folder; whatever else lies there is its owner's.
WRITTEN = ("study.json", "summary.json", "report.html", "README.md", "tables", "figures", "phases", "exit_heads",
           "traces")  # fmt: skip
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

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All of them, in their order."""
        return tuple(sorted((*self.learned, *self.traced), key=lambda prompt: prompt.index))


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


_WRITTEN = ("figures", "tables", "phases", "phases/*", "exit_heads")
"""Folders of a study in which a killed one may have left something; its runs are put in order when they go on."""


@contextmanager
def study_folder(plan: StudyPlan) -> Iterator[None]:
    """The study's folder, made or resumed, which this process alone writes to; `study.json` says whose it is.

    A study that ends before it has made anything leaves nothing: no settings that a corrected one would differ from.
    Raises InputError for a folder of something else, of a study with other settings, or that is written to.
    """
    marker = plan.folder / MARKER
    check_unlocked(plan.folder)
    check_study_folder(plan)
    with locked(plan.folder):
        check_study_folder(plan)
        for written in _WRITTEN:
            for place in plan.folder.glob(written):
                clear_unfinished(place)
        atomic_text(marker, json.dumps({"schema": SCHEMA, **plan.settings.to_json()}, indent=2))
        try:
            yield
        finally:
            if not _made(plan.folder):
                with suppress(OSError):
                    marker.unlink()


def check_study_folder(plan: StudyPlan) -> None:
    """Raise InputError where the folder holds something else, or what a study with other settings made."""
    folder = check_folder_target(plan.folder)
    if not folder.exists():
        return
    marker = folder / MARKER
    if not marker.is_file():
        if entries(folder):
            raise InputError(f"{folder} exists and is not a study.", "Name an empty or a new folder.")
        return
    if not _made(folder):
        return  # it failed, or was ended, before it had made anything
    try:
        before = read_object(marker)
    except InputError as error:
        # What was made is kept under the digest of its settings: other settings find none of it.
        warnings.warn(f"{error.problem.rstrip('.')}; it is written anew.", Remark, stacklevel=3)
        return
    if differing := plan.settings.differences(before):
        raise InputError(
            f"{folder} holds a study with other settings ({', '.join(differing)}).",
            f"Repeat its settings to resume it, delete {folder}, or name another folder.",
        )


def written_by_study(name: PurePosixPath) -> bool:
    """Whether the list of a study's checksums has a file: the parts of its runs stand in their own manifests."""
    return name.parts[0] in WRITTEN and (name.parts[0] != "traces" or name.name == "manifest.json")


def _made(folder: Path) -> bool:
    """Whether a study has made anything in its folder."""
    there = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return any(path.name not in (MARKER, LOCK) and not path.name.endswith(UNFINISHED) for path in there)


def label_of(reference: str) -> str:
    """A folder's name for a model: the last part of its reference, without a suffix that names a format."""
    name = Path(reference).name
    return name.removesuffix(".gguf") or "model"


def _repeated(labels: Sequence[str]) -> str:
    return next(label for label in labels if labels.count(label) > 1)
