"""`trace`: prompts -> their continuation -> one teacher-forced pass -> a Trace.

First a plan, with every check that needs no forward pass; then the model is checked; then, batch by batch of the plan,
the texts are generated, every layer of every row is read, and one part of the trace is written.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from probekit.decoding.autoregressive import Autoregressive
from probekit.errors import ResourceError
from probekit.lens.agreement import AgreementSearch, WorkSkipped
from probekit.lens.chunked import StatisticsPlan, layer_statistics
from probekit.lens.draft_rows import DraftRows
from probekit.lens.exit_heads import ExitHead, pack_heads
from probekit.lens.lens import KINDS, Lens
from probekit.models.loaded import Loaded
from probekit.settings import Sampling
from probekit.traces.draft_vocabulary import DraftVocabulary
from probekit.traces.storage import TraceWriter
from probekit.traces.token_text import looped, spelled_bytes, visible
from probekit.traces.trace import Trace
from probekit.tracing.backend import Backend, HooksBackend, Reading
from probekit.tracing.backends import open_backend
from probekit.tracing.plan import MOST_ROWS, TracePlan, plan_trace
from probekit.tracing.prompts import Encoded, Prompt
from probekit.tracing.self_check import row_noise, self_check

TOP = 10  # places of the `top` table
_DRAFTER_CHUNK_BYTES = 64 * 2**20
Progress = Callable[..., None]


def trace(
    loaded: Loaded,
    prompts: Iterable[Prompt | str | Sequence[int] | Mapping[str, Any]] | None = None,
    folder: str | Path | None = None,
    *,
    max_new_tokens: int = 96,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    given: bool = False,
    statistics: str = "all",
    keep_residuals: Iterable[int] = (),
    draft_model: Loaded | str | Path | None = None,
    draft_vocabulary: DraftVocabulary | Trace | str | Path | Iterable[int] | None = None,
    exit_heads: Mapping[int, ExitHead] | str | Path | None = None,
    backend: str = "hooks",
    resume: bool = False,
    chat: bool = False,
    batch_size: int | None = None,
    top_prompts: int = 1,
    progress: Progress | None = None,
) -> Trace:
    """Continue each prompt with the model and read every layer of every token, once.

    Parameters
    ----------
    prompts: Prompts, texts or lists of token ids; the bundled set that suits the model by default.
    folder: of the run; None keeps the trace in memory.
    max_new_tokens: the budget M of each text.
    sampling: how the text is chosen; greedy by default.
    given: score the text that comes with the prompts (`response`, or all of a prompt) instead of generating one.
    statistics: "all", or "agreement" (final-norm lens only).
    keep_residuals: sites 0..L whose residuals are written as safetensors shards, rows as in the `tokens` table.
    draft_model: a drafter with the same tokenizer, read on the same text.
    draft_vocabulary: a trace (or its folder), whose most frequent tokens a draft head would keep first, or token ids in
        that order: `predict` then answers for heads of any number of rows. Greedy text only.
    exit_heads: {exit: head}, or a file of them (`probekit.lens.exit_heads`): the final-norm lens is read through them,
        so that predictions are for a decoder that drafts through them. They stay with the run.
    backend: "hooks" or "nnsight".
    resume: go on with the run in `folder`, by its own batch plan.
    chat: put plain prompts through the chat template, as a user's message.
    batch_size: most prompts in a batch; by default from the memory at hand.
    top_prompts: the first so many prompts get a table of their ten most probable tokens.
    progress: called as `progress(phase, done, total, tokens_per_second=..)`; done and total count prompts.

    Raises
    ------
    InputError: before any work and any file, for whatever cannot be used.
    SelfCheckError: when the lens at layer L does not reproduce the model's own logits, or logits are not finite.
    ResourceError: when not even one row fits into memory.
    """
    plan = plan_trace(
        loaded, prompts, max_new_tokens=max_new_tokens, sampling=sampling, given=given, statistics=statistics,
        keep_residuals=keep_residuals, draft_model=draft_model, draft_vocabulary=draft_vocabulary,
        exit_heads=exit_heads, backend=backend, chat=chat, batch_size=batch_size, top_prompts=top_prompts,
    )  # fmt: skip
    packed = None if plan.heads is None else pack_heads(plan.heads)
    writer = TraceWriter(folder, plan.manifest, resume=resume, exit_heads=packed)
    if writer.pending:
        run = _Run(plan, writer, open_backend(backend, loaded), progress or _silent)
        with torch.inference_mode():
            run.check_model()
            for part in writer.pending:
                texts = run.continue_prompts(part)
                run.read_layers(part, texts)
    return Trace.of_writer(writer)


def _silent(*_: Any, **__: Any) -> None:
    pass


@dataclass(frozen=True)
class _Text:
    """A prompt with its continuation: the sequence, P, and why it ended."""

    prompt: int
    sequence: tuple[int, ...]
    context: int
    ended: str

    @property
    def rows(self) -> int:
        return len(self.sequence) - 1

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.sequence[self.context :]


@dataclass
class _Piece:
    """What some rows gave. keys: prompt, position, output, input_id, text_id, each (rows,).

    draft_head: of the generated rows only, (layers + 1, generated rows) each.
    """

    keys: dict[str, np.ndarray]
    statistics: dict[str, Tensor]
    top: pd.DataFrame | None
    drafter: dict[str, Tensor] | None
    draft_head: dict[str, Tensor] | None
    residuals: dict[str, Tensor]


@dataclass
class _Run:
    """One run of a plan. The manifest's measurements grow with it."""

    plan: TracePlan
    writer: TraceWriter
    source: Backend
    progress: Progress
    token_texts: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loaded = self.plan.loaded
        self.parts = self.loaded.anatomy
        self.drafter = self.plan.drafter
        self.total = self.writer.manifest.prompt_count
        self.rounded = None if self.loaded.dtype == torch.float32 else self.loaded.dtype
        order = self.writer.manifest.settings.draft_vocabulary
        whole = None if order is None else torch.from_numpy(order.order(self.parts.vocabulary))
        self.draft_rows = None if whole is None else DraftRows(self.parts, whole, self.rounded, self.plan.heads)
        self.witnesses: AgreementSearch | None = None  # what agreement-only reading learned, from batch to batch
        self.seconds = dict(self.writer.manifest.measured.timings)

    # -- the model
    def check_model(self) -> None:
        """The lens at layer L must give the model's own logits, and every layer finite ones. Once, on one prompt."""
        first = self.plan.encoded[self.writer.manifest.plan.batches[self.writer.pending[0]][0]]
        ids = first.ids[: min(len(first.ids), self.writer.manifest.plan.segment_rows or len(first.ids))]
        inputs, rows = _padded([ids], self.loaded)
        with self.source:
            self_check(self.parts, self.source.read(inputs, rows))

    # -- the text
    def continue_prompts(self, part: int) -> list[_Text]:
        """The texts of one batch: given, or continued by the model, together, each to its own end."""
        batch = self.writer.manifest.plan.batches[part]
        encoded = [self.plan.encoded[index] for index in batch]
        if self.plan.given:
            return [_Text(one.prompt.index, one.ids, one.context, "given") for one in encoded]
        began, texts = perf_counter(), []
        for group in self._decoded(part, encoded):
            texts += group
            self._report("continuing prompts", part, len(texts), began, texts)
        self.seconds["generation_s"] += perf_counter() - began
        return texts

    def _decoded(self, part: int, todo: Sequence[Encoded]) -> Iterator[list[_Text]]:
        most = len(todo)
        while todo:
            group, failure = todo[:most], None
            try:
                decoded = Autoregressive(self.loaded).decode(
                    [one.ids for one in group],
                    max_new_tokens=self.writer.manifest.settings.max_new_tokens,
                    sampling=self.plan.sampling,
                    indices=[one.prompt.index for one in group],
                )
            except (ResourceError, RuntimeError, MemoryError) as error:
                failure = _out_of_memory(error)
            if failure is not None:
                if len(group) == 1:
                    raise ResourceError(f"not even prompt {group[0].prompt.index} alone can be continued: {failure}")
                most = len(group) // 2
                self._back_off(part, "continue", len(group), most)
                continue
            yield [
                _Text(one.prompt.index, (*one.ids, *text.tokens), len(one.ids), text.ended)
                for one, text in zip(group, decoded, strict=True)
            ]
            todo = todo[most:]

    # -- the layers
    def read_layers(self, part: int, texts: Sequence[_Text]) -> None:
        """Read every layer of one batch, and write the part."""
        began, pieces, done = perf_counter(), [], 0
        checks = self._measure_noise(texts)
        with self.source:
            for group, piece in self._read(part, texts):
                pieces += piece
                done += len(group)
                self._report("reading layers", part, done, began, texts[:done])
        frames = self._frames(texts, pieces)
        residuals = self._shard(pieces)
        self.seconds["trace_s"] += perf_counter() - began - checks
        self.seconds["tokens"] += sum(len(text.tokens) for text in texts)
        spared = None if self.witnesses is None else self.witnesses.savings.to_json()
        self.writer.update(timings=dict(self.seconds), savings=spared)
        self.writer.write(part, frames, residuals=residuals)

    def _measure_noise(self, texts: Sequence[_Text]) -> float:
        """Measure the noise, unless the manifest has it. Returns the seconds that it took."""
        began = perf_counter()
        if self.writer.manifest.measured.noise is None:
            ids = texts[0].sequence[:-1]
            self.writer.update(noise=row_noise(self.loaded, ids, self.parts.sites, self.plan.heads))
            if self.drafter is not None:
                self.writer.update(drafter_noise=row_noise(self.drafter, ids, [self.drafter.depth]))
        return perf_counter() - began

    def _read(self, part: int, texts: Sequence[_Text]) -> Iterator[tuple[Sequence[_Text], list[_Piece]]]:
        """Groups that fit into the row budget; where memory runs out, groups of half the rows."""
        limit = self._row_limit(part)
        while texts:
            group, failure = _that_fit(texts, limit), None
            rows = len(group) * max(text.rows for text in group)
            try:
                pieces = list(self._read_group(group, limit))
            except (RuntimeError, MemoryError) as error:
                failure = _out_of_memory(error)
            if failure is not None:
                limit = min(limit, rows) // 2
                if limit == 0:
                    raise ResourceError(f"not even one row fits into memory: {failure}")
                self._back_off(part, "read", rows, limit)
                continue
            yield group, pieces
            texts = texts[len(group) :]

    def _row_limit(self, part: int) -> int:
        manifest = self.writer.manifest
        earlier = [
            one["limit"] for one in manifest.measured.backoffs if one["phase"] == "read" and one["batch"] <= part
        ]
        return min([manifest.plan.segment_rows or MOST_ROWS, *earlier])

    def _back_off(self, part: int, phase: str, size: int, limit: int) -> None:
        if self.loaded.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        note = {"batch": part, "phase": phase, "size": size, "limit": limit}
        self.writer.update(backoffs=(*self.writer.manifest.measured.backoffs, note))

    def _read_group(self, group: Sequence[_Text], limit: int) -> Iterator[_Piece]:
        """One pass over left-padded texts; over one long text, as many segments as the limit asks for."""
        manifest = self.writer.manifest
        inputs, rows = _padded([text.sequence[:-1] for text in group], self.loaded)
        keys = _keys(group)
        drafting = None if self.drafter is None else HooksBackend(self.drafter)
        length = rows.shape[1] if len(group) > 1 else min(limit, rows.shape[1])
        caches = [_cache(reader, segmented=length < rows.shape[1]) for reader in (self.loaded, self.drafter)]
        for start in range(0, rows.shape[1], length):
            here = slice(start, start + length)
            cut = {name: values[:, here] for name, values in inputs.items() if name != "attention_mask"}
            if len(group) > 1:
                cut["attention_mask"] = inputs["attention_mask"]
            at = slice(start, start + length) if len(group) == 1 else slice(None)
            piece = {name: values[at] for name, values in keys.items()}
            reading = self.source.read({**cut, **caches[0]}, rows[:, here])
            drafted = None
            if drafting is not None:
                drafted = self._drafter_statistics(drafting.read({**cut, **caches[1]}, rows[:, here]), reading, piece)
            yield _Piece(
                keys=piece,
                statistics={name: values.cpu() for name, values in self._statistics(reading, piece).items()},
                top=self._top(reading, piece),
                drafter=drafted,
                draft_head=self._draft_head(reading, piece),
                residuals={
                    f"layer_{site}": reading.residuals[site].to("cpu", copy=True)
                    for site in manifest.settings.keep_residuals
                },
            )

    def _statistics(self, reading: Reading, keys: Mapping[str, np.ndarray], top: int = 0) -> dict[str, Tensor]:
        manifest = self.writer.manifest
        plan = StatisticsPlan(
            lenses=KINDS[: len(manifest.settings.lenses)],
            mode="agreement" if manifest.settings.statistics == "agreement" else "all",
            warp=self.plan.warp,
            rounded_dtype=self.rounded,
            noise=manifest.measured.noise or 0.0,
            top=top,
            heads=self.plan.heads,
        )
        if plan.mode == "agreement" and self.witnesses is None:
            before = manifest.measured.savings
            self.witnesses = AgreementSearch(self.parts, None if before is None else WorkSkipped.from_json(before))
        input_ids, text_ids = (_tensor(keys[name], self.loaded) for name in ("input_id", "text_id"))
        return layer_statistics(self.parts, reading.residuals, input_ids, text_ids, plan, witnesses=self.witnesses)

    def _top(self, reading: Reading, keys: Mapping[str, np.ndarray]) -> pd.DataFrame | None:
        """The most probable tokens, for the first prompts only."""
        manifest = self.writer.manifest
        first = sorted(self.plan.encoded)[: manifest.settings.top_prompts]
        chosen = np.isin(keys["prompt"], first)
        if not chosen.any():
            return None
        places = _tensor(np.flatnonzero(chosen), self.loaded)
        some = Reading(reading.residuals[:, places], reading.logits)
        mine = {name: values[chosen] for name, values in keys.items()}
        size = min(TOP, self.parts.vocabulary)
        found = self._statistics(some, mine, top=size)
        ids, shares = (found[name].cpu().numpy() for name in ("top_ids", "top_probabilities"))
        frame = _by_layer(mine, manifest.settings.lenses, self.parts.depth, repeated=size)
        frame["place"] = np.tile(np.arange(size, dtype=np.int8), len(frame) // size)
        frame["token"] = ids.ravel()
        frame["token_text"] = self._shown(ids.ravel())
        frame["probability"] = shares.ravel()
        return frame

    def _drafter_statistics(
        self, drafted: Reading, reading: Reading, keys: Mapping[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """The draft model on the target's text: (rows,) each."""
        assert self.drafter is not None
        lens, own = Lens(self.drafter.anatomy), Lens(self.parts)
        text_ids = _tensor(keys["text_id"], self.loaded)
        step = max(1, _DRAFTER_CHUNK_BYTES // (16 * self.parts.vocabulary))
        pieces = []
        for start in range(0, len(text_ids), step):
            here = slice(start, start + step)
            q = lens(drafted.residuals[-1, here], self.drafter.depth)
            # heads may be padded to different sizes: the decoder cuts or fills up the drafter's, too
            q = functional.pad(q, (0, self.parts.vocabulary - q.shape[-1]), value=float("-inf"))
            p = own(reading.residuals[-1, here], self.parts.depth)
            noise = self.writer.manifest.measured.drafter_noise or 0.0
            pieces.append(drafter_statistics(q, p, text_ids[here], self.plan.warp, noise, self.rounded))
        return {name: torch.cat([piece[name] for piece in pieces]).cpu() for name in pieces[0]}

    def _draft_head(self, reading: Reading, keys: Mapping[str, np.ndarray]) -> dict[str, Tensor] | None:
        """The sizes of a draft head at which each layer agrees, in the generated rows."""
        if self.draft_rows is None:
            return None
        generated = _tensor(np.flatnonzero(keys["output"] >= 0), self.loaded)
        found = self.draft_rows.read(reading.residuals[:, generated], self.writer.manifest.measured.noise or 0.0)
        return {name: values.cpu() for name, values in found.items()}

    # -- tables
    def _frames(self, texts: Sequence[_Text], pieces: Sequence[_Piece]) -> dict[str, pd.DataFrame]:
        manifest = self.writer.manifest
        tokens = pd.concat([pd.DataFrame(piece.keys) for piece in pieces], ignore_index=True)
        tokens["generated"] = tokens["output"] >= 0
        tokens["text"] = self._shown(tokens["text_id"].to_numpy())
        layers = []
        for piece in pieces:
            frame = _by_layer(piece.keys, manifest.settings.lenses, self.parts.depth)
            for name, values in piece.statistics.items():
                frame[name] = values.numpy().ravel()
            layers.append(frame)
        frames = {
            "texts": pd.DataFrame([self._text_row(text) for text in texts]),
            "tokens": tokens,
            "layers": pd.concat(layers, ignore_index=True),
        }
        if self.drafter is not None:
            frames["drafter"] = pd.concat(
                [
                    pd.DataFrame(
                        {name: piece.keys[name] for name in ("prompt", "position", "output")}
                        | {name: values.numpy() for name, values in (piece.drafter or {}).items()}
                    )
                    for piece in pieces
                ],
                ignore_index=True,
            )
        if self.draft_rows is not None:
            frames["draft_head"] = pd.concat(
                [_draft_head_frame(piece, self.parts.depth) for piece in pieces], ignore_index=True
            )
        if manifest.settings.top_prompts:
            tops = [piece.top for piece in pieces if piece.top is not None]
            empty = pd.DataFrame(columns=[*_by_layer_columns(), "place", "token", "token_text", "probability"])
            frames["top"] = pd.concat(tops, ignore_index=True) if tops else empty
        return frames

    def _text_row(self, text: _Text) -> dict[str, Any]:
        one = self.plan.encoded[text.prompt]
        return {
            "prompt": text.prompt,
            "kind": one.prompt.kind,
            "text": one.text or self._decoded_text(text.sequence[: text.context]),
            "continuation": self._continuation(text),
            "prompt_tokens": text.context,
            "new_tokens": len(text.tokens),
            "ended": text.ended,
            "looped": looped(text.tokens),
        }

    def _continuation(self, text: _Text) -> str:
        """The continuation as it reads after its prompt, special tokens left out."""
        whole, prompt = self._decoded_text(text.sequence), self._decoded_text(text.sequence[: text.context])
        return whole[len(prompt) :] if whole.startswith(prompt) else self._decoded_text(text.tokens)

    def _decoded_text(self, ids: Sequence[int]) -> str:
        tokenizer = self.loaded.tokenizer
        if tokenizer is None:
            return " ".join(map(str, ids))
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _shown(self, ids: np.ndarray) -> list[str]:
        """Each token's own text, white space made visible; its bytes where it is no whole character."""
        tokenizer = self.loaded.tokenizer
        for token in set(ids.tolist()) - set(self.token_texts):
            text = str(token)
            if tokenizer is not None:
                text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
                if not text or "\ufffd" in text:
                    text = spelled_bytes(str(tokenizer.convert_ids_to_tokens([token])[0]))
            self.token_texts[token] = visible(text)
        return [self.token_texts[token] for token in ids.tolist()]

    def _shard(self, pieces: Sequence[_Piece]) -> bytes | None:
        """Kept residuals, (rows, width) each, with the prompt and position of every row beside them."""
        if not self.writer.manifest.settings.keep_residuals:
            return None
        tensors = {
            name: torch.cat([piece.residuals[name] for piece in pieces]).contiguous() for name in pieces[0].residuals
        }
        for name in ("prompt", "position"):
            tensors[name] = torch.from_numpy(np.concatenate([piece.keys[name] for piece in pieces]))
        return safetensors.torch.save(tensors)

    def _report(self, phase: str, part: int, done: int, began: float, texts: Sequence[_Text]) -> None:
        before = sum(len(self.writer.manifest.plan.batches[other]) for other in range(part))
        tokens = sum(len(text.tokens) for text in texts)
        rate = tokens / max(perf_counter() - began, 1e-9)
        self.progress(phase, before + done, self.total, tokens_per_second=round(rate, 1))


def _that_fit(texts: Sequence[_Text], limit: int) -> Sequence[_Text]:
    """The first texts that together, padded, stay within the row limit; at least one."""
    longest = 0
    for count, text in enumerate(texts):
        longest = max(longest, text.rows)
        if count and longest * (count + 1) > limit:
            return texts[:count]
    return texts


def _padded(sequences: Sequence[Sequence[int]], loaded: Loaded) -> tuple[dict[str, Tensor], Tensor]:
    """Left-padded inputs with explicit positions and mask, and the places that are texts: (texts, longest) each."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = int(lengths.max())
    rows = torch.arange(longest) >= longest - lengths[:, None]
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    ids[rows] = torch.tensor([token for sequence in sequences for token in sequence])
    positions = (rows.long().cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": rows.long(), "position_ids": positions}
    return {name: values.to(loaded.device) for name, values in inputs.items()}, rows.to(loaded.device)


def _cache(reader: Loaded | None, *, segmented: bool) -> dict[str, Any]:
    if reader is None or not segmented:
        return {"use_cache": False}
    return {"use_cache": True, "past_key_values": DynamicCache(config=reader.model.config)}


def _tensor(values: np.ndarray, loaded: Loaded) -> Tensor:
    return torch.from_numpy(values).to(loaded.device).long()


def _keys(group: Sequence[_Text]) -> dict[str, np.ndarray]:
    """What each row is, text after text: (rows,) int32 each."""
    position = [np.arange(text.rows) for text in group]
    columns: dict[str, list[Any]] = {
        "prompt": [np.full(text.rows, text.prompt) for text in group],
        "position": position,
        "output": [at - (text.context - 1) for at, text in zip(position, group, strict=True)],
        "input_id": [text.sequence[:-1] for text in group],
        "text_id": [text.sequence[1:] for text in group],
    }
    return {name: np.concatenate(values).astype(np.int32) for name, values in columns.items()}


def _by_layer_columns() -> tuple[str, ...]:
    return ("prompt", "position", "output", "lens", "layer")


def _by_layer(keys: Mapping[str, np.ndarray], lenses: Sequence[str], depth: int, repeated: int = 1) -> pd.DataFrame:
    """The keys of (lenses, layers, rows, repeated) figures, flattened."""
    shape = {"lens": len(lenses), "layer": depth + 1, "row": len(keys["prompt"]), "again": repeated}
    columns: dict[str, Any] = {
        name: repeat(keys[name], "row -> (lens layer row again)", **shape) for name in ("prompt", "position", "output")
    }
    lens = repeat(np.arange(len(lenses)), "lens -> (lens layer row again)", **shape)
    columns["lens"] = pd.Categorical.from_codes(lens, dtype=pd.CategoricalDtype(list(lenses)))
    columns["layer"] = repeat(np.arange(depth + 1, dtype=np.int16), "layer -> (lens layer row again)", **shape)
    return pd.DataFrame(columns)


def _draft_head_frame(piece: _Piece, depth: int) -> pd.DataFrame:
    generated = piece.keys["output"] >= 0
    keys = {name: values[generated] for name, values in piece.keys.items()}
    figures = {name: values.numpy().ravel() for name, values in (piece.draft_head or {}).items()}
    return _by_layer(keys, KINDS[:1], depth).drop(columns="lens").assign(**figures)


def _out_of_memory(error: BaseException) -> str:
    """The first line of an out-of-memory error; any other error is raised again."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    known = isinstance(error, torch.OutOfMemoryError | MemoryError | ResourceError)
    if known or any(words in text.lower() for words in ("out of memory", "can't allocate memory", "not enough memory")):
        return text
    raise error


def drafter_statistics(
    q: Tensor,
    p: Tensor,
    text_ids: Tensor,
    warping: Callable[[Tensor], Tensor] | None,
    noise: float,
    rounded_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """A draft model's figures beside the model's: (rows,) each.

    q, p: (rows, vocabulary) float32, logits of the draft model and of the model. text_ids: (rows,), the text's next
    token. `overlap` is the sum of min(p, q) and `accept_probability` min(1, q / p) of that token, both after
    `warping` (temperature 1 without it, and then without the latter).
    """
    argmax, model = q.argmax(-1), p.argmax(-1)
    best = q.topk(2, dim=-1).values
    mine = q.gather(-1, model[:, None])[:, 0]
    others = q.scatter(-1, model[:, None], -torch.inf).amax(-1)
    log_q, log_p = (x.log_softmax(-1) if warping is None else warping(x) for x in (q, p))
    found = {
        "argmax": argmax.int(),
        "agrees": argmax == model,
        "margin": best[:, 0] - best[:, 1],
        "near_tie": (mine - others).abs() < noise,
        "overlap": torch.minimum(log_q.exp(), log_p.exp()).sum(-1),
    }
    if warping is not None:
        text_q, text_p = (x.gather(-1, text_ids[:, None])[:, 0] for x in (log_q, log_p))
        found["accept_probability"] = torch.where(text_q.isneginf(), 0.0, (text_q - text_p).clamp(max=0).exp())
    if rounded_dtype is not None:
        found["argmax_rounded"] = q.to(rounded_dtype).argmax(-1).int()
        found["agrees_rounded"] = q.to(rounded_dtype).argmax(-1) == p.to(rounded_dtype).argmax(-1)
    return found
