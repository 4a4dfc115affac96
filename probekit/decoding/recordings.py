"""Rounds recorded once into CUDA graphs and replayed, and what they stand on: kept with the model between calls.

A graph holds the addresses of its tensors. So the engine with its cache, the buffers that say where the rows stand and
the log stay where they are, and a new batch is copied into them. The first round of its kind runs for real, which
warms up whatever is loaded on first use; then it is recorded, which runs nothing; from then on it is replayed.
Everything happens on one stream of its own. On a processor rounds run as they stand. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probekit.decoding.device_round import DeviceEngine, DeviceState, Round
from probekit.decoding.engine import bucket
from probekit.decoding.self_check import ROUND, checked_length, difference
from probekit.errors import SelfCheckError
from probekit.hooks.sites import is_hooked
from probekit.models.anatomy import Anatomy
from probekit.models.loaded import Loaded

RING = 4  # rounds in the log: two may be under way, and one is being read
_KEPT = "recordings"


class Graphs:
    """Work of a device by name: run the first time, and recorded; replayed after that."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.recorded: dict[Hashable, Any] = {}
        if self.on_cuda:
            self.stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()  # one for all: no two are replayed at once

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the device works on the stream of the graphs, after and before the caller's own work."""
        if not self.on_cuda:
            yield
            return
        callers = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(callers)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            callers.wait_stream(self.stream)

    def run(self, name: Hashable, work: Callable[[], Any]) -> None:
        if not self.on_cuda:
            work()
        elif name in self.recorded:
            self.recorded[name].replay()
        else:
            work()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
                work()
            self.recorded[name] = graph


@dataclass(eq=False)
class Recordings:
    """What a model's rounds stand on, for batches of `rows` prompts that fit into the engine's cache.

    weights: where they lay when the rounds were recorded.
    """

    engine: DeviceEngine
    graphs: Graphs
    rows: int
    weights: tuple[int, ...]
    states: dict[tuple[int, int, bool], DeviceState] = field(default_factory=dict)
    rounds: dict[Hashable, Callable[[], Any]] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)

    def state(self, rows: int, draft_length: int, sampled: bool) -> DeviceState:
        """The buffers of batches of this kind, at the same addresses every time."""
        kind = rows, draft_length, sampled
        if kind not in self.states:
            self.states[kind] = DeviceState.blank(rows, draft_length, RING, self.engine.parts.device, sampled)
        return self.states[kind]

    def send(self, name: Hashable, make: Callable[[], Round], number: int) -> None:
        """Run round `number` of a decode call."""
        if name not in self.rounds:
            self.rounds[name] = make()
        self.graphs.run(name, self.rounds[name])
        if self.graphs.on_cuda:
            self.events[number % RING].record(self.graphs.stream)

    def wait(self, number: int) -> None:
        """Until what round `number` did is in the host's memory; what was sent after it goes on."""
        if self.graphs.on_cuda:
            self.events[number % RING].synchronize()


def kept(loaded: Loaded, rows: int, length: int) -> Recordings | None:
    """The model's recordings, if they serve such batches."""
    found = loaded.kept.get(_KEPT)
    if found is None or found.rows != rows or found.engine.cache.length < length:
        return None
    if hooked(loaded.model) or found.weights != addresses(loaded.anatomy):
        return None
    return found


def recordings(loaded: Loaded, rows: int, length: int) -> Recordings:
    """Recordings for batches of `rows` prompts of at most `length` tokens each, with an empty cache.

    Where the model's own do not serve, they are let go and new ones are made; under a hook these are used once only:
    a recording never serves another set of hooks.
    """
    found = kept(loaded, rows, length)
    if found is not None:
        found.engine.cache.clear()
        if found.engine.fused is not None:
            found.engine.fused.refresh()
        return found
    forget(loaded)
    device = loaded.device
    engine = DeviceEngine(loaded.anatomy, rows, bucket(length))
    if engine.fused is not None:
        check_fused(engine)
    made = Recordings(
        engine, Graphs(device), rows, addresses(loaded.anatomy),
        events=[torch.cuda.Event() for _ in range(RING)] if device.type == "cuda" else [],
    )  # fmt: skip
    if not hooked(loaded.model):
        loaded.kept[_KEPT] = made
    return made


def check_fused(engine: DeviceEngine) -> None:
    """Hold a pass by fused kernels against the model's own layers; leaves the cache empty.

    Raises SelfCheckError where they differ by more than rounding.
    """
    parts, rows = engine.parts, engine.cache.rows
    length = min(checked_length(parts), engine.cache.length)
    first = max(1, length - ROUND)
    positions = torch.arange(length, device=parts.device).expand(rows, -1)
    tokens = (positions * 7919 + 13) % parts.vocabulary
    found: list[Tensor] = []
    with torch.inference_mode():
        for places_at in (engine.places_at, engine.masked_places_at):
            engine.full(tokens[:, :first], engine.places([0], first))
            states = engine.full(tokens[:, first:], places_at(positions[:, first:], bucket(length)))
            found.append(engine.logits(states).flatten(0, 1).float())
            engine.cache.clear()
        if how := difference(found[0], found[1], parts.dtype):
            raise SelfCheckError(
                f"the fused kernels do not compute what this model's layers do: {how}.", "Use --engine host."
            )


def forget(loaded: Loaded) -> None:
    """Let the model's recordings go, with their memory."""
    loaded.kept.pop(_KEPT, None)


def hooked(model: torch.nn.Module) -> bool:
    """Whether any module carries a hook of somebody's."""
    return any(map(is_hooked, model.modules()))


def addresses(parts: Anatomy) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in parts.model.parameters())
