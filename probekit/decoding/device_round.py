"""A whole round as work of the device alone, on buffers that never move: what can be recorded once and replayed.

Where every row stands, its last token and what each round did are kept on the device. No shape depends on what a
number turns out to be, nothing is asked of the device on the way, and no array grows. So a round that is recorded into
a graph is right wherever the rows have come to, as long as they lie within the slots that it sees.

The host reads what rounds did when it likes. It knows the least and the most that each may have moved, and chooses the
slots that the next one sees from that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probekit.decoding.batch import DecodeBatch
from probekit.decoding.caches import PassPositions
from probekit.decoding.engine import Engine, bucket
from probekit.decoding.sampling import Sampler, judged, scatter
from probekit.drafting.proposers import DraftHead
from probekit.errors import InputError
from probekit.hooks.fused_layers import copied_bytes, fused_head, fused_layers, reading_of
from probekit.hooks.sites import unreplayable_hooks
from probekit.models.anatomy import Anatomy
from probekit.models.memory import free_bytes

MOST_AT_ONCE = 64  # rows of states that share a fused head: beyond them the plain product wins


@dataclass(frozen=True, eq=False)
class DevicePositions:
    """Where the tokens of a pass by fused kernels stand, which need no more: (rows, tokens) int64, below `visible`."""

    positions: Tensor
    visible: int


class DeviceEngine(Engine):
    """An engine whose positions are a tensor on the device.

    fused: whether its passes run by fused kernels (`hooks.fused_layers`); by default on a CUDA device, where they know
    the model to the letter and there is memory for their copies of weights. Then `fused` is there, else it is None.

    Raises InputError for a model with hooks that a replay would not call; those of `Capture(into=buffer)` are device
    work like the rest.
    """

    def __init__(self, parts: Anatomy, rows: int, length: int, fused: bool | None = None) -> None:
        if hooked := unreplayable_hooks(parts.model):
            raise InputError(
                f"there is a hook, or a replaced forward, on {', '.join(hooked[:3])}: it would fire while a round is "
                "recorded, and never again when it is replayed.",
                "Use Capture(model, sites, into=buffer), or decode without recording.",
            )
        super().__init__(parts, rows, bucket(length))
        wanted = parts.device.type == "cuda" and _has_room(parts) if fused is None else fused
        self.fused = fused_layers(parts, self._kinds, self._rotary) if wanted else None
        self._best = None
        if self.fused is not None:
            norm: Any = self.fused.norm
            self.parts = replace(self.parts, norm=norm)
            self._best = fused_head(parts)

    def places_at(self, positions: Tensor, visible: int) -> PassPositions | DevicePositions:
        """positions: (rows, tokens) int64 on the device, below `visible`, a number of slots that the host chooses."""
        if self.fused is not None:
            return DevicePositions(positions, visible)
        return self.masked_places_at(positions, visible)

    def masked_places_at(self, positions: Tensor, visible: int) -> PassPositions:
        """The same for the model's own layers, which take masks and rotary embeddings."""
        rotary = {kind: (cos[0][positions], sin[0][positions]) for kind, (cos, sin) in self._rotary.items()}
        return self._pass_positions(positions, visible, rotary, needs_mask=True)

    def early(self, tokens: Tensor, places: Any, exit_layer: int) -> Tensor:
        if self.fused is None or isinstance(places, PassPositions):
            return super().early(tokens, places, exit_layer)
        return self._run(self.parts.family.embed(self.parts, tokens), places, 0, exit_layer)[0]

    def late(self, residual: Tensor, places: Any, exit_layer: int) -> Tensor:
        if self.fused is None or isinstance(places, PassPositions):
            return super().late(residual, places, exit_layer)
        return self._run(residual, places, exit_layer, self.parts.depth)[1]

    def _run(self, residual: Tensor, places: DevicePositions, first: int, last: int) -> tuple[Tensor, Tensor]:
        if self.fused is None:
            raise RuntimeError("these places are for fused kernels, which this engine has not")
        with self._kernels():
            return self.fused.run(residual, places.positions, places.visible, self.cache, first, last)

    def best(self, normed: Tensor) -> Tensor:
        """The argmax of the model's logits. normed: (rows, tokens, width). Returns (rows, tokens)."""
        if self._best is None or normed.shape[:-1].numel() > MOST_AT_ONCE:
            return self.logits(normed).argmax(-1)
        return self._best(normed)


def one_place(places: PassPositions | DevicePositions, token: int) -> PassPositions | DevicePositions:
    """The places of one of a pass's tokens: views."""
    here = slice(token, token + 1)
    if isinstance(places, DevicePositions):
        return replace(places, positions=places.positions[:, here])
    kinds = {}
    for kind, inputs in places.kinds.items():
        cos, sin = inputs["position_embeddings"]
        kinds[kind] = inputs | {
            "attention_mask": inputs["attention_mask"][:, :, here],
            "position_ids": inputs["position_ids"][:, here],
            "position_embeddings": (cos[:, here], sin[:, here]),
        }
    return replace(places, slots=places.slots[:, :, here], kinds=kinds)


