"""`manifest.json`: what a run was asked for, what it read, how it is cut into batches, and what it measured.

The file is flat; in Python its fields stand in four parts. Nothing here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from probekit.errors import InputError
from probekit.foreign.json import read_json
from probekit.html_tables import facts_html
from probekit.lens.noise import Noise
from probekit.lens.work_skipped import WorkSkipped
from probekit.traces.draft_vocabulary import DraftVocabulary
from probekit.traces.ledger import LedgerEntry, ledger_entries
from probekit.traces.schema import LENSES

SCHEMA = "probekit/trace/1"
IN_MEMORY = ("memory:", "synthetic:")  # how the references of models begin that were made or wrapped in Python

Count = Annotated[int, Field(ge=0, le=2**53)]
Least1 = Annotated[int, Field(ge=1, le=2**53)]
Layers = Annotated[int, Field(ge=1, le=10_000)]  # as a configuration may have
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class AdapterRecord:
    """Which adapter was in a model: its folder, peft's name of its kind, and its hash."""

    reference: str
    kind: str
    weights_hash: str


@dataclass(frozen=True)
class ModelRecord:
    """Which model it was: name, where it came from, and the shape that readers need. `depth` is L.

    key_value_width: numbers of one key (or value) of one token in one layer; None where an earlier version traced.
    layer_bytes, head_bytes: of one layer's weights on average, and of the head's, where they are stored otherwise than
    in the run's dtype (quantised, or with an adapter); else None. adapter: what was put into the model, if anything.
    embeddings: as `Anatomy.embeddings` has it; None in runs that did not note it.
    """

    name: str
    reference: str
    revision: str | None
    weights_hash: str | None
    depth: Layers
    width: Least1
    vocabulary: Least1
    tied: bool
    parameters: Count
    context: Count
    eos_ids: tuple[Count, ...]
    key_value_width: Count | None = None
    layer_bytes: Count | None = None
    head_bytes: Count | None = None
    adapter: AdapterRecord | None = None
    embeddings: str | None = None

    @property
    def in_memory(self) -> bool:
        """Whether it was a model in memory, which no reference finds again."""
        return self.reference.startswith(IN_MEMORY)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What two records of one model share."""
        return self.name, self.weights_hash, self.depth, self.width, self.vocabulary


@dataclass(frozen=True)
class ExitHeadsRecord:
    """Which exit heads the final-norm lens was read through: where they came from, their name, the exits with one."""

    source: str
    fingerprint: str
    exits: tuple[Least1, ...]


@dataclass(frozen=True)
class RunSettings:
    """What was asked for: runs that differ in one of these are different runs.

    text: "greedy" and "sampled" text is the model's own; "given" text came with the prompts.
    decoding: {"temperature", "top_k", "top_p"}; temperature 0 is greedy. max_new_tokens: the budget M.
    keep_residuals: sites whose residuals are kept; residual_dtype, residual_rows, residual_share: as in
        `probekit.settings.KeptResiduals`. top_prompts: how many prompts have a table of their top tokens.
    draft_vocabulary: the order in which a draft head keeps rows, where the trace answers for such heads.
    batch_invariant: whether texts were written, and read, so that no row depends on how many are computed with it.
    exit_heads: put before the norm where a layer has one: the final-norm lens is then read through them. The heads
        themselves are in the run, too (`Trace.exit_heads`).
    """

    dtype: str = "float32"
    device: str = "cpu"
    text: Literal["greedy", "sampled", "given"] = "greedy"
    decoding: Mapping[str, int | float] = field(default_factory=lambda: {"temperature": 0.0, "top_k": 0, "top_p": 1.0})
    seed: int = 0
    max_new_tokens: Least1 = 96
    statistics: Literal["all", "agreement"] = "all"
    lenses: tuple[Literal["final-norm", "raw"], ...] = LENSES  # type: ignore[assignment]
    keep_residuals: tuple[Count, ...] = ()
    residual_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    residual_rows: Literal["all", "scored"] = "all"
    residual_share: Share = 1.0
    top_prompts: Count = 0
    backend: str = "hooks"
    draft_vocabulary: DraftVocabulary | None = None
    exit_heads: ExitHeadsRecord | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.text not in ("greedy", "sampled", "given"):
            raise InputError(f"a trace's text is 'greedy', 'sampled' or 'given', not {self.text!r}.")
        if self.statistics not in ("all", "agreement"):
            raise InputError(f"statistics are 'all' or 'agreement', not {self.statistics!r}.")


@dataclass(frozen=True)
class Provenance:
    """What was read, and with what.

    prompts_hash: of the prompts; prompts_source: where they came from. ignored_processors: settings of the
    checkpoint's generation_config that change logits and are not applied. remarks: what a reader of the run should know
    of the prompts, a line each. versions: of libraries, and the threads.
    """

    model: ModelRecord
    prompts_hash: str
    prompts_source: str
    drafter: ModelRecord | None = None
    ignored_processors: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchPlan:
    """How the prompts are cut into parts, which a resumed run obeys.

    batches: prompt indices, one list for each part. segment_rows: the most rows of one prompt that one forward pass
    reads; None: all of them.
    """

    batches: tuple[tuple[Count, ...], ...] = field(repr=False)
    segment_rows: Least1 | None = None

    @property
    def prompts(self) -> int:
        return sum(map(len, self.batches))

    def __post_init__(self) -> None:
        planned = [prompt for batch in self.batches for prompt in batch]
        if not planned or len(set(planned)) != len(planned) or any(not batch for batch in self.batches):
            raise InputError("a batch plan names every prompt once, and has no empty batch.")


@dataclass(frozen=True)
class Measured:
    """What the run found out about itself.

    noise: how far, in logits, two of a row move against one another when it is computed alone and among others: the
        largest of all layers, measured on the first batch and multiplied by a safety factor; `drafter_noise` is the
        drafter's. None before that batch.
    noise_by_layer: the same at each layer 0..L. None in runs of earlier versions: there, one number for all.
    noise_rounding: what a decoder's rounding of its logits adds, relative to the logit: a near-tie of logits x is
        closer than noise_by_layer + noise_rounding |x|.
    backoffs: where memory ran out: {"batch", "phase", "size", "limit"}; size and limit count prompts ("continue") or
        rows ("read").
    savings: of the agreement-only method: {"rows", "full", "candidates", "vocabulary", "witnessed_share",
        "products_avoided"}; see `probekit.lens.work_skipped.WorkSkipped`. None with all statistics.
    logged: of text out of another system's log, for each batch: {"batch", "tokens", "unlike", "largest_gap"}: how many
        tokens the model would not have written here, and how far, in logits, the worst lies below its own.
    timings: {"generation_s", "trace_s", "tokens"}; seconds, of all processes together, and generated tokens.
    files: the run's files with their SHA-256, hexadecimal; a part counts when all of its files are listed. None in
        memory, and in runs of earlier versions.
    """

    noise: Finite | None = None
    drafter_noise: Finite | None = None
    noise_by_layer: tuple[Finite, ...] | None = field(default=None, repr=False)
    noise_rounding: Finite = 0.0
    backoffs: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    savings: Mapping[str, int | float] | None = None
    logged: tuple[Mapping[str, int | float], ...] = field(default=(), repr=False)
    timings: Mapping[str, int | float] = field(
        default_factory=lambda: {"generation_s": 0.0, "trace_s": 0.0, "tokens": 0}
    )
    files: Mapping[str, str] | None = field(default=None, repr=False)

    @property
    def tolerance(self) -> Noise:
        """The noise by row; 0 before the first batch."""
        return Noise(self.noise_by_layer or (self.noise or 0.0,), self.noise_rounding)

    def with_entries(self, entries: Iterable[LedgerEntry]) -> Measured:
        """The same with what ledgers add to it; what is in it already is not counted twice."""
        files, timings, savings = dict(self.files or {}), dict(self.timings), self.savings
        backoffs, logged = list(self.backoffs), {each["batch"]: each for each in self.logged}
        for entry in entries:
            if entry.backoff is not None and entry.backoff not in backoffs:
                backoffs.append(entry.backoff)
            if all(files.get(name) == digest for name, digest in entry.files.items()):
                continue  # a try at a part, or taken in already
            files |= entry.files
            timings = {name: value + entry.seconds.get(name, 0) for name, value in timings.items()}
            if entry.logged is not None:
                logged[entry.logged["batch"]] = entry.logged
            if entry.savings is not None:
                more = WorkSkipped.from_json(entry.savings)
                savings = (more if savings is None else WorkSkipped.from_json(savings).plus(more)).to_json()
        return replace(
            self, files=dict(sorted(files.items())), timings=timings, savings=savings,
            backoffs=tuple(sorted(backoffs, key=lambda one: one["batch"])),
            logged=tuple(logged[batch] for batch in sorted(logged)),
        )  # fmt: skip


_PARTS: Mapping[str, type] = {
    "settings": RunSettings, "provenance": Provenance, "plan": BatchPlan, "measured": Measured,
}  # fmt: skip
_PART_OF = {each.name: part for part, kind in _PARTS.items() for each in fields(kind)}
# The file's keys, in its order.
_KEYS = (
    "model", "prompts_hash", "prompts_source", "batches", "drafter", "draft_vocabulary", "exit_heads", "dtype",
    "device", "text", "decoding", "seed", "max_new_tokens", "statistics", "lenses", "keep_residuals",
    "residual_dtype", "residual_rows", "residual_share", "top_prompts", "backend", "batch_invariant", "segment_rows",
    "noise", "noise_by_layer", "noise_rounding", "drafter_noise", "ignored_processors", "remarks", "backoffs",
    "savings", "logged", "versions", "timings", "files",
)  # fmt: skip
# Settings as two runs are compared, in the order in which differences are listed.
_COMPARED = (
    "dtype", "device", "text", "decoding", "seed", "max_new_tokens", "statistics", "lenses", "keep_residuals",
    "residual_dtype", "residual_rows", "residual_share", "top_prompts", "backend", "batch_invariant",
)  # fmt: skip


def _in_short(value: Any, most: int = 120) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


@dataclass(frozen=True)
class Manifest:
    """Everything that a run was made with, and what it found out about itself."""

    settings: RunSettings
    provenance: Provenance
    plan: BatchPlan
    measured: Measured = Measured()
    schema: str = SCHEMA

    def __repr__(self) -> str:
        how = self.settings
        return (
            f"Manifest({self.model.name}: {self.plan.prompts} prompts, {how.text}, {how.max_new_tokens} tokens each, "
            f"{how.dtype} on {how.device})"
        )

    def _repr_html_(self) -> str:
        return facts_html("probekit manifest", {name: _in_short(value) for name, value in self.to_json().items()})

    @classmethod
    def of(cls, **values: Any) -> Manifest:
        """From the fields of all four parts."""
        given: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        for name, value in values.items():
            given[_PART_OF[name]][name] = value
        return cls(**{part: kind(**given[part]) for part, kind in _PARTS.items()})

    def but(self, **changes: Any) -> Manifest:
        """The same with other values in some fields, whatever part they stand in."""
        parts: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            parts.setdefault(_PART_OF[name], {})[name] = value
        return replace(self, **{part: replace(getattr(self, part), **each) for part, each in parts.items()})

    @property
    def model(self) -> ModelRecord:
        return self.provenance.model

    @property
    def drafter(self) -> ModelRecord | None:
        return self.provenance.drafter

    @property
    def depth(self) -> int:
        return self.model.depth

    @property
    def heads_name(self) -> str | None:
        """The fingerprint of the exit heads, None without any: what names them in predictions and costs."""
        return None if self.settings.exit_heads is None else self.settings.exit_heads.fingerprint

    @property
    def own_text(self) -> bool:
        """Whether every token of the text is the model's own, as it was loaded here."""
        return self.settings.text != "given" and not any(each["unlike"] for each in self.measured.logged)

    @property
    def files(self) -> Mapping[str, str] | None:
        """The run's files with their checksums, as far as they are written; None where none were noted."""
        return self.measured.files

    @property
    def prompt_count(self) -> int:
        return sum(len(batch) for batch in self.plan.batches)

    def to_json(self) -> dict[str, Any]:
        flat = {name: value for part in _PARTS for name, value in asdict(getattr(self, part)).items()}
        return {name: flat[name] for name in _KEYS} | {"schema": self.schema, "prompt_count": self.prompt_count}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Manifest:
        """What `to_json` wrote. Raises ValidationError for wrong types, missing fields and numbers out of bounds."""
        known: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        for name in _KEYS:
            if name in document:
                known[_PART_OF[name]][name] = document[name]
        return cls(**{part: TypeAdapter(kind).validate_python(known[part]) for part, kind in _PARTS.items()})

    def differences(self, other: Manifest) -> list[str]:
        """Settings in which two runs differ, as "name: here, there"; empty when one may go on with the other.

        The batch plan, measured noise, back-offs, timings and library versions are not settings: a run that goes
        on keeps those of its folder.
        """
        mine, theirs = self.settings, other.settings
        pairs: list[tuple[str, Any, Any]] = [(name, getattr(mine, name), getattr(theirs, name)) for name in _COMPARED]
        pairs.append(("prompts_hash", self.provenance.prompts_hash, other.provenance.prompts_hash))
        for name in ("draft_vocabulary", "exit_heads"):
            pairs.append((name, *(one and one.fingerprint for one in (getattr(mine, name), getattr(theirs, name)))))
        for role in ("model", "drafter"):
            here, there = getattr(self, role), getattr(other, role)
            if here is None or there is None:
                pairs.append((role, here and here.name, there and there.name))
            else:
                pairs.append((role, here.identity, there.identity))
        return [f"{name}: {here}, {there}" for name, here, there in pairs if here != there]


def read_manifest(folder: str | os.PathLike[str], hint: str = "Trace again.") -> Manifest:
    """The manifest of a run folder, with what ledgers beside it add.

    Raises InputError, with `hint`, when there is none, it is damaged, or of another schema."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not os.path.isdir(folder):
        raise InputError(
            f"there is no run folder {folder}.", "Make one with `probekit trace MODEL --prompts FILE -o RUN`."
        )
    if not os.path.isfile(path):
        raise InputError(
            f"{folder} is not a run folder: it has no manifest.json.", "Name the -o of a `probekit trace`."
        )
    document = read_json(path, hint)
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}; this probekit reads {SCHEMA!r}.", hint)
    try:
        manifest = Manifest.from_json(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"{path} is not a whole manifest: {where}: {first['msg']}.", hint) from None
    entries = list(ledger_entries(folder))
    return replace(manifest, measured=manifest.measured.with_entries(entries)) if entries else manifest
