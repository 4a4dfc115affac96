"""`trace`: prompts -> their continuation -> one teacher-forced pass -> a Trace.

First a plan, with every check that needs no forward pass; then the model is checked; then, batch by batch of the plan,
the texts are generated, every layer of every row is read, and one part of the trace is written.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from probekit.lens.discovered import check_discovered
from probekit.lens.exit_heads import ExitHead, pack_heads
from probekit.models.loaded import Loaded, as_loaded
from probekit.progress import Progress, usual_progress
from probekit.settings import KeptResiduals, Sampling, TraceSettings
from probekit.traces.draft_vocabulary import DraftVocabulary
from probekit.traces.storage import TraceWriter, writing_run
from probekit.traces.trace import Trace
from probekit.tracing.backend import Backend
from probekit.tracing.backends import open_backend
from probekit.tracing.continuation import ContinuedText, continued
from probekit.tracing.logged_text import account
from probekit.tracing.part_tables import PartTables
from probekit.tracing.plan import MOST_ROWS, TracePlan, plan_trace
from probekit.tracing.prompts import Prompt
from probekit.tracing.reading import LayerReader, RowBlock, padded
from probekit.tracing.self_check import row_noise, self_check


def trace(
    loaded: Loaded | str | Path,
    prompts: Iterable[Prompt | str | Sequence[int] | Mapping[str, Any]] | None = None,
    folder: str | Path | None = None,
    *,
    max_new_tokens: int = 96,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    given: bool = False,
    statistics: str = "all",
    keep_residuals: Iterable[int] | str | KeptResiduals = (),
    draft_model: Loaded | str | Path | None = None,
    draft_vocabulary: DraftVocabulary | Trace | str | Path | Iterable[int] | None = None,
    exit_heads: Mapping[int, ExitHead] | str | Path | None = None,
    backend: str = "hooks",
    resume: bool = False,
    chat: bool = False,
    batch_size: int | None = None,
    top_prompts: int = 1,
    skip_long: bool = False,
    logged: bool = False,
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
    keep_residuals: sites 0..L whose residuals are written beside the tables, "all" of them, or a `KeptResiduals` that
        also says of which rows and in which precision.
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
    skip_long: leave out prompts that do not fit into the context, instead of refusing all.
    logged: the prompts come out of another system's log (`load_log`), with the text that this very model wrote there:
        it is read as the model's own, and each token is checked. Where some are not what the model writes here,
        they are counted in the manifest, and predictions are no longer called exact.
    progress: called as `progress(phase, done, total, tokens_per_second=..)`; done and total count prompts.

    Raises
    ------
    InputError: before any work and any file, for whatever cannot be used.
    SelfCheckError: when the lens at layer L does not reproduce the model's own logits, or logits are not finite.
    ResourceError: when not even one row fits into memory.

    Examples
    --------
    >>> import probekit
    >>> trace = probekit.trace("tales-tied", ["Once upon a time", "The king"], max_new_tokens=8)
    >>> trace
    Trace(tales-tied, 2 prompts, 16 greedy tokens, in memory)
    >>> trace.agreement(0).shape  # (layers + 1, generated tokens)
    (13, 8)
    """
    settings = TraceSettings(
        max_new_tokens=max_new_tokens, sampling=sampling, given=given, statistics=statistics,
        keep_residuals=KeptResiduals.of(keep_residuals), backend=backend, chat=chat, batch_size=batch_size,
        top_prompts=top_prompts, skip_long=skip_long, logged=logged,
    )  # fmt: skip
    loaded = as_loaded(loaded)
    plan = plan_trace(
        loaded, prompts, settings, draft_model=draft_model, draft_vocabulary=draft_vocabulary, exit_heads=exit_heads
    )
    packed = None if plan.heads is None else pack_heads(plan.heads)
    with writing_run(folder, plan.manifest, resume=resume, exit_heads=packed) as writer:
        if writer.pending:
            run = TraceRun(plan, writer, open_backend(backend, loaded), usual_progress(progress))
            with torch.inference_mode():
                run.check_model()
                for part in writer.pending:
                    texts = run.continue_prompts(part)
                    run.read_layers(part, texts)
    return Trace.of_writer(writer)


