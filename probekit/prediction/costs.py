"""What the steps of a round cost: measured on the device at hand, or read off a roofline for one that is not.

A self-speculative round with k drafts costs k + 1 passes of layers 0..E-1 over one row, k heads, one pass of layers
E..L-1 with the head over k + 1 rows, and what booking a round takes. A two-model round costs k steps of the drafter,
the first over two rows, and one pass of the whole model over k + 1 rows.

A calibration runs the decoder's own steps, in the order in which a round runs them, at a few exits. Times of the exits
between are read off a straight line in the number of layers; how far the measured points lie from it is kept.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from probekit.errors import InputError
from probekit.tracing.draft_vocabulary import check_draft_rows
from probekit.tracing.shading import Shaded, shaded_table

if TYPE_CHECKING:
    from torch import Tensor

    from probekit.decoding.engine import Drafts
    from probekit.decoding.sampling import Sampling
    from probekit.lens.heads import ExitHead
    from probekit.models.loading import Loaded

QUANTILES = (0.2, 0.5, 0.8)
CALIBRATION_S = 4.0
FEWEST, MOST = 5, 40
DRAFTS = 4
"""A calibration sweeps over all steps for about CALIBRATION_S seconds, but FEWEST times at least and MOST at most.
A timed round drafts DRAFTS tokens at most: further ones take as long as the last of these."""

Progress = Callable[..., None]


@dataclass(frozen=True)
class Costs:
    """Seconds of each step, for one sequence whose cache holds `context` tokens.

    Parameters
    ----------
    source: "measured" or "roofline". depth: L.
    autoregressive_s: a whole step of autoregressive decoding.
    early_s: {E: layers 0..E-1 over one row}.
    head_s: norm, head and choice of one draft.
    heads_s: {E: the same after each exit, where that was timed: after few layers the head is still in the caches}.
    verify_s: {(E, rows): layers E..L-1, norm and head over `rows` rows}.
    overhead_s: what each round costs beside its steps.
    cold_s: {E: what the first pass and head of a round take longer than the next: the late layers were in the caches}.
    draft_rows: rows of the head that drafts are chosen with; None: all of them. exit_heads: the name (fingerprint) of
        the exit heads that drafts go through; None: none. Both are in `head_s` and `heads_s`.
    drafter: the draft model's name; the next three are None without one.
    drafter_step_s, drafter_first_s: a step of the drafter, and the first of a round, over two rows.
    verify_all_s: {rows: the whole model over `rows` rows}.
    quantiles: {step: [20 %, 50 %, 80 %] in seconds} of what was measured.
    fit_error: largest relative distance of a measured time from the straight line in the number of layers.
    seconds, sweeps: how long the calibration took, and how often it measured each step.
    """

    source: str
    device: str
    dtype: str
    context: int
    depth: int
    autoregressive_s: float
    early_s: Mapping[int, float]
    head_s: float
    verify_s: Mapping[tuple[int, int], float]
    overhead_s: float = 0.0
    heads_s: Mapping[int, float] = field(default_factory=dict)
    cold_s: Mapping[int, float] = field(default_factory=dict)
    draft_rows: int | None = None
    exit_heads: str | None = None
    drafter: str | None = None
    drafter_step_s: float | None = None
    drafter_first_s: float | None = None
    verify_all_s: Mapping[int, float] | None = None
    quantiles: Mapping[str, Sequence[float]] = field(default_factory=dict)
    fit_error: float | None = None
    seconds: float = 0.0
    sweeps: int = 0

    def __post_init__(self) -> None:
        times = [self.autoregressive_s, self.head_s, *self.early_s.values(), *self.verify_s.values()]
        if not all(np.isfinite(each) and each > 0 for each in times) or not self.overhead_s >= 0:
            raise InputError("a step takes more than 0 seconds; these costs hold other times.")

    @property
    def longest_draft(self) -> int:
        """The longest draft that these costs know."""
        return max((rows for _, rows in self.verify_s), default=1) - 1

    def round_seconds(self, exit_layer: int | None, drafts: int) -> float:
        """Seconds of one round with `drafts` drafts, 0 or more; exit_layer None: of the draft model."""
        self._check(exit_layer, drafts)
        if exit_layer is None:
            assert self.drafter_first_s is not None
            assert self.drafter_step_s is not None
            assert self.verify_all_s is not None
            drafting = self.drafter_first_s + (drafts - 1) * self.drafter_step_s if drafts else 0.0
            return drafting + self.verify_all_s[drafts + 1] + self.overhead_s
        drafting = (drafts + 1) * self.early_s[exit_layer] + drafts * self.heads_s.get(exit_layer, self.head_s)
        once = self.overhead_s + self.cold_s.get(exit_layer, 0.0)
        return drafting + self.verify_s[exit_layer, drafts + 1] + once

    def rounds_seconds(self, exit_layer: int | None, draft_length: int) -> np.ndarray:
        """(draft_length + 1,) seconds of a round with 0, 1, ... drafts."""
        return np.array([self.round_seconds(exit_layer, drafts) for drafts in range(draft_length + 1)])

    def _check(self, exit_layer: int | None, drafts: int) -> None:
        if exit_layer is None and self.drafter is None:
            raise InputError("these costs know no draft model.", "Give `drafter` when they are made.")
        if exit_layer is not None and exit_layer not in self.early_s:
            raise InputError(f"exit layer {exit_layer} is out of range: these costs know exits 1..{self.depth - 1}.")
        if not 0 <= drafts <= self.longest_draft:
            raise InputError(
                f"these costs know drafts of up to {self.longest_draft} tokens, not {drafts}.",
                "Make them with `draft_lengths` as long as you need.",
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "device": self.device,
            "dtype": self.dtype,
            "context": self.context,
            "depth": self.depth,
            "autoregressive_s": self.autoregressive_s,
            "head_s": self.head_s,
            "overhead_s": self.overhead_s,
            "early_s": _listed(self.early_s),
            "heads_s": _listed(self.heads_s),
            "cold_s": _listed(self.cold_s),
            "verify_s": [
                {"exit_layer": exit_layer, "rows": rows, "seconds": each}
                for (exit_layer, rows), each in self.verify_s.items()
            ],
            "draft_rows": self.draft_rows,
            "exit_heads": self.exit_heads,
            "drafter": self.drafter,
            "drafter_step_s": self.drafter_step_s,
            "drafter_first_s": self.drafter_first_s,
            "verify_all_s": None
            if self.verify_all_s is None
            else [{"rows": rows, "seconds": each} for rows, each in self.verify_all_s.items()],
            "quantiles": {name: list(each) for name, each in self.quantiles.items()},
            "fit_error": self.fit_error,
            "seconds": self.seconds,
            "sweeps": self.sweeps,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Costs:
        values = dict(document)
        for name in ("early_s", "heads_s", "cold_s"):
            values[name] = {row["exit_layer"]: row["seconds"] for row in document[name]}
        values["verify_s"] = {(row["exit_layer"], row["rows"]): row["seconds"] for row in document["verify_s"]}
        if document.get("verify_all_s") is not None:
            values["verify_all_s"] = {row["rows"]: row["seconds"] for row in document["verify_all_s"]}
        return cls(**values)

    def to_pandas(self) -> pd.DataFrame:
        """A row a step: columns step, exit_layer, rows, seconds."""
        rows: list[tuple[str, int | None, int, float]] = [
            ("autoregressive", None, 1, self.autoregressive_s),
            ("head", None, 1, self.head_s),
            ("overhead", None, 1, self.overhead_s),
        ]
        rows += [("early", exit_layer, 1, each) for exit_layer, each in self.early_s.items()]
        rows += [("head", exit_layer, 1, each) for exit_layer, each in self.heads_s.items()]
        rows += [("cold", exit_layer, 1, each) for exit_layer, each in self.cold_s.items()]
        rows += [("verify", exit_layer, count, each) for (exit_layer, count), each in self.verify_s.items()]
        if self.drafter_step_s is not None and self.drafter_first_s is not None:
            rows += [("drafter", None, 1, self.drafter_step_s), ("drafter first", None, 2, self.drafter_first_s)]
        rows += [("verify all", None, count, each) for count, each in (self.verify_all_s or {}).items()]
        return pd.DataFrame(rows, columns=["step", "exit_layer", "rows", "seconds"]).astype({"exit_layer": "Int64"})

    def _repr_html_(self) -> str:
        """Milliseconds of a draft step and of verification passes by exit layer, beside an autoregressive step's."""
        widths = sorted({count for _, count in self.verify_s})

        def cell(seconds: float) -> Shaded:
            return Shaded(f"{1000 * seconds:.3g}", seconds / (2 * self.autoregressive_s))

        rows = [
            (
                str(exit_layer),
                [cell(early + self.heads_s.get(exit_layer, self.head_s))]
                + [cell(self.verify_s[exit_layer, count]) for count in widths if (exit_layer, count) in self.verify_s],
            )
            for exit_layer, early in sorted(self.early_s.items(), reverse=True)
        ]
        return shaded_table(
            f"milliseconds a step: {self.source}, {self.device}, {self.dtype}, {self.context} tokens in the cache; an "
            f"autoregressive step takes {1000 * self.autoregressive_s:.3g}",
            "exit layer", ["draft one token", *(f"verify {count} rows" for count in widths)], rows,
        )  # fmt: skip


