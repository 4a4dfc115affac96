"""`trace`: prompts -> their continuation -> one teacher-forced pass -> a Trace.

First a plan, with every check that needs no forward pass; then the model is checked; then, batch by batch of the plan,
the texts are generated, every layer of every row is read, and one part of the trace is written.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from probekit.lens.discovered import check_discovered
from probekit.lens.exit_heads import ExitHead, pack_heads
from probekit.lens.noise import Noise
from probekit.models.loaded import Loaded, as_loaded
from probekit.progress import Progress, usual_progress
from probekit.ranks import Ranks, joined
from probekit.settings import KeptResiduals, Sampling, TraceSettings
from probekit.traces.draft_vocabulary import DraftVocabulary
from probekit.traces.shared_run import writing_together
from probekit.traces.storage import TraceWriter
from probekit.traces.trace import Trace
from probekit.tracing.backend import Backend
from probekit.tracing.backends import open_backend
from probekit.tracing.block_backend import invariant_noise
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
    batch_invariant: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
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
    backend: "hooks" or "nnsight"; "nnsight:ndif" where NDIF runs the model, "nnsight:http://.." another service of its
        kind, "nnsight:local" nnsight's simulation of one.
    resume: go on with the run in `folder`, by its own batch plan.
    chat: put plain prompts through the chat template, as a user's message.
    batch_size: most prompts in a batch; by default from the memory at hand.
    top_prompts: the first so many prompts get a table of their ten most probable tokens.
    skip_long: leave out prompts that do not fit into the context, instead of refusing all.
    logged: the prompts come out of another system's log (`load_log`), with the text that this very model wrote there:
        it is read as the model's own, and each token is checked. Where some are not what the model writes here,
        they are counted in the manifest, and predictions are no longer called exact.
    batch_invariant: write and read the texts so that no row depends, bit for bit, on how many are computed with it,
        as a model of `probekit.batch_invariant` always does: near-ties then decide nothing.
    ranks: the processes that share this run, each of which makes this same call (`Ranks.of_environment()` under
        torchrun); the trace does not depend on their number. Of a model that is split over them (`load(..,
        tensor_parallel=True)`), all read everything, and the first writes: `replace(ranks, in_step=True)`.
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
        batch_invariant=batch_invariant,
    )  # fmt: skip
    with joined(ranks) as ranks:
        plan = ranks.agreed(
            lambda: plan_trace(
                as_loaded(loaded), prompts, settings, draft_model=draft_model, draft_vocabulary=draft_vocabulary,
                exit_heads=exit_heads,
            )
        )  # fmt: skip
        packed = None if plan.heads is None else pack_heads(plan.heads)
        with writing_together(folder, plan.manifest, ranks, resume=resume, exit_heads=packed) as writer:
            if writer.pending or writer.manifest.measured.noise is None:
                run = TraceRun(plan, writer, open_backend(backend, plan.loaded), usual_progress(progress), ranks)
                with torch.inference_mode():
                    run.go()
        return Trace.of_writer(writer)


class TraceRun:
    """One run of a plan, or this process's share of it: the phases of each part."""

    def __init__(self, plan: TracePlan, writer: TraceWriter, source: Backend, progress: Progress, ranks: Ranks) -> None:
        self.plan = plan
        self.writer = writer
        self.source = source
        self.progress = progress
        self.ranks = ranks
        self.reader = LayerReader(plan, source)
        self.tables = PartTables(plan.manifest, plan.loaded.tokenizer, plan.encoded)
        self.before = [0, *accumulate(map(len, writer.manifest.plan.batches))]  # prompts of the parts before each
        self.seconds: dict[str, float] = {}  # of the part at hand

    def go(self) -> None:
        """Every part that is this process's. The noise is measured before any is written, in one process for all."""
        measured = self.writer.manifest.measured.noise is not None
        parts = self.writer.pending
        if parts:
            self.check_model()
        elif not measured:
            self.hear_noise(())
        for number, part in enumerate(parts):
            self.seconds = {"generation_s": 0.0, "trace_s": 0.0, "tokens": 0}
            texts = self.continue_prompts(part)
            if not measured and number == 0:
                self.hear_noise(texts)
            self.read_layers(part, texts)

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

    def hear_noise(self, texts: Sequence[ContinuedText]) -> None:
        """Measure the noise on the first text of the run; every process hears of it before it writes a part."""
        found = dict[str, Any]()
        if (self.ranks.first or self.ranks.in_step) and texts:
            found = self._noise(texts[0].sequence[:-1])
        if self.ranks.first and texts:
            self.writer.update(**found)
            if self.ranks.size > 1:
                self.writer.begin()  # others write from now on
        heard = self.ranks.from_first(found)
        if not self.ranks.first:
            self.writer.update(**heard)

    def _noise(self, ids: Sequence[int]) -> dict[str, Any]:
        """As the manifest has it."""
        loaded, drafter = self.plan.loaded, self.plan.drafter

        def of(reader: Loaded, *reading: Any) -> Noise:
            return invariant_noise(reader, ids) if loaded.anatomy.batch_invariant else row_noise(reader, ids, *reading)

        own = of(loaded, loaded.anatomy.sites, self.plan.heads)
        found = {"noise": max(own.by_site), "noise_by_layer": own.by_site, "noise_rounding": own.rounding}
        return found if drafter is None else found | {"drafter_noise": of(drafter, [drafter.depth]).by_site[-1]}

    def read_layers(self, part: int, texts: Sequence[ContinuedText]) -> None:
        """Read every layer of one batch, and write the part."""
        began, blocks, done = perf_counter(), list[RowBlock](), 0
        manifest, back_off = self.writer.manifest, partial(self._back_off, part, "read")
        with self.source:
            for group, found in self.reader.read(texts, manifest, self._row_limit(part), back_off):
                blocks += found
                done += len(group)
                self._report("reading layers", part, done, began, texts[:done])
        logged = self._account(part, blocks) if self.plan.logged else None
        frames = self.tables.frames(texts, blocks)
        residuals = self.tables.shard(blocks)
        self.seconds["trace_s"] += perf_counter() - began
        self.seconds["tokens"] += sum(len(text.tokens) for text in texts)
        measured = {"seconds": self.seconds, "savings": self.reader.work_skipped()}
        if part in self.writer.remade:  # a damaged part was counted when it was made first
            measured = {}
        self.writer.write(part, frames, residuals=residuals, logged=logged, **measured)

    def _account(self, part: int, blocks: Sequence[RowBlock]) -> Mapping[str, Any]:
        """How many of a log's tokens are the model's own; refused before a part is written where they are too few."""
        below = torch.cat([block.gaps for block in blocks if block.gaps is not None])
        return account(part, below, self.plan.loaded.name, self.plan.manifest.provenance.prompts_source)

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
        self.writer.back_off(note)

    def _report(self, phase: str, part: int, done: int, began: float, texts: Sequence[ContinuedText]) -> None:
        tokens = sum(len(text.tokens) for text in texts)
        rate = tokens / max(perf_counter() - began, 1e-9)
        self.progress(phase, self.before[part] + done, self.before[-1], tokens_per_second=round(rate, 1))