class TraceRun:
    """One run of a plan: the phases of each part. The manifest's measurements grow with it."""

    def __init__(self, plan: TracePlan, writer: TraceWriter, source: Backend, progress: Progress) -> None:
        self.plan = plan
        self.writer = writer
        self.source = source
        self.progress = progress
        self.reader = LayerReader(plan, source)
        self.tables = PartTables(plan.manifest, plan.loaded.tokenizer, plan.encoded)
        self.seconds = dict(writer.manifest.measured.timings)

    def check_model(self) -> None:
        """The lens at layer L must give the model's own logits, and every layer finite ones. Once, on one prompt."""
        for reader in (self.plan.loaded, self.plan.drafter):
            if reader is not None:
                check_discovered(reader.anatomy)
        batches = self.writer.manifest.plan
        first = self.plan.encoded[batches.batches[self.writer.pending[0]][0]]
        ids = first.ids[: min(len(first.ids), batches.segment_rows or len(first.ids))]
        inputs, rows = padded([ids], self.plan.loaded)
        with self.source:
            self_check(self.plan.loaded.anatomy, self.source.read(inputs, rows))

    def continue_prompts(self, part: int) -> list[ContinuedText]:
        """The texts of one batch."""
        encoded = [self.plan.encoded[index] for index in self.writer.manifest.plan.batches[part]]
        began, texts = perf_counter(), list[ContinuedText]()
        for group in continued(self.plan, encoded, partial(self._back_off, part, "continue")):
            texts += group
            if not self.plan.written:
                self._report("continuing prompts", part, len(texts), began, texts)
        if not self.plan.written:
            self.seconds["generation_s"] += perf_counter() - began
        return texts

    def read_layers(self, part: int, texts: Sequence[ContinuedText]) -> None:
        """Read every layer of one batch, and write the part."""
        began, blocks, done = perf_counter(), list[RowBlock](), 0
        checks = self._measure_noise(texts)
        manifest, back_off = self.writer.manifest, partial(self._back_off, part, "read")
        with self.source:
            for group, found in self.reader.read(texts, manifest, self._row_limit(part), back_off):
                blocks += found
                done += len(group)
                self._report("reading layers", part, done, began, texts[:done])
        logged = self._account(part, blocks) if self.plan.logged else ()
        frames = self.tables.frames(texts, blocks)
        residuals = self.tables.shard(blocks)
        self.seconds["trace_s"] += perf_counter() - began - checks
        self.seconds["tokens"] += sum(len(text.tokens) for text in texts)
        skipped = None if self.reader.search is None else self.reader.search.savings.to_json()
        measured = {"timings": dict(self.seconds), "savings": skipped}
        if part in self.writer.remade:  # a damaged part was counted when it was made first
            measured, self.seconds = {}, dict(self.writer.manifest.measured.timings)
        self.writer.write(part, frames, residuals=residuals, logged=logged, **measured)

    def _account(self, part: int, blocks: Sequence[RowBlock]) -> tuple[Mapping[str, Any], ...]:
        """How many of a log's tokens are the model's own; refused before a part is written where they are too few."""
        below = torch.cat([block.gaps for block in blocks if block.gaps is not None])
        mine = account(part, below, self.plan.loaded.name, self.plan.manifest.provenance.prompts_source)
        before = [each for each in self.writer.manifest.measured.logged if each["batch"] != part]
        return (*before, mine)

    def _measure_noise(self, texts: Sequence[ContinuedText]) -> float:
        """Measure the noise, unless the manifest has it. Returns the seconds that it took."""
        began = perf_counter()
        loaded, drafter = self.plan.loaded, self.plan.drafter
        if self.writer.manifest.measured.noise is None:
            ids = texts[0].sequence[:-1]
            self.writer.update(noise=row_noise(loaded, ids, loaded.anatomy.sites, self.plan.heads))
            if drafter is not None:
                self.writer.update(drafter_noise=row_noise(drafter, ids, [drafter.depth]))
        return perf_counter() - began

    def _row_limit(self, part: int) -> int:
        """Rows that one pass reads: those of the plan, or fewer where memory ran out before."""
        manifest = self.writer.manifest
        earlier = [
            one["limit"] for one in manifest.measured.backoffs if one["phase"] == "read" and one["batch"] <= part
        ]
        return min([manifest.plan.segment_rows or MOST_ROWS, *earlier])

    def _back_off(self, part: int, phase: str, size: int, limit: int) -> None:
        if self.plan.loaded.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        note = {"batch": part, "phase": phase, "size": size, "limit": limit}
        self.writer.update(backoffs=(*self.writer.manifest.measured.backoffs, note))

    def _report(self, phase: str, part: int, done: int, began: float, texts: Sequence[ContinuedText]) -> None:
        before = sum(len(self.writer.manifest.plan.batches[other]) for other in range(part))
        tokens = sum(len(text.tokens) for text in texts)
        rate = tokens / max(perf_counter() - began, 1e-9)
        self.progress(phase, before + done, self.writer.manifest.prompt_count, tokens_per_second=round(rate, 1))
