"""Rounds of the running decoder with a stopwatch at each step, on sequences whose cache holds so many tokens.

Tokens are drafted and judged by a real DecodeBatch, so that its accounting is in the times. The cache holds zeros,
which cost what numbers cost, and every pass stands at the same position, so that the context stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probekit.decoding.batch import DecodeBatch, DecodePlan
from probekit.decoding.batch_invariant import open_engine
from probekit.decoding.sequence import SequenceState
from probekit.drafting.keys import TREE, DrafterKey
from probekit.drafting.policies import Policy, looks_at
from probekit.drafting.proposers import BoundDrafter, ExitLayerProposer, Proposer
from probekit.drafting.trees import DraftTree
from probekit.models.loaded import Loaded
from probekit.settings import Sampling

_ENDLESS = 10**9
CLOCKS = ("wall", "processor")


def clock_named(name: str) -> Callable[[], float]:
    """Seconds by the clock on the wall, or of this process on its processors."""
    return time.process_time if name == "processor" else time.perf_counter


@dataclass(frozen=True)
class Unstopped:
    """A policy that is asked as in a decoder, and whose answer to stop is not obeyed: every draft is timed."""

    policy: Policy
    exact = True

    @property
    def needs_confidence(self) -> bool:
        return self.policy.needs_confidence

    @property
    def looks_at(self) -> str:
        return looks_at(self.policy)

    def keep_drafting(self, drafted: int, confidence: float) -> bool:
        self.policy.keep_drafting(drafted, confidence)
        return True


class _StandingBatch(DecodeBatch):
    """A batch that never moves on. The longest row's cache holds `context` tokens, each further row's one less: rows of
    a batch rarely stand at one position, and where they do its passes need no mask."""

    def __init__(self, plan: DecodePlan, loaded: Loaded, context: int) -> None:
        super().__init__(plan, loaded, {})
        self._standing = [max(1, context - row) for row in range(len(plan.prompts))]
        self.rows = [  # no token ends them
            SequenceState(row, prompt, _ENDLESS, frozenset()) for row, prompt in enumerate(plan.prompts)
        ]
        for row in self.rows:
            row.first(0)
        self.last = self.previous = torch.zeros((len(self.rows), 1), dtype=torch.long, device=loaded.device)

    @property
    def positions(self) -> list[int]:
        return self._standing


class RoundTimer:
    """Times rounds of each drafter, autoregressive steps among them.

    Parameters
    ----------
    drafters: bound to `loaded`.
    context: tokens in the cache. longest: the longest draft that is verified; most_drafts: that is drafted.
    batch: rows that every pass has. clock: "wall" or "processor".
    """

    def __init__(
        self,
        loaded: Loaded,
        drafters: Mapping[DrafterKey, BoundDrafter],
        context: int,
        longest: int,
        most_drafts: int,
        sampling: Sampling,
        policy: Policy,
        batch: int = 1,
        clock: str = "wall",
    ) -> None:
        self.policy, self._now = Unstopped(policy), clock_named(clock)
        self.most_drafts = most_drafts
        self.engine = open_engine(loaded.anatomy, batch, context + longest + 1)
        plan = DecodePlan([[0] * context] * batch, [*range(batch)], _ENDLESS, sampling, (), None)
        self.batch = _StandingBatch(plan, loaded, context)
        self.batch.engines = [self.engine]  # whose cache a tree's accepted path moves in
        self._wait = partial(torch.cuda.synchronize, loaded.device) if loaded.device.type == "cuda" else None
        self._laps: dict[str, list[float]] = {}
        self.proposers = {key: self._opened(drafts, context + longest + 1) for key, drafts in drafters.items()}

    def _opened(self, drafts: BoundDrafter, length: int) -> Proposer:
        helpers = [open_engine(helper.anatomy, len(self.batch.rows), length) for helper in drafts.helpers]
        proposer: Any = drafts.open(self.batch, self.engine, *helpers)
        for name in ("early", "head", "step", "best"):
            if hasattr(proposer, name):
                setattr(proposer, name, self._timed(name, getattr(proposer, name)))
        return proposer

    def _timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same, each call noted under its name."""

        def timed(*args: Any) -> Any:
            started = self.clock()
            result = work(*args)
            self._laps.setdefault(name, []).append(self.clock() - started)
            return result

        timed.ids = getattr(work, "ids", None)  # type: ignore[attr-defined]
        return timed

    def clock(self) -> float:
        if self._wait is not None:
            self._wait()
        return self._now()

    def measure(self, key: DrafterKey, widths: Sequence[int]) -> Iterator[tuple[str, float]]:
        """(step, seconds) of a round for each width of its verification, autoregressive steps among them; a tree has
        one width of its own."""
        if key.kind == TREE:
            yield from self._tree(key)
            return
        for place, rows in enumerate(widths):
            yield from self._round(key, rows)
            if place % 3 == 0:
                self._autoregressive()  # a step after its like, as in autoregressive decoding
                yield "autoregressive", self._autoregressive()

    def _autoregressive(self) -> float:
        started = self.clock()
        states = self.engine.full(self.batch.last, self.engine.places(self.batch.positions, 1))
        nothing = DraftTree.chain(self.batch.last, None, [0] * len(self.batch.rows))
        self.batch.verify(nothing, self.engine.logits(states))
        return self.clock() - started

    def _round(self, key: DrafterKey, rows: int) -> Iterator[tuple[str, float]]:
        """A round with a few drafts; its verification is as wide as if there had been rows - 1."""
        proposer, self._laps = self.proposers[key], {}
        started = self.clock()
        tree = proposer.propose(min(rows - 1, self.most_drafts), self.policy)
        accounting = self.clock() - started - sum(sum(laps) for laps in self._laps.values())
        yield from self._named(key, accounting)
        tree = self._widened(proposer, tree, rows)
        started = self.clock()
        self.batch.verify(tree, self.engine.logits(proposer.verify(tree)))
        yield f"verify {key.exit_layer if key.is_exit else 'all'} {rows}", self.clock() - started

    def _tree(self, key: DrafterKey) -> Iterator[tuple[str, float]]:
        """A whole round of a tree; what is neither a pass nor a head is spread over its passes."""
        proposer: Any = self.proposers[key]
        self._laps = {}
        started = self.clock()
        tree = proposer.propose(proposer.shape.depth, self.policy)
        spent = self.clock() - started - sum(sum(laps) for laps in self._laps.values())
        passes = proposer.residuals
        for residual, seconds in zip(passes, self._laps["early"], strict=True):
            yield f"tree early {key.exit_layer} {residual.shape[1]}", seconds
        for rows, seconds in zip(proposer.inner, self._laps["best"], strict=True):
            yield f"tree head {rows}", seconds
        yield "tree level", spent / len(passes)
        started = self.clock()
        self.batch.verify(tree, self.engine.logits(proposer.verify(tree)))
        yield f"tree verify {key.exit_layer} {tree.written.shape[1]}", self.clock() - started

    def _named(self, key: DrafterKey, accounting: float) -> Iterator[tuple[str, float]]:
        if not key.is_exit:
            steps = self._laps.get("step", [])
            for place, seconds in enumerate(steps):
                yield "drafter step" if place else "drafter first", seconds + accounting / len(steps)
            return
        heads = self._laps.get("head", [])
        for place, seconds in enumerate(self._laps["early"]):  # the first finds the late layers in the caches
            yield f"early {key.exit_layer}" if place else f"early first {key.exit_layer}", seconds
        for place, seconds in enumerate(heads):
            yield f"head {key.exit_layer}" if place else "head first", seconds
        yield f"booking {len(heads)}", accounting

    def _widened(self, proposer: Proposer, tree: DraftTree, rows: int) -> DraftTree:
        """The same round as if rows - 1 tokens had been drafted: the last one, over and over."""
        if isinstance(proposer, ExitLayerProposer):
            proposer.residuals = [_filled(torch.cat(proposer.residuals, dim=1), rows)]
        probabilities = None if tree.probabilities is None else _filled(tree.probabilities, rows - 1)
        return DraftTree.chain(_filled(tree.written, rows), probabilities, [rows - 1] * len(self.batch.rows))


def _filled(given: Tensor, size: int) -> Tensor:
    """Repeat the last entry of dimension 1 up to `size` entries."""
    missing = size - given.shape[1]
    return given if missing <= 0 else torch.cat([given, *[given[:, -1:]] * missing], dim=1)