def _listed(times: Mapping[int, float]) -> list[dict[str, Any]]:
    return [{"exit_layer": exit_layer, "seconds": seconds} for exit_layer, seconds in times.items()]


# ------------------------------------------------------------------------------------------------ measured
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

    from probekit.decoding.sampling import Sampling
    from probekit.decoding.speculative import check_drafter
    from probekit.lens.heads import check_heads, fingerprint

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

    Tokens are drafted and judged by a real Session, so that booking is in the times; the cache holds zeros, which cost
    what numbers cost; and every pass is told to stand at the same position, so that the context stays what it is.
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

        from probekit.decoding.engine import Engine, Plan, Session
        from probekit.decoding.results import Transcript
        from probekit.decoding.self_speculative import DraftHead

        self.context = context
        self.engine = Engine(loaded.anatomy, 1, context + longest + 1)
        self.helper = None if drafter is None else Engine(drafter.anatomy, 1, context + longest + 1)
        ids = None if draft_vocabulary is None else torch.as_tensor(draft_vocabulary)
        plain = DraftHead(loaded.anatomy, ids=ids).through(self.engine)
        self.heads = {exit_layer: plain.behind(heads.get(exit_layer)) for exit_layer in loaded.anatomy.exits}
        prompt = [0] * context
        plan = Plan([prompt], [0], _ENDLESS, sampling, (), None)
        self.session = Session(plan, loaded, {})
        self.session.rows = [Transcript(0, prompt, _ENDLESS, frozenset())]  # no token ends it
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
        from probekit.decoding.policies import FixedLength

        return self.session.draft(length, FixedLength(), step, ids)

    def _verify(self, written: Tensor, drawn_from: Tensor | None, states: Tensor) -> None:
        from probekit.decoding.engine import Drafts

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


