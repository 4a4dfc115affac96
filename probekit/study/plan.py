"""What a study will do: settings, checked before any work, and the folder that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from probekit.errors import InputError
from probekit.traces.storage import atomic_text
from probekit.tracing.prompts import Prompt, bundled_prompts_for, load_prompts

SCHEMA = "probekit/study/1"
LEARNED_ON = 4  # where drafting is learned, on every fourth prompt; heads are too good on what they were fitted on


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
    from probekit.models.reference import TALES

    lengths = tuple(sorted(set(draft_lengths)))
    if not lengths or lengths[0] < 1:
        raise InputError(f"draft lengths are {list(lengths)}; expected one or more, each 1 or more.")
    if max_new_tokens < 1:
        raise InputError(f"the budget is {max_new_tokens} new tokens; expected 1 or more.")
    if draft_rows is not None and draft_rows < 1:
        raise InputError(f"a draft head of {draft_rows} rows is out of range: expected 1 or more.")
    references = tuple(models or TALES)
    labels = [label_of(reference) for reference in references]
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


def label_of(reference: str) -> str:
    """A folder's name for a model: the last part of its reference, without a suffix that names a format."""
    name = Path(reference).name
    return name.removesuffix(".gguf") or "model"


def _repeated(labels: Sequence[str]) -> str:
    return next(label for label in labels if labels.count(label) > 1)