@dataclass(frozen=True, eq=False)
class DeviceState:
    """Where the rows of a batch stand: buffers of the device, int64.

    last: (rows, 1) each row's last token. position: (rows, 1) its position.
    before: (rows, 1) position of the prompt's last token. final: (rows, 1) position of the budget's last token.
    stream: (rows,) random streams, None when greedy.
    log: (entries, rows, K + 2) what a round did: accepted drafts, the token after them, the drafts. Round r is entry
        r modulo the entries.
    done: (1,) rounds so far.
    host: a copy of the log in the host's pinned memory, which every round renews; None on a processor.
    """

    last: Tensor
    position: Tensor
    before: Tensor
    final: Tensor
    stream: Tensor | None
    log: Tensor
    done: Tensor
    host: Tensor | None = None

    @classmethod
    def blank(cls, rows: int, draft_length: int, entries: int, device: torch.device, sampled: bool) -> DeviceState:
        """Buffers for batches of this kind, before `fill`."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        log = entries, rows, draft_length + 2
        return cls(
            last=zeros(rows, 1),
            position=zeros(rows, 1),
            before=zeros(rows, 1),
            final=zeros(rows, 1),
            stream=zeros(rows) if sampled else None,
            log=zeros(*log),
            done=zeros(1),
            host=torch.zeros(log, dtype=torch.long, pin_memory=True) if device.type == "cuda" else None,
        )

    def fill(self, batch: DecodeBatch) -> None:
        """Stand where a batch stands after its prefill. The buffers stay where they are."""
        rows, budget = batch.rows, batch.plan.max_new_tokens
        numbers = [[row.position, len(row.prompt_ids) - 1, len(row.prompt_ids) - 1 + budget] for row in rows]
        position, before, final = torch.tensor(numbers, device=batch.device).split(1, dim=1)
        self.last.copy_(batch.last)
        self.position.copy_(position)
        self.before.copy_(before)
        self.final.copy_(final)
        self.done.zero_()
        if self.stream is not None and batch.stream is not None:
            self.stream.copy_(batch.stream)

    def entry(self, number: int) -> Tensor:
        """(rows, K + 2) of a round, where the host reads it."""
        log = self.log if self.host is None else self.host
        return log[number % len(log)]


class Round:
    """One round on the device: draft, verify, log, move on. Call it, or record the call and replay it.

    With an exit layer: K early passes with a head each, one more for the last draft's residual, and a late pass with
    the head over K + 1 rows. Without one: a step of autoregressive decoding. A round always drafts K tokens; where
    fewer are within the budget, so many count. A row at its last position stays there.

    Parameters
    ----------
    visible: the slots that the passes see: more than any row's position + K.
    exit_layer, head: of the drafts; None, and K is 0.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        state: DeviceState,
        sampler: Sampler,
        visible: int,
        exit_layer: int | None = None,
        head: DraftHead | None = None,
    ) -> None:
        self.engine = engine
        self.state = state
        self.sampler = sampler
        self.visible = visible
        self.exit_layer = exit_layer
        self.head = None if head is None else head.with_engine(engine)
        self.draft_length = state.log.shape[2] - 2
        self._steps = torch.arange(self.draft_length + 1, device=state.last.device)

    def __call__(self) -> None:
        at = self.state
        places = self.engine.places_at(at.position + self._steps, self.visible)
        outputs = None if at.stream is None else (at.position - at.before)[:, 0]
        if self.exit_layer is None:
            drafts, drawn_from = at.last[:, 1:], None
            states = self.engine.full(at.last, places)
        else:
            drafts, drawn_from, residuals = self._draft(self.exit_layer, places, outputs)
            states = self.engine.late(residuals, places, self.exit_layer)
        limits = (at.final - at.position - 1).clamp(0, self.draft_length)[:, 0]
        if at.stream is None:
            verdict = judged(drafts, limits, self.engine.best(states))
        else:
            logits = self.engine.logits(states)
            verdict = self.sampler.verify(drafts, drawn_from, limits, logits, at.stream, outputs)
        run, token = verdict.run[:, None], verdict.token[:, None]
        at.log.index_copy_(0, at.done % len(at.log), torch.cat([run, token, drafts], dim=1)[None])
        at.done.add_(1)
        at.last.copy_(token)
        at.position.copy_(torch.minimum(at.position + run + 1, at.final))
        if at.host is not None:
            at.host.copy_(at.log, non_blocking=True)

    def _draft(
        self, exit_layer: int, places: PassPositions | DevicePositions, outputs: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Drafts (rows, K), what they were drawn from (rows, K, vocabulary), and residuals (rows, K + 1, width)."""
        at, head = self.state, self.head
        if head is None:
            raise RuntimeError("a round with an exit layer needs its head")
        ids = head.ids
        tokens, distributions, residuals = [at.last], [], []
        for step in range(self.draft_length):
            residuals.append(self.engine.early(tokens[-1], one_place(places, step), exit_layer))
            output = None if outputs is None else outputs + step
            token, distribution = one_draft(head, self.sampler, residuals[-1], at.stream, output)
            if distribution is not None:
                whole = distribution if ids is None else scatter(distribution, ids, self.engine.parts.vocabulary)
                distributions.append(whole)
            tokens.append((token if ids is None else ids[token])[:, None])
        residuals.append(self.engine.early(tokens[-1], one_place(places, self.draft_length), exit_layer))
        drawn_from = torch.stack(distributions, dim=1) if distributions else None
        return torch.cat(tokens[1:], dim=1), drawn_from, torch.cat(residuals, dim=1)


def one_draft(
    head: DraftHead, sampler: Sampler, residual: Tensor, stream: Tensor | None, output: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A draft for each row, (rows,), and the distribution that it was drawn from, None when greedy."""
    if stream is None:
        return head.best(residual), None
    token, distribution, _ = sampler.draft(head(residual), stream, output)
    return token, distribution


def _has_room(parts: Anatomy) -> bool:
    """Whether as much memory again stays free beside the fused kernels' copies of weights."""
    free = free_bytes(parts.device)
    return reading_of(parts) is not None and (free is None or 2 * copied_bytes(parts) <= free)
