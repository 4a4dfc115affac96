"""A `Trace`, in memory and on disk: what every layer said about every token of some texts.

Rows. A prompt of P tokens and a continuation y[0..N-1] make one sequence; the pass runs over all of it but its
last token: P + N - 1 rows. The row at `position` s reads token s (`input_id`) and predicts token s + 1 (`text_id`),
the output token of index `output` = s - (P - 1). Rows with output < 0 belong to the prompt and never enter a rate.
Layers run from 0 (the embedding) to L (the model itself).

A run folder holds `manifest.json` and one set of Parquet parts for each batch of its plan. A part counts when the
manifest lists its files, with their checksums, and they are there. Nothing here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from probekit.errors import InputError
from probekit.html_tables import facts_html
from probekit.settings import Sampling
from probekit.traces.draft_vocabulary import DraftVocabulary, check_draft_rows
from probekit.traces.manifest import Manifest, read_manifest
from probekit.traces.pivots import MOST_CELLS, parts_within, pivoted
from probekit.traces.residuals import Residuals, read_residuals
from probekit.traces.schema import COLUMNS, LENSES, LensName, conform
from probekit.traces.shown import agreement_html, span
from probekit.traces.storage import (
    EXIT_HEADS,
    Tables,
    TablesInMemory,
    TablesInParts,
    TraceWriter,
    checked_file,
    is_done,
    part_name,
    tables_of,
    writing_run,
)
from probekit.traces.token_text import LOOP_TOKENS


class Trace:
    """What every layer of a model said about every token of some texts.

    `texts`, `tokens`, `layers`, `top`, `drafter` and `draft_head` are tidy DataFrames, read on first use (the last
    three are None where they were not asked for). The methods that take a prompt's index answer with arrays over layers
    0..L and output positions 0..N-1; each table is pivoted once.

    Examples
    --------
    >>> import tempfile
    >>> import probekit
    >>> folder = tempfile.mkdtemp()
    >>> _ = probekit.trace("tales-tied", ["Once upon a time"], folder, max_new_tokens=8, keep_residuals=[6])
    >>> trace = probekit.Trace.open(folder)
    >>> trace.agreement(0)[12].all()  # the last layer agrees with the model everywhere
    np.True_
    >>> trace.residuals(6)
    Residuals(layer 6: 11 positions x 128)
    """

    def __init__(
        self,
        manifest: Manifest,
        source: Tables,
        *,
        folder: Path | None = None,
        prompts: Sequence[int] | None = None,
        pivots: dict[tuple[str, str, str], dict[int, np.ndarray]] | None = None,
        exit_heads: bytes | None = None,
        residuals: dict[int, Residuals] | None = None,
    ) -> None:
        self.manifest = manifest
        self._exit_heads = exit_heads
        self.folder = folder
        self._source = source
        self._chosen = None if prompts is None else tuple(prompts)
        self._pivots = {} if pivots is None else pivots
        self._residuals: dict[int, Residuals] = {} if residuals is None else residuals
        self._views: dict[str, pd.DataFrame | None] = {}
        self._columns = pd.DataFrame()  # of the texts, as far as they were asked for
        self._known: np.ndarray | None = None  # the prompts, ascending

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
        residuals: dict[int, Residuals] | None = None,
    ) -> Trace:
        """A trace in memory. Columns are those of `COLUMNS`; their order and types are put right here."""
        given = {"texts": texts, "tokens": tokens, "layers": layers, "top": top, "drafter": drafter,
                 "draft_head": draft_head}  # fmt: skip
        frames = TablesInMemory({name: conform(name, frame) for name, frame in given.items() if frame is not None})
        return cls(manifest, frames, exit_heads=exit_heads, residuals=residuals)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Trace:
        """The trace in a run folder. Raises InputError when it is missing, foreign, or not finished."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        missing = [part for part in range(len(manifest.plan.batches)) if not is_done(folder, manifest, part)]
        if missing:
            parts = len(manifest.plan.batches)
            raise InputError(
                f"the run in {folder} is not finished: {len(missing)} of {parts} parts are missing.",
                "Run the same `probekit trace` command again with --resume.",
            )
        return cls(manifest, TablesInParts(folder, manifest), folder=folder)

    @classmethod
    def of_writer(cls, writer: TraceWriter) -> Trace:
        """The whole trace that a writer wrote, when no part is pending."""
        if writer.folder is not None:
            return cls.open(writer.folder)
        return cls(writer.manifest, TablesInMemory(writer.written), exit_heads=writer.exit_heads)

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
        return self.text_columns()["prompt"].tolist()

    def text_columns(self, *names: str) -> pd.DataFrame:
        """`prompt` and these columns of `texts`, prompt by prompt: without reading the texts themselves."""
        wanted = ["prompt", *names]
        if "texts" in self._views:
            return self.texts[wanted]
        if not set(wanted) <= set(self._columns):
            frame = self._read("texts", list(dict.fromkeys([*self._columns, *wanted])))
            frame = frame if self._chosen is None else frame[frame["prompt"].isin(self._chosen)]
            self._columns = frame.sort_values("prompt", ignore_index=True)
        return self._columns[wanted]

    @property
    def depth(self) -> int:
        return self.manifest.depth

    @property
    def rounds_logits(self) -> bool:
        """Whether a decoder compares logits rounded to its 16-bit type, and this trace knows them."""
        return self.manifest.settings.dtype != "float32" and self.manifest.settings.statistics == "all"

    def __len__(self) -> int:
        return len(self.text_columns())

    def select(self, prompts: Iterable[int]) -> Trace:
        """The trace of some of its prompts; arrays and tables that were read are shared."""
        chosen = sorted(set(prompts))
        for prompt in chosen:
            self._check(prompt)
        if not chosen:
            raise InputError("a trace needs at least one prompt; none was selected.")
        return Trace(
            self.manifest, self._source, folder=self.folder, prompts=chosen, pivots=self._pivots,
            exit_heads=self._exit_heads, residuals=self._residuals,
        )  # fmt: skip

    def pieces(self, most_cells: int = MOST_CELLS) -> Iterator[Trace]:
        """The trace piece by piece, each of whole parts and read by itself: for what adds up over prompts, in bounded
        memory. A trace in memory, or with at most so many (lens, layer, row) cells, is one piece: itself."""
        source, texts = self._source, self.text_columns("prompt_tokens", "new_tokens")
        tokens = (texts["prompt_tokens"] + texts["new_tokens"] - 1).astype("int64")
        rows = tokens * (self.depth + 1) * len(self.manifest.settings.lenses)
        cells = dict(zip(texts["prompt"].tolist(), rows.tolist(), strict=True))
        groups = parts_within(self.manifest.plan.batches, cells, most_cells)
        if not isinstance(source, TablesInParts) or len(groups) == 1:
            yield self
            return
        for parts, prompts in groups:
            here = source.some(parts)
            yield Trace(self.manifest, here, folder=self.folder, prompts=prompts, exit_heads=self._exit_heads)

    @property
    def exit_heads(self) -> bytes | None:
        """The exit heads that the run was read through, as `probekit.lens.exit_heads.pack_heads` writes them."""
        if self.manifest.settings.exit_heads is None or self._exit_heads is not None or self.folder is None:
            return self._exit_heads
        path = checked_file(self.folder, self.manifest, EXIT_HEADS)
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path} cannot be read: {error.strerror or error}.", "Trace again with --exit-heads."
            ) from None

    # -- one prompt
    def agreement(self, prompt: int, lens: LensName = "final-norm", *, rounded: bool = False) -> np.ndarray:
        """(L+1, N) bool: the lens at the layer has the model's argmax.

        `rounded` compares argmaxes of logits rounded to the decoder's dtype (lowest index first), which differ from
        the exact ones only where that dtype is not float32.
        """
        column = "agrees_rounded" if rounded and self.manifest.settings.dtype != "float32" else "agrees"
        return self.values(prompt, column, lens)

    def accept_probability(self, prompt: int, lens: LensName = "final-norm") -> np.ndarray:
        """(L+1, N) float32: w[t] = min(1, q(y[t]) / p(y[t])), the chance that y[t] is accepted if it was drafted."""
        self._require_probabilities()
        return self.values(prompt, "accept_probability", lens)

    def near_ties(self, prompt: int, lens: LensName = "final-norm") -> np.ndarray:
        """(L+1, N) bool: the two top logits are closer than the measured noise of a row."""
        return self.values(prompt, "near_tie", lens)

    def near_tie_count(self) -> tuple[int, int]:
        """How many of the agreement bits of generated rows are near-ties, and how many bits there are.

        Of the final-norm lens, layers 0..L, over the whole run. These may fall either way in a decoder.
        """
        ties = bits = 0
        for piece in self.pieces():
            frame = piece._read("layers", ["output", "lens", "near_tie"])
            frame = frame[(frame["output"] >= 0) & (frame["lens"] == LENSES[0])]
            ties, bits = ties + int(frame["near_tie"].sum()), bits + len(frame)
        return ties, bits

    def values(self, prompt: int, column: str, lens: LensName = "final-norm") -> np.ndarray:
        """(L+1, N): any column of `layers` for one prompt, layer by output position. Not writable."""
        self._check(prompt)
        return self._pivot("layers", column, lens)[prompt]

    def drafter_agreement(self, prompt: int, *, rounded: bool = False) -> np.ndarray:
        """(N,) bool: the draft model has the model's argmax."""
        column = "agrees_rounded" if rounded and self.manifest.settings.dtype != "float32" else "agrees"
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
        column = "agrees_up_to_rounded" if rounded and self.manifest.settings.dtype != "float32" else "agrees_up_to"
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
        if self.manifest.settings.draft_vocabulary is None:
            raise InputError(
                "this trace knows nothing of draft heads with fewer rows.",
                "Trace again with `draft_vocabulary=...` (--draft-vocabulary on the command line).",
            )
        return self.manifest.settings.draft_vocabulary

    def frequent_tokens(self) -> DraftVocabulary:
        """The tokens of the continuations by falling frequency: the order in which a draft head would keep rows."""
        manifest = self.manifest
        prompts = manifest.provenance.prompts_source
        source = f"{len(self)} {manifest.settings.text} texts of {manifest.model.name}, {prompts}"
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

    def residuals(self, layer: int) -> Residuals:
        """The residual stream after `layer` layers at every row of this trace, from what the run kept.

        Raises InputError where the run kept none there, or a file of them is missing or damaged.
        """
        tokens = self.tokens.set_index(["prompt", "position"])[["output", "generated"]]
        return self.whole_residuals(layer).within(tokens)

    def whole_residuals(self, layer: int) -> Residuals:
        """The same at every row that the run kept, whatever this trace is of; `frame` has prompt and position only."""
        kept = self.manifest.settings.keep_residuals
        if layer not in self._residuals:
            if layer not in kept or self.folder is None:
                there = f"it kept those of layers {', '.join(map(str, kept))}" if kept else "it kept none"
                hint = f"Trace again with --keep-residuals {layer}."
                raise InputError(f"this run has no residuals of layer {layer!r}: {there}.", hint)
            parts = range(len(self.manifest.plan.batches))
            for part in parts:
                checked_file(self.folder, self.manifest, part_name("residuals", part))
            self._residuals[layer] = read_residuals(self.folder, len(parts), layer)
        return self._residuals[layer]

    def residuals_of(self, prompt: int, layer: int) -> np.ndarray:
        """(N, width) float32: the residuals after `layer` layers that predict each output token, as far as kept."""
        first = len(self.prompt_ids(prompt)) - 1
        return self.whole_residuals(layer).between(prompt, first, first + len(self.outputs(prompt)))

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
        if self.manifest.settings.keep_residuals:
            raise InputError("this trace keeps residuals beside its tables.", "Copy its folder instead.")
        with writing_run(folder, self.manifest, exit_heads=self.exit_heads) as writer:
            for part, batch in enumerate(self.manifest.plan.batches):
                frames = {name: self._table(name) for name in tables_of(self.manifest)}
                writer.write(part, {name: frame[frame["prompt"].isin(batch)] for name, frame in frames.items()})
        return Trace.of_writer(writer)

    @property
    def sampling(self) -> Sampling:
        """How the text was chosen; of given text, what it is taken for: a sample at temperature 1."""
        how = self.manifest.settings.decoding
        return Sampling(how["temperature"], int(how["top_k"]), how["top_p"], self.manifest.settings.seed)

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
            "layers": f"0..{self.depth} ({', '.join(self.manifest.settings.lenses)})",
            "looped": f"{self.texts['looped'].mean():.0%} of the tokens repeat a run of {LOOP_TOKENS}",
            "folder": "in memory" if self.folder is None else str(self.folder),
        }
        return facts_html("probekit trace", rows) + agreement_html([self.agreement(prompt) for prompt in self.prompts])

    def _summary(self) -> str:
        tokens = int(self.text_columns("new_tokens")["new_tokens"].sum())
        return f"{len(self)} prompt{'s' * (len(self) != 1)}, {tokens} {self.manifest.settings.text} tokens"

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
        if self._known is None:
            self._known = self.text_columns()["prompt"].to_numpy()
        known = self._known
        place = int(np.searchsorted(known, prompt))
        if place == len(known) or known[place] != prompt:
            raise InputError(f"prompt {prompt!r} is not in this trace: it has prompts {span(known.tolist())}.")

    def _require_probabilities(self) -> None:
        if self.manifest.settings.text == "greedy":
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
        if lensed and lens not in self.manifest.settings.lenses:
            raise InputError(f"this trace has no {lens!r} lens: it has {', '.join(self.manifest.settings.lenses)}.")
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
        sizes = texts["prompt"].to_numpy(), texts["new_tokens"].to_numpy().astype(np.int64)
        return pivoted(table, (prompt, layer, output, values), *sizes, self.depth + 1 if layered else 1)


def as_trace(given: Trace | str | os.PathLike[str]) -> Trace:
    """What public functions do with the trace that they are given: a folder is opened.

    Raises InputError for anything else, and says how a trace is made.
    """
    if isinstance(given, Trace):
        return given
    if isinstance(given, (str, os.PathLike)):
        return Trace.open(given)
    raise InputError(
        f"a {type(given).__name__} was given; expected a trace, or the folder of one.",
        "Make one with probekit.trace(model, prompts).",
    )