# ------------------------------------------------------------------------------------------------ roofline
class Roof(NamedTuple):
    """bandwidth: bytes a second. flops: products and sums a second, in 16-bit types where the device has them."""

    bandwidth: float
    flops: float


DEVICES = {
    "h200": Roof(4.3e12, 788e12),  # measured: a device-to-device copy, and an 8192^3 product
    "h100": Roof(3.35e12, 989e12),  # published peaks of the SXM cards
    "a100": Roof(2.04e12, 312e12),
}


@dataclass(frozen=True)
class Dimensions:
    """What a roofline needs to know of a model.

    layer_parameters, head_parameters: weights of one layer (its norms with it), and of the head.
    vocabulary: rows of the head.
    key_value_width: numbers of one key (or value) of one token in one layer; None where nobody said.
    """

    name: str
    depth: int
    layer_parameters: int
    head_parameters: int
    vocabulary: int
    key_value_width: int | None = None

    @property
    def width(self) -> int:
        return self.head_parameters // self.vocabulary

    @classmethod
    def of(cls, source: Any) -> Dimensions:
        """From a Loaded, a Trace, a ModelRecord, or the name of a shape of probekit.models.synthetic.

        A trace does not say how wide keys and values are: its roofline leaves them out.
        """
        if isinstance(source, str):
            from probekit.models.synthetic import SHAPES

            if source not in SHAPES:
                raise InputError(f"no shape is named {source!r}; there are {', '.join(SHAPES)}.")
            shape = SHAPES[source]
            queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
            layer = 2 * shape.width * (queries + keys) + 3 * shape.width * shape.inner + 2 * shape.width
            return cls(source, shape.layers, layer, shape.vocabulary * shape.width, shape.vocabulary, keys)
        if hasattr(source, "anatomy"):
            parts = source.anatomy
            layer = sum(parameter.numel() for parameter in parts.layers[0].parameters())
            keys = parts.layers[0].self_attn.k_proj.out_features
            return cls(source.name, parts.depth, layer, parts.head.weight.numel(), parts.vocabulary, keys)
        record = source.manifest.model if hasattr(source, "manifest") else source
        table = record.vocabulary * record.width
        layers = record.parameters - table * (1 if record.tied else 2) - record.width
        return cls(record.name, record.depth, layers // record.depth, table, record.vocabulary)


def roofline_costs(
    source: Any,
    *,
    device: str | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    dtype: str | None = None,
    context: int = 128,
    longest_draft: int = 32,
    drafter: Any = None,
    draft_rows: int | None = None,
    exit_heads: str | None = None,
) -> Costs:
    """The least that each step can take: the larger of its bytes over bandwidth and its products over speed.

    A pass reads the weights of its layers (and head) and the keys and values of its context once, whatever its rows;
    it makes two operations for each weight and row.

    Parameters
    ----------
    source, drafter: what Dimensions.of takes.
    device: a name in DEVICES, or "cpu", whose bandwidth and speed are measured here, in a moment. By default the
        trace's, or the CPU.
    draft_rows: rows of the head that exit layers draft with; all by default.
    exit_heads: the name of the exit heads that they draft through: a map of width x width more. A trace's own by
        default.
    bandwidth, flops: bytes and operations a second, instead of a device's.
    dtype: of the weights; by default the trace's or the model's, or bfloat16.
    """
    model = Dimensions.of(source)
    helper = None if drafter is None else Dimensions.of(drafter)
    manifest = getattr(source, "manifest", None)
    dtype = str(dtype or getattr(manifest or source, "dtype", "bfloat16")).removeprefix("torch.")
    if dtype not in _BYTES:
        raise InputError(f"dtype {dtype!r} is not known: it is one of {', '.join(_BYTES)}.")
    name = str(device or getattr(manifest or source, "device", "cpu")).lower()
    if bandwidth is None or flops is None:
        roof = _roof(name, dtype)
        bandwidth, flops = bandwidth or roof.bandwidth, flops or roof.flops
    if not (bandwidth > 0 and flops > 0):
        raise InputError(f"a device moves and computes something: {bandwidth} bytes and {flops} operations a second.")
    if context < 0 or longest_draft < 1:
        raise InputError(f"a context of {context} and drafts of {longest_draft} tokens make no round.")
    exit_heads = exit_heads or getattr(manifest, "heads_name", None)
    share = 1.0 if draft_rows is None else check_draft_rows(draft_rows, model.vocabulary) / model.vocabulary

    def seconds(of: Dimensions, layers: int, heads: float, rows: int) -> float:
        weights = layers * of.layer_parameters + heads * of.head_parameters
        cached = layers * 2 * (of.key_value_width or 0) * context
        return max((weights + cached) * _BYTES[dtype] / bandwidth, 2 * weights * rows / flops)

    L = model.depth
    exits, widths = range(1, L), range(1, longest_draft + 2)
    return Costs(
        source="roofline",
        device=name,
        dtype=dtype,
        context=context if model.key_value_width is not None else 0,
        depth=L,
        autoregressive_s=seconds(model, L, 1, 1),
        early_s={exit_layer: seconds(model, exit_layer, 0, 1) for exit_layer in exits},
        head_s=seconds(model, 0, share + (0.0 if exit_heads is None else model.width / model.vocabulary), 1),
        verify_s={
            (exit_layer, rows): seconds(model, L - exit_layer, 1, rows) for exit_layer in exits for rows in widths
        },
        draft_rows=draft_rows,
        exit_heads=exit_heads,
        drafter=None if helper is None else helper.name,
        drafter_step_s=None if helper is None else seconds(helper, helper.depth, 1, 1),
        drafter_first_s=None if helper is None else seconds(helper, helper.depth, 1, 2),
        verify_all_s=None if helper is None else {rows: seconds(model, L, 1, rows) for rows in widths},
    )


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ENDLESS = 10**9


def _roof(name: str, dtype: str) -> Roof:
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        return _measured_roof()
    raise InputError(
        f"no roofline is known for {name!r}: it is cpu or one of {', '.join(DEVICES)}.",
        "Name one with --device, or measure the costs there.",
    )


def _measured_roof() -> Roof:
    """This processor's: the best of a few sums of an array far beyond the caches, and of float32 products."""
    array = np.ones(2**25, dtype=np.float32)
    matrix = np.ones((1024, 1024), dtype=np.float32)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    return Roof(array.nbytes / best(array.max), 2 * 1024**3 / best(lambda: matrix @ matrix))
