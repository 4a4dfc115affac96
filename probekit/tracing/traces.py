"""A `Trace`, in memory and on disk: what every layer said about every token of some texts.

Rows. A prompt of P tokens and a continuation y[0..N-1] make one sequence; the pass runs over all of it but its
last token: P + N - 1 rows. The row at `position` s reads token s (`input_id`) and predicts token s + 1 (`text_id`),
the output token of index `output` = s - (P - 1). Rows with output < 0 belong to the prompt and never enter a rate.
Layers run from 0 (the embedding) to L (the model itself).

A run folder holds `manifest.json` and one set of Parquet parts for each batch of its plan. Each file is written
under another name and then renamed, `layers` last: a part counts when all of its files are there, so a run that
was killed goes on where it stopped. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from probekit.errors import InputError
from probekit.tracing.draft_vocabulary import DraftVocabulary, check_draft_rows
from probekit.tracing.shading import Shaded, shaded_table

SCHEMA = "probekit/trace/1"
LENSES = ("final-norm", "raw")
EXIT_HEADS = "exit_heads.safetensors"  # beside the manifest, where the run was read through some
LOOP_TOKENS = 8
_UNFINISHED = ".unfinished"

Lens = Literal["final-norm", "raw"]

# The columns of each table, in order. Those of `layers` after `layer` depend on what was asked for.
COLUMNS: dict[str, dict[str, str]] = {
    "texts": {
        "prompt": "int32",
        "kind": "str",
        "text": "str",
        "continuation": "str",
        "prompt_tokens": "int32",
        "new_tokens": "int32",
        "ended": "str",
        "looped": "float32",
    },
    "tokens": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "generated": "bool",
        "input_id": "int32",
        "text_id": "int32",
        "text": "str",
    },
    "layers": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "lens": "category",
        "layer": "int16",
        "argmax": "int32",
        "probability": "float32",
        "margin": "float32",
        "agrees": "bool",
        "log_probability": "float32",
        "rank": "int32",
        "model_rank": "int32",
        "entropy": "float32",
        "kl": "float32",
        "overlap": "float32",
        "echo": "bool",
        "near_tie": "bool",
        "accept_probability": "float32",
        "argmax_rounded": "int32",
        "agrees_rounded": "bool",
    },
    "top": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "lens": "category",
        "layer": "int16",
        "place": "int8",
        "token": "int32",
        "token_text": "str",
        "probability": "float32",
    },
    "drafter": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "argmax": "int32",
        "agrees": "bool",
        "margin": "float32",
        "near_tie": "bool",
        "overlap": "float32",
        "accept_probability": "float32",
        "argmax_rounded": "int32",
        "agrees_rounded": "bool",
    },
    # Generated rows only. agrees_up_to: the most rows of a draft head with which the layer says the model's token.
    "draft_head": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "layer": "int16",
        "agrees_up_to": "int32",
        "surely_up_to": "int32",
        "perhaps_up_to": "int32",
        "agrees_up_to_rounded": "int32",
    },
}
_REQUIRED = {
    "texts": tuple(COLUMNS["texts"]),
    "tokens": tuple(COLUMNS["tokens"]),
    "layers": ("prompt", "position", "output", "lens", "layer", "agrees", "near_tie"),
    "top": tuple(COLUMNS["top"]),
    "drafter": ("prompt", "position", "output", "argmax", "agrees", "margin", "near_tie"),
    "draft_head": tuple(name for name in COLUMNS["draft_head"] if not name.endswith("_rounded")),
}


# ---------------------------------------------------------------------------------------------- the manifest
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
        "products_avoided"}; see `probekit.lens.witness.Savings`. None with all statistics.
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


def looped(tokens: Sequence[int], length: int = LOOP_TOKENS) -> float:
    """Share of `tokens` that lie inside a repeated n-gram, 0..1.

    A run of `length` tokens is repeated when the same run began earlier in the same text (the two may overlap); a
    token is looped when some repeated run covers it. So the first time round of a loop does not count, and a text
    shorter than `length` + 1 tokens has none.
    """
    covered = np.zeros(len(tokens), dtype=bool)
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - length + 1):
        run = tuple(tokens[start : start + length])
        if run in seen:
            covered[start : start + length] = True
        seen.add(run)
    return float(covered.mean()) if len(tokens) else 0.0


def visible(text: str) -> str:
    """A token's text with its white space made visible: space, line end and tab get a sign each."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def spelled_bytes(spelling: str) -> str:
    """A vocabulary's spelling of a token that is no whole character, with each stray byte as ⟨0xE2⟩.

    Byte-level vocabularies (GPT-2's) stand a letter for each byte; SentencePiece's write <0xE2>. Other spellings are
    returned as they are.
    """
    if re.fullmatch(r"(<0x[0-9A-Fa-f]{2}>)+", spelling):
        return spelling.replace("<", "⟨").replace(">", "⟩")
    if not spelling or any(letter not in _BYTE_OF_LETTER for letter in spelling):
        return spelling
    raw = bytes(_BYTE_OF_LETTER[letter] for letter in spelling)
    return re.sub(r"\\x([0-9a-f]{2})", lambda byte: f"⟨0x{byte[1].upper()}⟩", raw.decode("utf-8", "backslashreplace"))


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes are their own letters, the others follow from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()


