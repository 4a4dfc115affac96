"""Whole recorded rounds and autoregressive steps, timed between events of the device: no wait inside, no stopwatch.

Rounds of each exit and draft length are replayed one after the other, as decoding replays them, and stand still where
they are, so that the context stays the same. Beside them an early pass, and an early pass with its draft, are recorded
alone; what a round takes beyond these is booked as its verification. On a processor, where nothing is recorded, the
same rounds run under the host's clock. Not yet run on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probekit.decoding.device_round import DeviceState, Round, one_draft, one_place
from probekit.decoding.engine import bucket
from probekit.decoding.recordings import recordings
from probekit.decoding.sampling import Sampler
from probekit.drafting.keys import DrafterKey
from probekit.drafting.proposers import BoundDrafter, DraftHead, ExitLayerDrafts
from probekit.errors import InputError
from probekit.models.loaded import Loaded
from probekit.settings import Sampling

REPLAYS = 8  # between two events


class RecordedTimer:
    """Times recorded rounds of each exit layer, by the names of `timing.RoundTimer`.

    Parameters
    ----------
    drafters: bound to `loaded`; exit layers only. context: tokens in the cache. longest: the longest draft.

    Raises InputError for other drafters.
    """

    def __init__(
        self,
        loaded: Loaded,
        drafters: Mapping[DrafterKey, BoundDrafter],
        context: int,
        longest: int,
        sampling: Sampling,
    ) -> None:
        self.drafts: dict[DrafterKey, ExitLayerDrafts] = {}
        for key, drafter in drafters.items():
            if not isinstance(drafter, ExitLayerDrafts):
                raise InputError(f"engine 'cuda' times exit layers, not {key.label}.", "Use engine 'host'.")
            self.drafts[key] = drafter
        self.context = context
        self.sampler = Sampler(sampling)
        self.held = recordings(loaded, 1, context + longest + 1)

    def measure(self, key: DrafterKey, widths: Sequence[int]) -> Iterator[tuple[str, float]]:
        """(step, seconds) of a round for each width of its verification, and of autoregressive steps."""
        exit_layer, head = self.drafts[key].exit_layer, self.drafts[key].head
        with self.held.graphs.running():
            plain = self._round(0, None, None)
            early = self._alone(exit_layer, None)
            drafted = max(self._alone(exit_layer, head) - early, 1e-9)
            rounds = {rows: self._round(rows - 1, exit_layer, head) if rows > 1 else plain for rows in widths}
        yield "autoregressive", plain
        for name in ("early", "early first"):
            yield f"{name} {exit_layer}", early
        yield f"head {exit_layer}", drafted
        yield "head first", 0.0  # a first pass that finds colder caches is in the round
        yield "booking 0", 0.0
        for rows, seconds in rounds.items():
            yield f"booking {rows - 1}", 0.0
            # without drafts there is no round with an exit: the rest of an autoregressive step
            yield f"verify {exit_layer} {rows}", max(seconds - rows * early - (rows - 1) * drafted, 1e-9)

    def _round(self, draft_length: int, exit_layer: int | None, head: DraftHead | None) -> float:
        state, visible = self._standing(draft_length)
        make = partial(Round, self.held.engine, state, self.sampler, visible, exit_layer, head)
        return self._seconds(("round", exit_layer, head, draft_length, visible), make)

    def _alone(self, exit_layer: int, head: DraftHead | None) -> float:
        """Seconds of an early pass over one token; with a head, and of its draft."""
        state, visible = self._standing(0)

        def make() -> Callable[[], Any]:
            place = one_place(self.held.engine.places_at(state.position.clone(), visible), 0)
            own = None if head is None else head.with_engine(self.held.engine)
            return partial(self._early, state.last, place, exit_layer, own, state.stream)

        return self._seconds(("early", exit_layer, head, visible), make)

    def _early(
        self, tokens: Tensor, place: Any, exit_layer: int, head: DraftHead | None, stream: Tensor | None
    ) -> None:
        residual = self.held.engine.early(tokens, place, exit_layer)
        if head is not None:
            one_draft(head, self.sampler, residual, stream, stream)

    def _standing(self, draft_length: int) -> tuple[DeviceState, int]:
        """A state that no round moves on: each row is at its last position."""
        state = self.held.state(1, draft_length, not self.sampler.sampling.greedy)
        state.position.fill_(self.context)
        state.final.fill_(self.context)
        return state, bucket(self.context + draft_length + 1)

    def _seconds(self, name: Hashable, make: Callable[[], Callable[[], Any]]) -> float:
        graphs, name = self.held.graphs, ("timed", self.sampler.sampling, name)
        if name not in self.held.rounds:
            self.held.rounds[name] = make()
            graphs.run(name, self.held.rounds[name])  # to warm up, and to record
        work = self.held.rounds[name]
        if not graphs.on_cuda:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(graphs.stream)
        for _ in range(REPLAYS):
            graphs.run(name, work)
        last.record(graphs.stream)
        last.synchronize()
        return first.elapsed_time(last) / 1000 / REPLAYS
