"""Costs measured on the device at hand: the decoder's own steps, in the order in which a round runs them."""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.costs.profile import Costs
from probekit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from probekit.decoding.batch import Drafts
    from probekit.lens.exit_heads import ExitHead
    from probekit.models.loaded import Loaded
    from probekit.settings import Sampling

QUANTILES = (0.2, 0.5, 0.8)
CALIBRATION_S = 4.0
FEWEST, MOST = 5, 40
DRAFTS = 4
"""A calibration sweeps over all steps for about CALIBRATION_S seconds, but FEWEST times at least and MOST at most.
A timed round drafts DRAFTS tokens at most: further ones take as long as the last of these."""
Progress = Callable[..., None]


def measure_costs(
    loaded: Loaded,
    context: int = 128,
    *,
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] = range(1, 9),
    drafter: Loaded | None = None,
    draft_vocabulary: Sequence[int] | None = None,
    exit_heads: Mapping[int, ExitHead] | None = None,
    sampling: Sampling | None = None,
    repeats: int | None = None,
    progress: Progress | None = None,
) -> Costs:
    """Time the decoder's steps on the device that the model is on.

    Parameters
    ----------
    context: tokens in the cache when a step is timed.
    exit_layers: exits to time beside the first and the last; by default those at a quarter and a half of the depth.
        The others are read off.
    draft_lengths: the longest decides how wide a verification pass can be.
    drafter: a draft model, to be timed too.
    draft_vocabulary: the tokens whose rows of the head exit layers draft with (`Trace.draft_head_ids`); all by default.
    exit_heads: {exit: head} that drafts go through (`traced_heads`); none by default.
    sampling: how tokens are chosen; greedy by default.
    repeats: sweeps over all steps; by default as many as take a few seconds.
    progress: called as `progress(phase, done, total)`.

    Raises
    ------
    InputError: for a context that the model does not reach, or an exit or draft length that does not exist.
    """
    import torch

    from probekit.decoding.speculative import check_drafter
    from probekit.lens.exit_heads import check_heads, fingerprint
    from probekit.settings import Sampling

    heads = check_heads(exit_heads, loaded.anatomy) if exit_heads else {}
    longest = max(2, *_checked_lengths(draft_lengths))
    inner = exit_layers or [max(1, loaded.depth // 4), max(1, loaded.depth // 2)]
    exits = sorted({1, loaded.depth - 1, *map(loaded.anatomy.check_exit, inner)})
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise InputError(f"the context must be a whole number of at least 1, not {context!r}.")
    for model in [loaded] if drafter is None else [loaded, check_drafter(loaded, drafter)]:
        if context + longest + 1 > model.anatomy.context:
            raise InputError(
                f"a context of {context} tokens and drafts of {longest} exceed the {model.anatomy.context} tokens that "
                f"{model.name} reads."
            )

    started = time.perf_counter()
    rows = row_design(longest)
    order = random.Random(0)
    times: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        bench = _Bench(loaded, drafter, context, longest, sampling or Sampling(), draft_vocabulary, heads)
        jobs: list[int | None] = [*exits, None] if drafter is not None else [*exits]
        for job in jobs:  # to warm up
            deque(bench.measure(job, rows[-2:]), maxlen=0)
        began = time.perf_counter()
        sweeps, planned = 0, repeats or FEWEST
        while sweeps < planned:
            order.shuffle(jobs)
            for job in jobs:
                for step, seconds in bench.measure(job, order.sample(rows, len(rows))):
                    times[step].append(seconds)
            sweeps += 1
            if repeats is None:
                planned = int(np.clip(CALIBRATION_S * sweeps / (time.perf_counter() - began), FEWEST, MOST))
            if progress is not None:
                progress("costs", min(sweeps, planned), planned)
    blank = Costs(
        source="measured",
        device=device_name(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        context=context,
        depth=loaded.depth,
        autoregressive_s=1.0,
        early_s={},
        head_s=1.0,
        verify_s={},
        draft_rows=None if draft_vocabulary is None else len(draft_vocabulary),
        exit_heads=fingerprint(heads) if heads else None,
        drafter=None if drafter is None else drafter.name,
        seconds=time.perf_counter() - started,
        sweeps=sweeps,
    )
    return _assemble(times, exits, rows, blank)


def _checked_lengths(draft_lengths: Iterable[int]) -> list[int]:
    lengths = list(draft_lengths)
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise InputError(f"draft length {length!r} is out of range: a draft length is 1 or more.")
    if not lengths:
        raise InputError("no draft length was given; expected one or more, each 1 or more.")
    return [int(length) for length in lengths]


def row_design(longest: int) -> list[int]:
    """The widths of verification passes to time: every one up to 9 rows, then one in four, and the widest."""
    return sorted({*range(1, min(longest + 1, 9) + 1), *range(13, longest + 1, 4), longest + 1})


class _Bench:
    """The decoder's own rounds on one sequence of `context` tokens, with a stopwatch at each step.

    Tokens are drafted and judged by a real DecodeBatch, so that its accounting is in the times; the cache holds
    zeros, which cost what numbers cost; and every pass stands at the same position, so that the context stays the same.
    """

    def __init__(
        self,
        loaded: Loaded,
        drafter: Loaded | None,
        context: int,
        longest: int,
        sampling: Sampling,
        draft_vocabulary: Sequence[int] | None,
        heads: Mapping[int, ExitHead],
    ) -> None:
        import torch

        from probekit.decoding.batch import DecodeBatch, DecodePlan
        from probekit.decoding.engine import Engine
        from probekit.decoding.sequence import SequenceState
        from probekit.decoding.speculative import DraftHead

        self.context = context
        self.engine = Engine(loaded.anatomy, 1, context + longest + 1)
        self.helper = None if drafter is None else Engine(drafter.anatomy, 1, context + longest + 1)
        ids = None if draft_vocabulary is None else torch.as_tensor(draft_vocabulary)
        plain = DraftHead(loaded.anatomy, ids=ids).through(self.engine)
        self.heads = {exit_layer: plain.behind(heads.get(exit_layer)) for exit_layer in loaded.anatomy.exits}
        prompt = [0] * context
        plan = DecodePlan([prompt], [0], _ENDLESS, sampling, (), None)
        self.session = DecodeBatch(plan, loaded, {})
        self.session.rows = [SequenceState(0, prompt, _ENDLESS, frozenset())]  # no token ends it
        self.session.rows[0].first(0)
        self.session.last = self.session.previous = torch.zeros((1, 1), dtype=torch.long, device=loaded.device)
        self._wait = torch.cuda.synchronize if loaded.device.type == "cuda" else None
        self._cat, self._pad = torch.cat, torch.nn.functional.pad

    def clock(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.perf_counter()

    def measure(self, exit_layer: int | None, widths: Sequence[int]) -> Iterator[tuple[str, float]]:
        """(step, seconds) of a round for each width of its verification, autoregressive steps among them."""
        for place, rows in enumerate(widths):
            yield from self._two_model_round(rows) if exit_layer is None else self._round(exit_layer, rows)
            if place % 3 == 0:
                self._autoregressive()  # a step after its like, as in autoregressive decoding
                yield "autoregressive", self._autoregressive()

    def _autoregressive(self) -> float:
        started = self.clock()
        states = self.engine.full(self.session.last, self.engine.places([self.context], 1))
        self._verify(self.session.last, None, states)
        return self.clock() - started

    def _round(self, exit_layer: int, rows: int) -> Iterator[tuple[str, float]]:
        """A round with a few drafts; its verification is as wide as if there had been rows - 1."""
        passes, heads, states = [], [], []
        head = self.heads[exit_layer]

        def early(tokens: Tensor, place: int) -> Tensor:
            started = self.clock()
            states.append(self.engine.early(tokens, self.engine.places([self.context + place], 1), exit_layer))
            passes.append(self.clock() - started)
            return states[-1]

        def step(tokens: Tensor, place: int) -> Tensor:
            residual = early(tokens, place)
            started = self.clock()
            logits = head(residual)
            heads.append(self.clock() - started)
            return logits

        started = self.clock()
        drafts = self._draft(min(rows - 1, DRAFTS), step, head.ids)
        booking = self.clock() - started - sum(passes) - sum(heads)
        early(drafts.written[:, -1:], drafts.tokens.shape[1])
        yield f"early first {exit_layer}", passes[0]  # it finds the late layers in the processor's caches
        yield from ((f"early {exit_layer}", seconds) for seconds in passes[1:])
        yield from ((f"head {exit_layer}" if place else "head first", each) for place, each in enumerate(heads))
        yield f"booking {len(heads)}", booking

        written = self._fill(drafts.written, rows)
        drawn_from = None if drafts.drawn_from is None else self._fill(drafts.drawn_from, rows - 1)
        residuals = self._fill(self._cat(states, dim=1), rows)
        started = self.clock()
        normed = self.engine.late(residuals, self.engine.places([self.context], rows), exit_layer)
        self._verify(written, drawn_from, normed)
        yield f"verify {exit_layer} {rows}", self.clock() - started

    def _two_model_round(self, rows: int) -> Iterator[tuple[str, float]]:
        helper = self.helper
        assert helper is not None
        steps = []
        wider = self.engine.parts.vocabulary - helper.parts.vocabulary

        def step(tokens: Tensor, place: int) -> Tensor:
            started = self.clock()
            before = 1 if place == 0 else 0
            if before:
                tokens = self._cat([self.session.previous, tokens], dim=1)
            places = helper.places([self.context + place - before], 1 + before)
            tokens = tokens.clamp(max=helper.parts.vocabulary - 1)  # heads may be padded to different sizes
            logits = self._pad(helper.logits(helper.full(tokens, places)[:, -1]), (0, wider), value=float("-inf"))
            steps.append(self.clock() - started)
            return logits

        started = self.clock()
        drafts = self._draft(min(rows - 1, DRAFTS), step)
        booking = (self.clock() - started - sum(steps)) / max(1, len(steps))
        for place, seconds in enumerate(steps):
            yield "drafter step" if place else "drafter first", seconds + booking
        written = self._fill(drafts.written, rows)
        drawn_from = None if drafts.drawn_from is None else self._fill(drafts.drawn_from, rows - 1)
        started = self.clock()
        self._verify(written, drawn_from, self.engine.full(written, self.engine.places([self.context], rows)))
        yield f"verify all {rows}", self.clock() - started

    def _draft(self, length: int, step: Callable[[Tensor, int], Tensor], ids: Tensor | None = None) -> Drafts:
        from probekit.drafting.policies import FixedLength

        return self.session.draft(length, FixedLength(), step, ids)

    def _verify(self, written: Tensor, drawn_from: Tensor | None, states: Tensor) -> None:
        from probekit.decoding.batch import Drafts

        drafts = Drafts(written, drawn_from, [written.shape[1] - 1])
        self.session.verify(drafts, self.engine.logits(states))

    def _fill(self, given: Tensor, size: int) -> Tensor:
        """Repeat the last entry of dimension 1 up to `size` entries."""
        missing = size - given.shape[1]
        return given if missing <= 0 else self._cat([given, *[given[:, -1:]] * missing], dim=1)


def _assemble(times: Mapping[str, Sequence[float]], exits: Sequence[int], rows: Sequence[int], costs: Costs) -> Costs:
    """Fill in every exit and width from the medians of those that were timed."""
    median = {step: float(np.median(each)) for step, each in times.items()}
    every, widths = range(1, costs.depth), range(1, rows[-1] + 1)
    early = np.array([median[f"early {exit_layer}"] for exit_layer in exits])
    verify = np.array([[median[f"verify {exit_layer} {count}"] for count in rows] for exit_layer in exits])
    by_exit = np.stack([np.interp(every, exits, column) for column in verify.T], axis=1)  # (exits, timed widths)
    by_width = np.stack([np.interp(widths, rows, row) for row in by_exit])  # (exits, widths)
    drafted = min(rows[-1] - 1, DRAFTS)
    booking = max(0.0, (median[f"booking {drafted}"] - median["booking 0"]) / drafted)
    heads = np.array([median[f"head {exit_layer}"] for exit_layer in exits]) + booking
    colder = np.array([median[f"early first {exit_layer}"] for exit_layer in exits]) - early
    colder = np.maximum(colder + median["head first"] + booking - heads, 0.0)
    errors = [_distance_from_line(exits, column) for column in (early, *verify.T)]
    whole = [median.get(f"verify all {count}", np.nan) for count in rows]
    two_models = costs.drafter is not None
    return replace(
        costs,
        autoregressive_s=median["autoregressive"],
        early_s=dict(zip(every, np.interp(every, exits, early).tolist(), strict=True)),
        head_s=float(np.median(heads)),
        heads_s=dict(zip(every, np.interp(every, exits, heads).tolist(), strict=True)),
        verify_s={
            (exit_layer, count): float(by_width[exit_layer - 1, count - 1]) for exit_layer in every for count in widths
        },
        overhead_s=median["booking 0"],
        cold_s=dict(zip(every, np.interp(every, exits, colder).tolist(), strict=True)),
        drafter_first_s=median["drafter first"] if two_models else None,
        drafter_step_s=median.get("drafter step", median["drafter first"]) if two_models else None,
        verify_all_s=dict(zip(widths, np.interp(widths, rows, whole).tolist(), strict=True)) if two_models else None,
        quantiles={step: np.quantile(each, QUANTILES).tolist() for step, each in sorted(times.items())},
        fit_error=max(errors) if len(exits) > 2 else None,
    )


def _distance_from_line(exits: Sequence[int], seconds: np.ndarray) -> float:
    """Largest relative distance of the points between the ends from the line through the ends."""
    line = np.interp(exits, [exits[0], exits[-1]], [seconds[0], seconds[-1]])
    return float(np.max(np.abs(line - seconds) / seconds))


def device_name(device: Any) -> str:
    """What a person calls the device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


_ENDLESS = 10**9