# ------------------------------------------------------------------------------------------------- the trace
class _Source(Protocol):
    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None: ...


class Trace:
    """What every layer of a model said about every token of some texts.

    `texts`, `tokens`, `layers`, `top`, `drafter` and `draft_head` are tidy DataFrames, read on first use (the last
    three are None where they were not asked for). The methods that take a prompt's index answer with arrays over layers
    0..L and output positions 0..N-1; each table is pivoted once.
    """

    def __init__(
        self,
        manifest: Manifest,
        source: _Source,
        *,
        folder: Path | None = None,
        prompts: Sequence[int] | None = None,
        pivots: dict[tuple[str, str, str], dict[int, np.ndarray]] | None = None,
        exit_heads: bytes | None = None,
    ) -> None:
        self.manifest = manifest
        self._exit_heads = exit_heads
        self.folder = folder
        self._source = source
        self._chosen = None if prompts is None else tuple(prompts)
        self._pivots = {} if pivots is None else pivots
        self._views: dict[str, pd.DataFrame | None] = {}

    @classmethod
    def from_frames(
        cls,
        manifest: Manifest,
        texts: pd.DataFrame,
        tokens: pd.DataFrame,
        layers: pd.DataFrame,
        *,
        top: pd.DataFrame | None = None,
        drafter: pd.DataFrame | None = None,
        draft_head: pd.DataFrame | None = None,
        exit_heads: bytes | None = None,
    ) -> Trace:
        """A trace in memory. Columns are those of `COLUMNS`; their order and types are put right here."""
        given = {"texts": texts, "tokens": tokens, "layers": layers, "top": top, "drafter": drafter,
                 "draft_head": draft_head}  # fmt: skip
        frames = _Frames({name: conform(name, frame) for name, frame in given.items() if frame is not None})
        return cls(manifest, frames, exit_heads=exit_heads)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Trace:
        """The trace in a run folder. Raises InputError when it is missing, foreign, or not finished."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        missing = [part for part in range(len(manifest.batches)) if not _is_done(folder, manifest, part)]
        if missing:
            raise InputError(
                f"the run in {folder} is not finished: {len(missing)} of {len(manifest.batches)} parts are missing.",
                "Run the same `probekit trace` command again with --resume.",
            )
        return cls(manifest, _Parts(folder, manifest), folder=folder)

    # -- tables
    @property
    def texts(self) -> pd.DataFrame:
        return self._table("texts")

    @property
    def tokens(self) -> pd.DataFrame:
        return self._table("tokens")

    @property
    def layers(self) -> pd.DataFrame:
        return self._table("layers")

    @property
    def top(self) -> pd.DataFrame | None:
        return self._view("top")

    @property
    def drafter(self) -> pd.DataFrame | None:
        return self._view("drafter")

    @property
    def draft_head(self) -> pd.DataFrame | None:
        return self._view("draft_head")

    # -- what there is
    @property
    def prompts(self) -> list[int]:
        """Indices of the prompts, ascending."""
        return self.texts["prompt"].tolist()

    @property
    def depth(self) -> int:
        return self.manifest.depth

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, prompts: Iterable[int]) -> Trace:
        """The trace of some of its prompts; arrays and tables that were read are shared."""
        chosen = sorted(set(prompts))
        for prompt in chosen:
            self._check(prompt)
        if not chosen:
            raise InputError("a trace needs at least one prompt; none was selected.")
        return Trace(
            self.manifest, self._source, folder=self.folder, prompts=chosen, pivots=self._pivots,
            exit_heads=self._exit_heads,
        )  # fmt: skip

    @property
    def exit_heads(self) -> bytes | None:
        """The exit heads that the run was read through, as `probekit.lens.heads.pack_heads` writes them."""
        if self.manifest.exit_heads is None or self._exit_heads is not None or self.folder is None:
            return self._exit_heads
        path = self.folder / EXIT_HEADS
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path} cannot be read: {error.strerror or error}.", "Trace again with --exit-heads."
            ) from None

    # -- one prompt
    def agreement(self, prompt: int, lens: Lens = "final-norm", *, rounded: bool = False) -> np.ndarray:
        """(L+1, N) bool: the lens at the layer has the model's argmax.

        `rounded` compares argmaxes of logits rounded to the decoder's dtype (lowest index first), which differ from
        the exact ones only where that dtype is not float32.
        """
        column = "agrees_rounded" if rounded and self.manifest.dtype != "float32" else "agrees"
        return self.values(prompt, column, lens)

    def accept_probability(self, prompt: int, lens: Lens = "final-norm") -> np.ndarray:
        """(L+1, N) float32: w[t] = min(1, q(y[t]) / p(y[t])), the chance that y[t] is accepted if it was drafted."""
        self._require_probabilities()
        return self.values(prompt, "accept_probability", lens)

    def near_ties(self, prompt: int, lens: Lens = "final-norm") -> np.ndarray:
        """(L+1, N) bool: the two top logits are closer than the measured noise of a row."""
        return self.values(prompt, "near_tie", lens)

    def near_tie_count(self) -> tuple[int, int]:
        """How many of the agreement bits of generated rows are near-ties, and how many bits there are.

        Of the final-norm lens, layers 0..L, over the whole run. These may fall either way in a decoder.
        """
        frame = self._read("layers", ["output", "lens", "near_tie"])
        frame = frame[(frame["output"] >= 0) & (frame["lens"] == LENSES[0])]
        return int(frame["near_tie"].sum()), len(frame)

    def values(self, prompt: int, column: str, lens: Lens = "final-norm") -> np.ndarray:
        """(L+1, N): any column of `layers` for one prompt, layer by output position. Not writable."""
        self._check(prompt)
        return self._pivot("layers", column, lens)[prompt]

    def drafter_agreement(self, prompt: int, *, rounded: bool = False) -> np.ndarray:
        """(N,) bool: the draft model has the model's argmax."""
        column = "agrees_rounded" if rounded and self.manifest.dtype != "float32" else "agrees"
        return self.drafter_values(prompt, column)

    def drafter_accept_probability(self, prompt: int) -> np.ndarray:
        """(N,) float32: the chance that y[t] is accepted if the draft model drafted it."""
        self._require_probabilities()
        return self.drafter_values(prompt, "accept_probability")

    def drafter_values(self, prompt: int, column: str) -> np.ndarray:
        """(N,): any column of `drafter` for one prompt."""
        if self.manifest.drafter is None:
            raise InputError(
                "this trace has no draft model.",
                "Trace again with `draft_model=...` (--draft-model on the command line).",
            )
        self._check(prompt)
        return self._pivot("drafter", column, "")[prompt][0]

    def draft_head_agreement(self, prompt: int, rows: int, *, rounded: bool = False) -> np.ndarray:
        """(L+1, N) bool: the layer, with a draft head of the order's first `rows` tokens, has the model's token."""
        column = "agrees_up_to_rounded" if rounded and self.manifest.dtype != "float32" else "agrees_up_to"
        return self._kept(prompt, rows) & (rows <= self._draft_head_values(prompt, column))

    def draft_head_near_ties(self, prompt: int, rows: int) -> np.ndarray:
        """(L+1, N) bool: whether it has the model's token may fall either way within the measured noise of a row."""
        surely, perhaps = (self._draft_head_values(prompt, f"{name}_up_to") for name in ("surely", "perhaps"))
        return self._kept(prompt, rows) & (surely < rows) & (rows <= perhaps)

    def draft_head_ids(self, rows: int) -> np.ndarray:
        """(rows,) int64: the tokens that a draft head of so many rows keeps."""
        order = self._draft_vocabulary()
        return order.order(self.manifest.model.vocabulary)[: check_draft_rows(rows, self.manifest.model.vocabulary)]

    def _kept(self, prompt: int, rows: int) -> np.ndarray:
        """(N,) bool: the draft head has the token of each output position."""
        return np.isin(self.outputs(prompt), self.draft_head_ids(rows))

    def _draft_head_values(self, prompt: int, column: str) -> np.ndarray:
        self._draft_vocabulary()
        self._check(prompt)
        return self._pivot("draft_head", column, "")[prompt]

    def _draft_vocabulary(self) -> DraftVocabulary:
        if self.manifest.draft_vocabulary is None:
            raise InputError(
                "this trace knows nothing of draft heads with fewer rows.",
                "Trace again with `draft_vocabulary=...` (--draft-vocabulary on the command line).",
            )
        return self.manifest.draft_vocabulary

    def frequent_tokens(self) -> DraftVocabulary:
        """The tokens of the continuations by falling frequency: the order in which a draft head would keep rows."""
        manifest = self.manifest
        source = f"{len(self)} {manifest.text} texts of {manifest.model.name}, {manifest.prompts_source}"
        return DraftVocabulary.counted((self.outputs(prompt) for prompt in self.prompts), source)

    def outputs(self, prompt: int) -> np.ndarray:
        """(N,) int32: y, the continuation's token ids, its end-of-sequence token with it."""
        self._check(prompt)
        return self._pivot("tokens", "text_id", "")[prompt][0]

    def prompt_ids(self, prompt: int) -> np.ndarray:
        """(P,) int32: the prompt's token ids, as the model read them."""
        self._check(prompt)
        key = ("tokens", "prompt_ids", "")
        if key not in self._pivots:
            frame = self._read("tokens", ["prompt", "output", "position", "input_id"])
            frame = frame[frame["output"] <= 0].sort_values(["prompt", "position"], kind="stable")
            prompts, starts = np.unique(frame["prompt"].to_numpy(), return_index=True)
            ids = np.split(frame["input_id"].to_numpy(), starts[1:])
            self._pivots[key] = dict(zip(prompts.tolist(), ids, strict=True))
        return self._pivots[key][prompt]

    def ended(self, prompt: int) -> str:
        """Why the text ended: "eos", "budget" or "given"."""
        return str(self._text(prompt)["ended"])

    def text(self, prompt: int) -> str:
        """The prompt as it was encoded."""
        return str(self._text(prompt)["text"])

    def continuation(self, prompt: int) -> str:
        return str(self._text(prompt)["continuation"])

    def save(self, folder: str | os.PathLike[str]) -> Trace:
        """Write this trace to a new folder, by its own batch plan; returns the trace there.

        Raises InputError for a folder that holds something, for a selection, and where residuals were kept.
        """
        if self._chosen is not None:
            raise InputError("a selection of prompts is not a run: save the whole trace.")
        if self.manifest.keep_residuals:
            raise InputError("this trace keeps residuals beside its tables.", "Copy its folder instead.")
        writer = TraceWriter(folder, self.manifest, exit_heads=self.exit_heads)
        for part, batch in enumerate(self.manifest.batches):
            frames = {name: self._table(name) for name in _tables(self.manifest)}
            writer.write(part, {name: frame[frame["prompt"].isin(batch)] for name, frame in frames.items()})
        return writer.finish()

    def to_pandas(self) -> pd.DataFrame:
        """One tidy table: `layers` with each row's token and each text's kind beside it."""
        keys = ["prompt", "position", "output"]
        tokens = self.tokens.merge(self.texts[["prompt", "kind"]], on="prompt", validate="many_to_one")
        return self.layers.merge(tokens, on=keys, validate="many_to_one")

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else str(self.folder)
        return f"Trace({self.manifest.model.name}, {self._summary()}, {where})"

    def _repr_html_(self) -> str:
        rows = {
            "model": self.manifest.model.name,
            "drafter": self.manifest.drafter.name if self.manifest.drafter else "none",
            "text": self._summary(),
            "layers": f"0..{self.depth} ({', '.join(self.manifest.lenses)})",
            "looped": f"{self.texts['looped'].mean():.0%} of the tokens repeat a run of {LOOP_TOKENS}",
            "folder": "in memory" if self.folder is None else str(self.folder),
        }
        body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table><caption>probekit trace</caption>{body}</table>{self._agreement_html()}"

    def _agreement_html(self) -> str:
        """Agreement by layer, in one row."""
        generated = np.concatenate([self.agreement(prompt) for prompt in self.prompts], axis=1)
        shares = generated.mean(axis=1).tolist()
        cells = [Shaded(f"{share:.0%}", share) for share in shares]
        return shaded_table(
            f"agreement with the model over {generated.shape[1]} tokens, {LENSES[0]} lens; layer 0 is the embedding",
            "layer", [str(layer) for layer in range(len(shares))], [("agreement", cells)],
        )  # fmt: skip

    def _summary(self) -> str:
        tokens = int(self.texts["new_tokens"].sum())
        return f"{len(self)} prompts, {tokens} {self.manifest.text} tokens"

    # -- reading
    def _read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        frame = self._source.read(table, columns)
        if frame is None:
            raise InputError(f"this trace has no {table!r} table.")
        return frame

    def _view(self, table: str) -> pd.DataFrame | None:
        if table not in self._views:
            frame = self._source.read(table)
            if frame is not None and self._chosen is not None:
                frame = frame[frame["prompt"].isin(self._chosen)].reset_index(drop=True)
            if frame is not None and table == "texts":
                frame = frame.sort_values("prompt", ignore_index=True)
            self._views[table] = frame
        return self._views[table]

    def _table(self, table: str) -> pd.DataFrame:
        frame = self._view(table)
        if frame is None:
            raise InputError(f"this trace has no {table!r} table.")
        return frame

    def _text(self, prompt: int) -> pd.Series:
        self._check(prompt)
        return self.texts.iloc[self.prompts.index(prompt)]

    def _check(self, prompt: int) -> None:
        known = self.texts["prompt"].to_numpy()
        place = int(np.searchsorted(known, prompt))
        if place == len(known) or known[place] != prompt:
            raise InputError(f"prompt {prompt!r} is not in this trace: it has prompts {_span(known.tolist())}.")

    def _require_probabilities(self) -> None:
        if self.manifest.text == "greedy":
            raise InputError(
                "greedy text has no acceptance probabilities: a draft there agrees or it does not.",
                "Ask for the agreement, or trace with a temperature above 0.",
            )

    def _pivot(self, table: str, column: str, lens: str) -> dict[int, np.ndarray]:
        """{prompt: (L+1, N)} for tables with layers, {prompt: (1, N)} for the others; generated positions only."""
        key = (table, column, lens)
        if key not in self._pivots:
            self._pivots[key] = self._scatter(table, column, lens)
        return self._pivots[key]

    def _scatter(self, table: str, column: str, lens: str) -> dict[int, np.ndarray]:
        layered, lensed = "layer" in COLUMNS[table], "lens" in COLUMNS[table]
        if lensed and lens not in self.manifest.lenses:
            raise InputError(f"this trace has no {lens!r} lens: it has {', '.join(self.manifest.lenses)}.")
        if column not in COLUMNS[table]:
            raise InputError(f"{table!r} has no column {column!r}: it may have {', '.join(COLUMNS[table])}.")
        wanted = ["prompt", "output", column] + ["layer"] * layered + ["lens"] * lensed
        frame = self._read(table, list(dict.fromkeys(wanted)))
        keep = frame["output"].to_numpy() >= 0
        if lensed:
            keep &= (frame["lens"] == lens).to_numpy()
        prompt, output, values = (frame[name].to_numpy()[keep] for name in ("prompt", "output", column))
        layer = frame["layer"].to_numpy()[keep].astype(np.int64) if layered else 0

        texts = self._read("texts", ["prompt", "new_tokens"]).sort_values("prompt")
        prompts, tokens = texts["prompt"].to_numpy(), texts["new_tokens"].to_numpy().astype(np.int64)
        layers = self.depth + 1 if layered else 1
        ends = np.cumsum(tokens * layers)
        starts = ends - tokens * layers
        place = np.searchsorted(prompts, prompt)
        # Rows may stand in any order, and each cell must be there once.
        cells = starts[place] + layer * tokens[place] + output
        if len(cells) != ends[-1] or len(np.unique(cells)) != len(cells):
            raise InputError(f"the {table!r} table is not whole: {len(cells)} rows where {ends[-1]} belong.")
        flat = np.empty(len(cells), dtype=values.dtype)
        flat[cells] = values
        flat.flags.writeable = False
        return {
            int(index): flat[start:end].reshape(layers, -1)
            for index, start, end in zip(prompts, starts, ends, strict=True)
        }


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) > 6:
        return f"{numbers[0]}, {numbers[1]}, .. {numbers[-1]} ({len(numbers)} of them)"
    return ", ".join(map(str, numbers))


