"""What a run was made with, and what it found out about itself: `manifest.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from probekit.errors import InputError
from probekit.traces.draft_vocabulary import DraftVocabulary
from probekit.traces.schema import LENSES

SCHEMA = "probekit/trace/1"


@dataclass(frozen=True)
class ModelRecord:
    """Which model it was: name, where it came from, and the shape that readers need. `depth` is L."""

    name: str
    reference: str
    revision: str | None
    weights_hash: str | None
    depth: int
    width: int
    vocabulary: int
    tied: bool
    parameters: int
    context: int
    eos_ids: tuple[int, ...]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModelRecord:
        return cls(**{**document, "eos_ids": tuple(document["eos_ids"])})


@dataclass(frozen=True)
class ExitHeadsRecord:
    """Which exit heads the final-norm lens was read through: where they came from, their name, the exits with one."""

    source: str
    fingerprint: str
    exits: tuple[int, ...]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ExitHeadsRecord:
        return cls(**{**document, "exits": tuple(document["exits"])})


@dataclass(frozen=True)
class Manifest:
    """Everything that a run was made with, and what it found out about itself.

    text: "greedy" and "sampled" text is the model's own; "given" text came with the prompts.
    decoding: {"temperature", "top_k", "top_p"}; temperature 0 is greedy.
    max_new_tokens: the budget M.
    draft_vocabulary: the order in which a draft head keeps rows, where the trace answers for such heads.
    exit_heads: put before the norm where a layer has one: the final-norm lens is then read through them. The heads
        themselves are in the run, too (`Trace.exit_heads`).
    batches: the plan: prompt indices, one list for each part.
    segment_rows: the most rows of one prompt that one forward pass reads; None: all of them.
    noise: largest difference, in logits, between a row computed alone and the same row among others, measured on
        the first batch and multiplied by a safety factor; `drafter_noise` is the drafter's. None before that batch.
    backoffs: where memory ran out: {"batch", "phase", "size", "limit"}; size and limit count prompts ("continue") or
        rows ("read").
    savings: of the agreement-only method: {"rows", "full", "candidates", "vocabulary", "witnessed_share",
        "products_avoided"}; see `probekit.lens.agreement.WorkSkipped`. None with all statistics.
    timings: {"generation_s", "trace_s", "tokens"}; seconds, and generated tokens.
    """

    model: ModelRecord
    prompts_hash: str
    prompts_source: str
    batches: tuple[tuple[int, ...], ...]
    drafter: ModelRecord | None = None
    draft_vocabulary: DraftVocabulary | None = None
    exit_heads: ExitHeadsRecord | None = None
    dtype: str = "float32"
    device: str = "cpu"
    text: str = "greedy"
    decoding: Mapping[str, float] = field(default_factory=lambda: {"temperature": 0.0, "top_k": 0, "top_p": 1.0})
    seed: int = 0
    max_new_tokens: int = 96
    statistics: str = "all"
    lenses: tuple[str, ...] = LENSES
    keep_residuals: tuple[int, ...] = ()
    top_prompts: int = 0
    backend: str = "hooks"
    segment_rows: int | None = None
    noise: float | None = None
    drafter_noise: float | None = None
    ignored_processors: tuple[str, ...] = ()
    backoffs: tuple[Mapping[str, Any], ...] = ()
    savings: Mapping[str, float] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=lambda: {"generation_s": 0.0, "trace_s": 0.0, "tokens": 0})
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        if self.text not in ("greedy", "sampled", "given"):
            raise InputError(f"a trace's text is 'greedy', 'sampled' or 'given', not {self.text!r}.")
        if self.statistics not in ("all", "agreement"):
            raise InputError(f"statistics are 'all' or 'agreement', not {self.statistics!r}.")
        planned = [prompt for batch in self.batches for prompt in batch]
        if not planned or len(set(planned)) != len(planned) or any(not batch for batch in self.batches):
            raise InputError("a batch plan names every prompt once, and has no empty batch.")

    @property
    def depth(self) -> int:
        return self.model.depth

    @property
    def heads_name(self) -> str | None:
        """The fingerprint of the exit heads, None without any: what names them in predictions and costs."""
        return None if self.exit_heads is None else self.exit_heads.fingerprint

    @property
    def prompt_count(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "prompt_count": self.prompt_count}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Manifest:
        known = {name.name for name in fields(cls)}
        values = {name: value for name, value in document.items() if name in known}
        drafter, order = values.get("drafter"), values.get("draft_vocabulary")
        values["model"] = ModelRecord.from_json(values["model"])
        values["drafter"] = None if drafter is None else ModelRecord.from_json(drafter)
        values["draft_vocabulary"] = None if order is None else DraftVocabulary.from_json(order)
        heads = values.get("exit_heads")
        values["exit_heads"] = None if heads is None else ExitHeadsRecord.from_json(heads)
        values["batches"] = tuple(tuple(batch) for batch in values["batches"])
        for name in ("lenses", "keep_residuals", "ignored_processors", "backoffs"):
            values[name] = tuple(values[name])
        return cls(**values)

    def differences(self, other: Manifest) -> list[str]:
        """Settings in which two runs differ, as "name: here, there"; empty when one may go on with the other.

        The batch plan, measured noise, back-offs, timings and library versions are not settings: a run that goes
        on keeps those of its folder.
        """
        pairs: list[tuple[str, Any, Any]] = [
            (name, getattr(self, name), getattr(other, name))
            for name in (
                "dtype", "device", "text", "decoding", "seed", "max_new_tokens", "statistics", "lenses",
                "keep_residuals", "top_prompts", "backend", "prompts_hash",
            )
        ]  # fmt: skip
        for name in ("draft_vocabulary", "exit_heads"):
            named = [one and one.fingerprint for one in (getattr(self, name), getattr(other, name))]
            pairs.append((name, *named))
        for role in ("model", "drafter"):
            mine, theirs = getattr(self, role), getattr(other, role)
            if mine is None or theirs is None:
                pairs.append((role, mine and mine.name, theirs and theirs.name))
            else:
                pairs.append((role, _identity(mine), _identity(theirs)))
        return [f"{name}: {here}, {there}" for name, here, there in pairs if here != there]


def _identity(model: ModelRecord) -> tuple[Any, ...]:
    return (model.name, model.weights_hash, model.depth, model.width, model.vocabulary)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a run folder. Raises InputError when there is none, or it is of another schema."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise InputError(
            f"there is no run folder {folder}.", "Make one with `probekit trace MODEL --prompts FILE -o RUN`."
        )
    if not path.is_file():
        raise InputError(
            f"{folder} is not a run folder: it has no manifest.json.", "Name the -o of a `probekit trace`."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}; this probekit reads {SCHEMA!r}.", "Trace again.")
    try:
        return Manifest.from_json(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a whole manifest: {error}.", "Trace again.") from None
