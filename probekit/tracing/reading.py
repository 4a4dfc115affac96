"""One teacher-forced pass over a batch of texts: the figures of every layer of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from probekit.decoding.batch_invariant import in_blocks, tokens_at_once
from probekit.errors import ResourceError
from probekit.lens.agreement import AgreementSearch
from probekit.lens.chunked import StatisticsPlan, layer_statistics
from probekit.lens.draft_rows import DraftRows
from probekit.lens.lens import KINDS, Lens
from probekit.lens.noise import Noise
from probekit.lens.work_skipped import WorkSkipped
from probekit.models.anatomy import Anatomy
from probekit.models.family import CACHE
from probekit.models.in_blocks import InBlocks
from probekit.models.loaded import Loaded
from probekit.traces.manifest import Manifest
from probekit.traces.residuals import kept_rows
from probekit.tracing.backend import Backend, Reading
from probekit.tracing.backends import open_backend
from probekit.tracing.continuation import BackOff, ContinuedText, out_of_memory
from probekit.tracing.logged_text import gaps
from probekit.tracing.plan import TracePlan

TOP = 10  # places of the `top` table
_DRAFTER_CHUNK_BYTES = 64 * 2**20


class TopTokens(NamedTuple):
    """The most probable tokens of some rows. keys: as in RowBlock; ids, shares: (lenses, layers + 1, rows, places)."""

    keys: dict[str, np.ndarray]
    ids: np.ndarray
    shares: np.ndarray


@dataclass
class RowBlock:
    """The figures of some rows. keys: prompt, position, output, input_id, text_id, each (rows,).

    statistics: (lenses, layers + 1, rows) each. top: of the first prompts only. drafter: (rows,) each.
    draft_head: of the generated rows only, (layers + 1, generated rows) each.
    residuals: {"layer_l": (kept rows, width)}, and the prompt and position of those rows.
    gaps: of text out of a log, (generated rows,): how far its tokens lie below the model's own.
    """

    keys: dict[str, np.ndarray]
    statistics: dict[str, Tensor]
    top: TopTokens | None
    drafter: dict[str, Tensor] | None
    draft_head: dict[str, Tensor] | None
    residuals: dict[str, Tensor]
    gaps: Tensor | None = None


class LayerReader:
    """Reads the batches of one run. What agreement-only reading learns is kept from batch to batch."""

    def __init__(self, plan: TracePlan, source: Backend) -> None:
        self.plan = plan
        self.source = source
        self.loaded, self.drafter = plan.loaded, plan.drafter
        self.parts = as_decoded(plan.loaded)
        self.heads: Mapping[int, Callable[[Tensor], Tensor]] | None = plan.heads
        if plan.heads is not None and plan.loaded.anatomy.batch_invariant:
            rows = tokens_at_once(plan.loaded.anatomy)
            self.heads = {exit_layer: InBlocks(head, rows) for exit_layer, head in plan.heads.items()}
        self.rounded = None if self.loaded.dtype == torch.float32 else self.loaded.dtype
        order = plan.manifest.settings.draft_vocabulary
        whole = None if order is None else torch.from_numpy(order.order(self.parts.vocabulary))
        self.draft_rows = None if whole is None else DraftRows(self.parts, whole, self.rounded, plan.heads)
        self.search: AgreementSearch | None = None
        self._told = WorkSkipped()
        self._first = sorted(plan.encoded)[: plan.manifest.settings.top_prompts]

    def read(
        self, texts: Sequence[ContinuedText], manifest: Manifest, limit: int, back_off: BackOff
    ) -> Iterator[tuple[Sequence[ContinuedText], list[RowBlock]]]:
        """Groups of texts that fit into `limit` rows; where memory runs out, groups of half the rows.

        manifest: of the run as it stands, with the noise. Raises ResourceError where not even one row fits.
        """
        while texts:
            group, failure = _that_fit(texts, limit), None
            rows = len(group) * max(text.rows for text in group)
            try:
                blocks = list(self._read_group(group, manifest, limit))
            except (RuntimeError, MemoryError) as error:
                failure = out_of_memory(error)
            if failure is not None:
                limit = min(limit, rows) // 2
                if limit == 0:
                    raise ResourceError(f"not even one row fits into memory: {failure}")
                back_off(rows, limit)
                continue
            yield group, blocks
            texts = texts[len(group) :]

    def _read_group(self, group: Sequence[ContinuedText], manifest: Manifest, limit: int) -> Iterator[RowBlock]:
        """One pass over left-padded texts; over one long text, as many segments as the limit asks for."""
        inputs, rows = padded([text.sequence[:-1] for text in group], self.loaded)
        keys = _keys(group)
        drafting = None if self.drafter is None else open_backend("hooks", self.drafter)
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
            if drafting is not None and self.drafter is not None:
                drafted = self._of_drafter(
                    self.drafter, drafting.read({**cut, **caches[1]}, rows[:, here]), reading, piece, manifest
                )
            yield RowBlock(
                keys=piece,
                statistics={name: values.cpu() for name, values in self._statistics(reading, piece, manifest).items()},
                top=self._top(reading, piece, manifest),
                drafter=drafted,
                draft_head=self._draft_head(reading, piece, manifest),
                residuals=self._kept(reading, piece, manifest),
                gaps=self._gaps(reading, piece) if self.plan.logged else None,
            )

    def _kept(self, reading: Reading, keys: Mapping[str, np.ndarray], manifest: Manifest) -> dict[str, Tensor]:
        """The residuals that the run keeps of these rows, with the prompt and position of each."""
        settings = manifest.settings
        if not settings.keep_residuals:
            return {}
        rows = kept_rows(keys, settings.residual_rows, settings.residual_share, settings.seed)
        places = tensor_of(np.flatnonzero(rows), self.loaded)
        dtype = getattr(torch, settings.residual_dtype or str(reading.residuals.dtype).removeprefix("torch."))
        found = {name: torch.from_numpy(keys[name][rows]) for name in ("prompt", "position")}
        for site in settings.keep_residuals:
            found[f"layer_{site}"] = reading.residuals[site].index_select(0, places).to(device="cpu", dtype=dtype)
        return found

    def work_skipped(self) -> dict[str, float] | None:
        """What the witnesses spared since this was asked last; None with all statistics."""
        if self.search is None:
            return None
        before, self._told = self._told, self.search.savings
        return self._told.since(before).to_json()

    def _statistics(
        self, reading: Reading, keys: Mapping[str, np.ndarray], manifest: Manifest, top: int = 0
    ) -> dict[str, Tensor]:
        plan = StatisticsPlan(
            lenses=KINDS[: len(manifest.settings.lenses)],
            mode="agreement" if manifest.settings.statistics == "agreement" else "all",
            warp=self.plan.warp,
            rounded_dtype=self.rounded,
            noise=manifest.measured.tolerance,
            top=top,
            heads=self.heads,
        )
        if plan.mode == "agreement" and self.search is None and not self.parts.changes_logits:
            self.search = AgreementSearch(self.parts)
        input_ids, text_ids = (tensor_of(keys[name], self.loaded) for name in ("input_id", "text_id"))
        return layer_statistics(self.parts, reading.residuals, input_ids, text_ids, plan, witnesses=self.search)

    def _top(self, reading: Reading, keys: Mapping[str, np.ndarray], manifest: Manifest) -> TopTokens | None:
        """The most probable tokens, for the first prompts only."""
        chosen = np.isin(keys["prompt"], self._first)
        if not chosen.any():
            return None
        places = tensor_of(np.flatnonzero(chosen), self.loaded)
        some = Reading(reading.residuals[:, places], reading.logits)
        mine = {name: values[chosen] for name, values in keys.items()}
        found = self._statistics(some, mine, manifest, top=min(TOP, self.parts.vocabulary))
        return TopTokens(mine, *(found[name].cpu().numpy() for name in ("top_ids", "top_probabilities")))

    def _of_drafter(
        self, drafter: Loaded, drafted: Reading, reading: Reading, keys: Mapping[str, np.ndarray], manifest: Manifest
    ) -> dict[str, Tensor]:
        """The draft model on the target's text: (rows,) each."""
        lens, own = Lens(as_decoded(drafter)), Lens(self.parts)
        text_ids = tensor_of(keys["text_id"], self.loaded)
        step = max(1, _DRAFTER_CHUNK_BYTES // (16 * self.parts.vocabulary))
        pieces = []
        for start in range(0, len(text_ids), step):
            here = slice(start, start + step)
            q = lens(drafted.residuals[-1, here], drafter.depth)
            # heads may be padded to different sizes: the decoder cuts or fills up the drafter's, too
            q = functional.pad(q, (0, self.parts.vocabulary - q.shape[-1]), value=float("-inf"))
            p = own(reading.residuals[-1, here], self.parts.depth)
            noise = Noise((manifest.measured.drafter_noise or 0.0,), manifest.measured.noise_rounding)
            pieces.append(drafter_statistics(q, p, text_ids[here], self.plan.warp, noise, self.rounded))
        return {name: torch.cat([piece[name] for piece in pieces]).cpu() for name in pieces[0]}

    def _gaps(self, reading: Reading, keys: Mapping[str, np.ndarray]) -> Tensor:
        generated = tensor_of(np.flatnonzero(keys["output"] >= 0), self.loaded)
        text_ids = tensor_of(keys["text_id"], self.loaded)[generated]
        own = reading.residuals[-1, generated]
        return gaps(self.parts, own, text_ids, self.plan.warp, self.rounded).cpu()

    def _draft_head(
        self, reading: Reading, keys: Mapping[str, np.ndarray], manifest: Manifest
    ) -> dict[str, Tensor] | None:
        """The sizes of a draft head at which each layer agrees, in the generated rows."""
        if self.draft_rows is None:
            return None
        generated = tensor_of(np.flatnonzero(keys["output"] >= 0), self.loaded)
        found = self.draft_rows.read(reading.residuals[:, generated], manifest.measured.tolerance)
        return {name: values.cpu() for name, values in found.items()}


def as_decoded(loaded: Loaded) -> Anatomy:
    """The parts of a model with norm and head as its decoder calls them: in blocks, where it is batch-invariant."""
    parts = loaded.anatomy
    return in_blocks(parts) if parts.batch_invariant else parts


def _that_fit(texts: Sequence[ContinuedText], limit: int) -> Sequence[ContinuedText]:
    """The first texts that together, padded, stay within the row limit; at least one."""
    longest = 0
    for count, text in enumerate(texts):
        longest = max(longest, text.rows)
        if count and longest * (count + 1) > limit:
            return texts[:count]
    return texts


def padded(sequences: Sequence[Sequence[int]], loaded: Loaded) -> tuple[dict[str, Tensor], Tensor]:
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
    return {"use_cache": True, CACHE: DynamicCache(config=reader.model.config)}


def tensor_of(values: np.ndarray, loaded: Loaded) -> Tensor:
    return torch.from_numpy(values).to(loaded.device).long()


def _keys(group: Sequence[ContinuedText]) -> dict[str, np.ndarray]:
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


def drafter_statistics(
    q: Tensor,
    p: Tensor,
    text_ids: Tensor,
    warping: Callable[[Tensor], Tensor] | None,
    noise: Noise,
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
        "near_tie": (mine - others).abs() < noise.around(mine.new_tensor(noise.by_site[-1]), mine),
        "overlap": torch.minimum(log_q.exp(), log_p.exp()).sum(-1),
    }
    if warping is not None:
        text_q, text_p = (x.gather(-1, text_ids[:, None])[:, 0] for x in (log_q, log_p))
        found["accept_probability"] = torch.where(text_q.isneginf(), 0.0, (text_q - text_p).clamp(max=0).exp())
    if rounded_dtype is not None:
        found["argmax_rounded"] = q.to(rounded_dtype).argmax(-1).int()
        found["agrees_rounded"] = q.to(rounded_dtype).argmax(-1) == p.to(rounded_dtype).argmax(-1)
    return found