def conform(table: str, frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the columns of `table` in their order and types. Raises InputError on a wrong set of columns."""
    unknown = [name for name in frame.columns if name not in COLUMNS[table]]
    missing = [name for name in _REQUIRED[table] if name not in frame.columns]
    if unknown or missing:
        raise InputError(f"a {table!r} table has unknown columns {unknown} and lacks {missing}.")
    whole: dict[str, Any] = {}
    for name, kind in COLUMNS[table].items():
        if name in frame.columns:
            values = frame[name]
            dtype = pd.CategoricalDtype(list(LENSES)) if kind == "category" else pd.api.types.pandas_dtype(kind)
            whole[name] = values.astype(dtype)
    return pd.DataFrame(whole).reset_index(drop=True)


class _Frames:
    """Tables in memory."""

    def __init__(self, frames: Mapping[str, pd.DataFrame]) -> None:
        self._frames = dict(frames)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        frame = self._frames.get(table)
        if frame is None or columns is None:
            return frame
        _require_columns(table, frame.columns, columns)
        return frame[list(columns)]


class _Parts:
    """Tables in the Parquet parts of a run folder; a whole table, once read, is kept."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._whole: dict[str, pd.DataFrame] = {}

    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        if table not in _tables(self._manifest):
            return None
        if table in self._whole and columns is not None:
            _require_columns(table, self._whole[table].columns, columns)
            return self._whole[table][list(columns)]
        if table not in self._whole:
            frame = self._load(table, columns)
            if columns is not None:
                return frame
            self._whole[table] = frame
        return self._whole[table]

    def _load(self, table: str, columns: Sequence[str] | None) -> pd.DataFrame:
        parts = []
        for part in range(len(self._manifest.batches)):
            path = self._folder / _part_name(table, part)
            try:
                _require_columns(table, pq.read_schema(path).names, columns or _REQUIRED[table])
                parts.append(pq.read_table(path, columns=None if columns is None else list(columns)))
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(
                    f"{path} cannot be read: {error}", "Delete it, and trace again with --resume."
                ) from None
        frame = pa.concat_tables(parts).unify_dictionaries().to_pandas()
        if "lens" in frame.columns:
            frame["lens"] = frame["lens"].cat.set_categories(LENSES)
        return frame


def _require_columns(table: str, present: Iterable[str], wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in set(present)]
    if missing:
        raise InputError(
            f"the {table!r} table of this trace has no {', '.join(missing)}.",
            "Trace again with `statistics='all'`, or at the settings that this figure needs.",
        )


# ------------------------------------------------------------------------------------------------ the folder
def _tables(manifest: Manifest) -> list[str]:
    """Tables of a run, in the order in which a part's files are written."""
    optional = [
        ("top", manifest.top_prompts > 0),
        ("drafter", manifest.drafter is not None),
        ("draft_head", manifest.draft_vocabulary is not None),
    ]
    return ["texts", "tokens", *(name for name, there in optional if there), "layers"]


def _part_name(table: str, part: int) -> str:
    return f"{table}-{part:05d}.{'safetensors' if table == 'residuals' else 'parquet'}"


def _is_done(folder: Path, manifest: Manifest, part: int) -> bool:
    tables = _tables(manifest) + (["residuals"] if manifest.keep_residuals else [])
    return all((folder / _part_name(table, part)).is_file() for table in tables)


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


class TraceWriter:
    """Writes the parts of one run, each whole or not at all; without a folder, keeps them in memory.

    `resume` goes on with the run in the folder, by the batch plan of its manifest; a run of other settings is
    refused, and they are named. Without `resume`, the folder must be absent or empty. Nothing is written before the
    first part.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        manifest: Manifest,
        *,
        resume: bool = False,
        exit_heads: bytes | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._exit_heads = exit_heads
        self.manifest = manifest
        self._memory: dict[int, dict[str, pd.DataFrame]] = {}
        self._begun = False
        if self.folder is None:
            if manifest.keep_residuals:
                raise InputError("kept residuals are written to files: name a folder for this run.")
            return
        present = check_run_folder(self.folder, manifest, resume=resume)
        if present is not None:
            self.manifest, self._begun = present, True

    @property
    def pending(self) -> list[int]:
        """Parts of the plan that are not written yet."""
        parts = range(len(self.manifest.batches))
        if self.folder is None:
            return [part for part in parts if part not in self._memory]
        return [part for part in parts if not _is_done(self.folder, self.manifest, part)]

    def update(self, **changes: Any) -> None:
        """Change fields of the manifest, on disk too once the run has begun."""
        self.manifest = replace(self.manifest, **changes)
        if self.folder is not None and self._begun:
            text = json.dumps(self.manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
            atomic_text(self.folder / "manifest.json", text)

    def write(self, part: int, frames: Mapping[str, pd.DataFrame], *, residuals: bytes | None = None) -> None:
        """Write one part: a frame for each table of the run, and the residuals' shard where they are kept."""
        tables = _tables(self.manifest)
        if set(frames) != set(tables) or (residuals is not None) != bool(self.manifest.keep_residuals):
            raise ValueError(f"a part of this run has the tables {tables}, not {sorted(frames)}")
        whole = {name: conform(name, frames[name]) for name in tables}
        if self.folder is None:
            self._memory[part] = whole
            return
        if not self._begun:
            self._begun = True
            self.folder.mkdir(parents=True, exist_ok=True)
            self.update()
        if self._exit_heads is not None and not (self.folder / EXIT_HEADS).is_file():
            atomic_bytes(self.folder / EXIT_HEADS, self._exit_heads)
        if residuals is not None:
            atomic_bytes(self.folder / _part_name("residuals", part), residuals)
        for name in tables:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pandas(whole[name], preserve_index=False), sink, compression="zstd")
            atomic_bytes(self.folder / _part_name(name, part), sink.getvalue())

    def finish(self) -> Trace:
        """The whole trace, when no part is pending."""
        if self.folder is not None:
            return Trace.open(self.folder)
        parts = [self._memory[part] for part in range(len(self.manifest.batches))]
        frames = {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]}
        return Trace(self.manifest, _Frames(frames), exit_heads=self._exit_heads)


def check_run_folder(folder: str | os.PathLike[str], manifest: Manifest, *, resume: bool) -> Manifest | None:
    """The manifest of the run that is there to go on with, or None for a new run. Writes nothing.

    Raises InputError for a path that is a file, a folder of something else, a run without `resume`, or a run of other
    settings (named).
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; a run is written to a folder.", "Name another one.")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / "manifest.json").is_file():
        leftovers = [path for path in folder.iterdir() if not path.name.endswith(_UNFINISHED)]
        if leftovers:
            raise InputError(f"{folder} holds other files and is not a run folder.", "Name a new or an empty folder.")
        return None
    present = read_manifest(folder)
    if not resume:
        raise InputError(f"{folder} already holds a run.", "Go on with it (--resume), or name another folder.")
    different = present.differences(manifest)
    if different:
        raise InputError(
            f"the run in {folder} was made with other settings (its own, then yours): {'; '.join(different)}.",
            "Give the same settings, or name another folder.",
        )
    return present


def atomic_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    atomic_bytes(path, text.encode())


def atomic_bytes(path: Path, content: Any) -> None:
    """Write under another name, then rename: a file of this name is always whole."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
