"""The table times the costs: the best exit layer and draft length, its interval, the runners-up, or neither.

speedup = tokens x T_autoregressive / the sum over rounds of T_round(E, k), with the drafts k of each round as they are:
the last rounds of a text draft less. Intervals are over prompts and blocks of the calibration, and joint: the fastest
was selected for being so, and its interval knows (`certainty`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from probekit.choice.certainty import CALIBRATIONS, BatchSeconds, Certainty, batch_certainty, certainty
from probekit.choice.ranking import Ranked, Ranking
from probekit.costs.batch import BatchCosts
from probekit.costs.profile import Costs
from probekit.drafting.drafters import Drafter
from probekit.drafting.keys import NGRAM, DrafterKey
from probekit.drafting.policies import FIXED, Policy
from probekit.errors import InputError
from probekit.html_tables import HtmlCell
from probekit.prediction.grids import grid_html
from probekit.prediction.intervals import FEW_PROMPTS, interval_of
from probekit.prediction.joint import check_batch, in_order, own_rounds, rounds_of_prompts
from probekit.prediction.predict import predict
from probekit.prediction.table import Cell, Prediction
from probekit.settings import Sampling
from probekit.traces.trace import Trace, as_trace

SCHEMA = "probekit/choose/1"
RUNNERS_UP = 2


@dataclass(frozen=True)
class Candidate:
    """A way to decode, and what it should gain.

    drafts: who drafts; None for autoregressive decoding, where nobody does.
    speedup: over autoregressive decoding on the same engine, decoding only; its interval is over prompts and blocks of
    the calibration, jointly with all others of a ranking; None with few prompts. alike: it cannot be told apart from
    the fastest on these prompts and costs.
    """

    drafts: Drafter | None
    draft_length: int
    speedup: float
    interval: tuple[float, float] | None
    tokens_per_round: float | None = None
    acceptance_rate: float | None = None
    alike: bool = False

    @property
    def key(self) -> DrafterKey | None:
        return None if self.drafts is None else self.drafts.key

    @property
    def method(self) -> str:
        """The method: self-speculative, speculative (two models) or autoregressive."""
        return "autoregressive" if self.key is None else self.key.method

    @property
    def exit_layer(self) -> int | None:
        """E, as tables and JSON hold it: null for the other methods."""
        return None if self.key is None else self.key.exit_or_null

    @property
    def drafter(self) -> str | None:
        """The name of the draft model, as JSON holds it: null for the other methods."""
        return None if self.key is None or self.key.is_exit else self.key.model

    @property
    def label(self) -> str:
        return "no drafts" if self.key is None else self.key.label

    @property
    def cell(self) -> tuple[int | None, int]:
        """(exit layer, draft length), as tables and JSON name it."""
        return self.exit_layer, self.draft_length

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafter": self.drafter,
            "speedup": self.speedup,
            "interval": None if self.interval is None else list(self.interval),
        }


NO_DRAFTS = Candidate(None, 0, 1.0, None, 1.0)


@dataclass(frozen=True, eq=False)
class Choice:
    """What to do with this model on this device, and how sure that is.

    ranking: every way of drafting, the fastest first. methods: the best of each method, the fastest first;
    autoregressive decoding is among them, at 1. prompts: how many it was made on. policy: when rounds stop drafting
    early. sampling: how the text was chosen; its seed is none of the choice's. ways: every other way of drafting beside
    these, with the same costs on the same texts; None where nobody ranked them.

    A decoder takes it as it is: `probekit.decode(model, prompt, choice)`; and `choice.ways` for the best of all ways.
    """

    model: str
    text: str
    ranking: tuple[Candidate, ...]
    costs: Costs
    prompts: int
    policy: Policy = FIXED
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    ways: Ranking | None = None

    def __repr__(self) -> str:
        return f"Choice({self.sentence()})"

    @property
    def draft_rows(self) -> int | None:
        """Rows of the head that exit layers draft with; None: all of them."""
        return self.costs.draft_head.rows

    @property
    def exit_heads(self) -> str | None:
        """The name of the exit heads that exit layers draft through; None: none."""
        return self.costs.draft_head.exit_heads

    @property
    def few_prompts(self) -> bool:
        """Whether it was made on too few prompts to be relied on: intervals are then narrower than they say."""
        return self.prompts < FEW_PROMPTS

    @property
    def best(self) -> Candidate:
        """The fastest way of all: NO_DRAFTS where nothing exceeds 1."""
        return self.ranking[0] if self.ranking[0].speedup > 1 else NO_DRAFTS

    @property
    def speculate(self) -> bool:
        return self.best is not NO_DRAFTS

    @property
    def method(self) -> str:
        return self.best.method

    @property
    def exit_layer(self) -> int | None:
        return self.best.exit_layer

    @property
    def draft_length(self) -> int | None:
        return self.best.draft_length if self.speculate else None

    @property
    def drafter(self) -> str | None:
        return self.best.drafter

    @property
    def speedup(self) -> float:
        return self.best.speedup

    @property
    def interval(self) -> tuple[float, float] | None:
        return self.best.interval

    @property
    def runners_up(self) -> tuple[Candidate, ...]:
        """The next best ways of drafting; without speculation, the best ones that were refused."""
        first = 1 if self.speculate else 0
        return self.ranking[first : first + RUNNERS_UP]

    @property
    def alike(self) -> tuple[Candidate, ...]:
        """The other ways of drafting that cannot be told apart from the fastest, on these prompts and these costs."""
        return tuple(candidate for candidate in self.ranking[1:] if candidate.alike)

    @property
    def way(self) -> Ranked | None:
        """The fastest of all ways, lookups, policies and trees among them; None where nobody ranked them."""
        return None if self.ways is None else self.ways.best

    @property
    def other_way(self) -> Ranked | None:
        """The fastest of all ways where it is faster than the choice; None where nothing is, or nobody ranked them."""
        if self.ways is None or not self.ways.beats(self.speedup):
            return None
        return self.ways.best if self.ways.best.way is not None else None

    @property
    def methods(self) -> tuple[Candidate, ...]:
        best: dict[str, Candidate] = {"autoregressive": NO_DRAFTS}
        for candidate in self.ranking:
            best.setdefault(candidate.method, candidate)
        return tuple(sorted(best.values(), key=lambda each: -each.speedup))

    def sentence(self) -> str:
        """The recommendation, in one plain sentence or two."""
        return self.pair_sentence() + self.ways_sentence()

    def ways_sentence(self) -> str:
        """What all other ways add, to follow the pair's sentence; empty where nobody ranked them."""
        return "" if self.ways is None else self.ways.beside(self.speedup)

    def pair_sentence(self) -> str:
        """The recommendation among exit layers, draft lengths and the draft model."""
        costs = self.costs
        rows = f", {costs.rows} rows" if costs.rows > 1 else ""
        where = f"on {costs.device} in {costs.dtype} ({costs.source} costs, context {costs.context}{rows})"
        if not self.speculate:
            first, refused = self.ranking[0], "do not speculate"
            if self.other_way is not None:
                tried = {each.method for each in self.ranking}
                refused = "neither an exit layer nor the draft model pays" if len(tried) > 1 else "no exit layer pays"
            return (
                f"{self.model}: {refused} {where}. The best that {'drafting' if self.other_way is None else 'they'} "
                f"could do, {_described(first)}, is predicted to run at {_times(first)} the speed of plain "
                "autoregressive decoding." + self._caution()
            )
        best = self.best
        rate = "" if best.acceptance_rate is None else f", {best.acceptance_rate:.0%} of the drafts accepted"
        sentence = (
            f"{self.model}: draft with {_described(best)}; predicted to decode {_times(best)} as fast as plain "
            f"autoregressive decoding {where}, {best.tokens_per_round:.2f} tokens per round{rate}."
        )
        if best.interval is not None and best.interval[0] <= 1:
            sentence += " The interval reaches down to 1: on other prompts it may gain nothing."
        if self.exit_heads is not None and best.drafter is None:
            sentence += " Drafts go through exit heads."
        if self.draft_rows is not None and best.drafter is None:
            sentence += f" Drafts are chosen among the {self.draft_rows:,} most frequent tokens only."
        if self.text == "given":
            sentence += " Estimated from given text, which is taken for the model's own."
        return sentence + self._alike_sentence() + self._caution()

    def _alike_sentence(self) -> str:
        """Which ways are as good as the chosen one, as far as anybody can tell."""
        if self.few_prompts or not self.alike:
            return ""
        first = self.alike[0]
        named = f"{first.label}, {first.draft_length} token{'s' if first.draft_length > 1 else ''}"
        if len(self.alike) == 1:
            return f" It cannot be told apart from {named}."
        return f" It cannot be told apart from {len(self.alike)} others, {named} the next."

    def _caution(self) -> str:
        told = ""
        if self.best.speedup > (self.best.tokens_per_round or math.inf):
            told = (" These costs let a round, which verifies, take less than a plain step: time them again on a quiet "
                    "machine.")  # fmt: skip
        if self.few_prompts:
            told += f" From {self.prompts} prompt{'s' if self.prompts > 1 else ''} only: take at least {FEW_PROMPTS}."
        return told

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "text": self.text,
            "method": self.method,
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafter": self.drafter,
            "draft_rows": self.draft_rows,
            "exit_heads": self.exit_heads,
            **({} if self.policy == FIXED else {"policy": str(self.policy)}),
            "speedup": self.speedup,
            "interval": None if self.interval is None else list(self.interval),
            "speculate": self.speculate,
            "runners_up": [candidate.to_json() for candidate in self.runners_up],
            "methods": [candidate.to_json() for candidate in self.methods],
            "prompts": self.prompts,
            "few_prompts": self.few_prompts,
            "alike": [candidate.to_json() for candidate in self.alike],
            "calibration_blocks": self.costs.block_count,
            "sentence": self.sentence(),
            **({} if self.ways is None else self.ways.for_choice()),
            "costs": self.costs.to_json(),
        }

    def to_pandas(self) -> pd.DataFrame:
        """A row a way of drafting, the fastest first; the interval as `speedup_low`, `speedup_high`."""
        rows = []
        for candidate in self.ranking:
            low, high = candidate.interval or (np.nan, np.nan)
            row = candidate.to_json()
            del row["interval"]
            rows.append({"model": self.model, **row, "speedup_low": low, "speedup_high": high})
        return pd.DataFrame(rows).astype({"exit_layer": "Int64"})

    def _repr_html_(self) -> str:
        values = {(each.key, each.draft_length): each.speedup for each in self.ranking if each.key is not None}
        best = None if self.best.key is None else (self.best.key, self.best.draft_length)
        most = max(1.25, *values.values())

        def cell(speedup: float) -> HtmlCell:
            if speedup < 1:
                return HtmlCell(f"{speedup:.2f}", 1 - speedup, "orange")
            return HtmlCell(f"{speedup:.2f}", (speedup - 1) / (most - 1))

        return f"<p>{escape(self.sentence())}</p>" + grid_html(
            "predicted speedup over exit layer E and draft length K: blue gains, orange loses, the frame is the choice",
            values, cell, framed=best,
        )  # fmt: skip


def _described(candidate: Candidate) -> str:
    tokens = f"{candidate.draft_length} token{'s' if candidate.draft_length > 1 else ''} at a time"
    if candidate.key is not None and candidate.key.kind == NGRAM:
        return f"prompt lookup ({candidate.key.model}), {tokens}"
    if candidate.drafter is not None:
        return f"the model {candidate.drafter}, {tokens}"
    layers = "layer" if candidate.exit_layer == 1 else f"{candidate.exit_layer} layers"
    return f"the first {layers} (exit layer {candidate.exit_layer}), {tokens}"


def _times(candidate: Candidate) -> str:
    if candidate.interval is None:
        return f"{candidate.speedup:.2f}x"
    return f"{candidate.speedup:.2f}x [{candidate.interval[0]:.2f}, {candidate.interval[1]:.2f}]"


def choose(prediction: Prediction | Trace, costs: Costs | BatchCosts, *, ways: Ranking | None = None) -> Choice:
    """Rank no drafting, self-speculative decoding at every pair and, where there is a draft model, two-model decoding.

    A prediction of what another engine has (`engines.inside`) has its prompt lookups, too.

    Cells that the costs do not know, and cells without a round, are left out.

    prediction: of `predict`; a trace is predicted first, at every exit layer and draft length.
    costs: of `measure_costs` or `roofline_costs`; of `measure_batch` for a batch of the decoder here, which starts
        together and empties: the prediction is then of greedy text, `with_rounds`, and of as many prompts as rows.
    ways: of `rank`, on the same texts and costs, to choose among all ways of drafting as well.

    Raises InputError when no cell is left, or the costs are of a model of another depth or of another draft head.

    Examples
    --------
    >>> import probekit
    >>> from probekit.costs.roofline import roofline_costs
    >>> trace = probekit.trace("tales-layerskip", ["Once upon a time"], max_new_tokens=16)
    >>> choice = probekit.choose(trace, roofline_costs(trace, device="h100", dtype="bfloat16"))
    >>> choice.prompts, choice.few_prompts
    (1, True)
    """
    several = costs if isinstance(costs, BatchCosts) else None
    costs = costs.whole if isinstance(costs, BatchCosts) else costs
    if not isinstance(costs, Costs):
        raise InputError(
            f"the costs are a {type(costs).__name__}; expected those of a device.",
            "Give probekit.measure_costs(model), or roofline_costs(trace) of probekit.costs.roofline.",
        )
    if not isinstance(prediction, Prediction):
        prediction = predict(as_trace(prediction), with_rounds=several is not None)
    if several is not None:
        check_batch(prediction, several.rows)
    costs.check_draft_head(prediction.keys)
    if ways is not None and (ways.model, ways.text, ways.prompts) != (
        prediction.model,
        prediction.text,
        prediction.prompts,
    ):
        raise InputError("these ways were ranked on other texts than the prediction.", "Rank the same trace.")
    unknown = sorted(key.exit_layer for key in prediction.keys if key.is_exit and not costs.knows(key))
    if unknown and costs.early_s:
        raise InputError(
            f"these costs are of a model with exits 1..{costs.depth - 1}; the prediction has exit layer {unknown[0]}.",
            "Measure them on the model that was traced.",
        )
    cells = [
        cell
        for cell in prediction.cells
        if cell.rounds and cell.draft_length <= (several or costs).longest_draft and costs.knows(cell.key)
    ]
    if not cells:
        raise InputError(
            "there is nothing to choose from: no cell of the prediction has a round whose cost is known.",
            "Trace more tokens, or measure costs for these draft lengths and this draft model.",
        )
    if several is None:
        plain = np.array([cell.tokens_of_prompt * costs.autoregressive_s for cell in cells])
        drafting = np.array([decoding_seconds(cell, costs) for cell in cells])
        sure, ratio = certainty(cells, costs), plain.sum(axis=1) / drafting.sum(axis=1)
    else:
        sure, ratio = _of_batches(prediction, cells, several)
    candidates = [
        Candidate(
            drafts=cell.drafts,
            draft_length=cell.draft_length,
            speedup=float(ratio[place]),
            interval=interval_of(sure.low[place], sure.high[place], len(prediction.prompts)),
            alike=bool(sure.alike[place]),
            tokens_per_round=cell.tokens_per_round,
            acceptance_rate=cell.acceptance_rate,
        )
        for place, cell in enumerate(cells)
    ]
    ranking = tuple(sorted(candidates, key=lambda each: -each.speedup))
    how = prediction.decoding
    return Choice(
        prediction.model, prediction.text, ranking, costs, len(prediction.prompts), prediction.policy,
        Sampling(how["temperature"], int(how.get("top_k", 0)), how.get("top_p", 1.0)), ways,
    )  # fmt: skip


def _of_batches(prediction: Prediction, cells: Sequence[Cell], costs: BatchCosts) -> tuple[Certainty, np.ndarray]:
    """How sure the speedups of batches of consecutive prompts are, and these, (cells,)."""
    steps = own_rounds([0] * int(tokens) for tokens in cells[0].tokens_of_prompt)
    drafted = [rounds_of_prompts(prediction, cell.key, cell.draft_length) for cell in cells]

    def by(given: BatchCosts) -> BatchSeconds:
        rounds = [given.rounds_seconds(cell.drafts, cell.draft_length) for cell in cells]
        return BatchSeconds(drafted, steps, given.plain_seconds(), rounds)

    seconds = by(costs)
    again = [by(each) for each in costs.redrawn(CALIBRATIONS)]
    ratio = seconds.speedups(in_order(len(steps), costs.rows))
    return batch_certainty(seconds, again, costs.rows, costs.whole.block_count), ratio


def decoding_seconds(cell: Cell, costs: Costs) -> np.ndarray:
    """(prompts,) predicted seconds of each prompt's rounds."""
    return cell.rounds_by_drafted @ costs.rounds_seconds_of(cell.drafts, cell.draft_length)


def speedups(cells: Sequence[Cell], costs: Costs) -> list[float | None]:
    """The predicted speedup of each cell; None for a cell without a round, or whose drafter was not timed."""
    seconds = [float(decoding_seconds(cell, costs).sum()) if costs.knows(cell.key) else 0.0 for cell in cells]
    return [
        cell.tokens * costs.autoregressive_s / total if total else None
        for cell, total in zip(cells, seconds, strict=True)
    ]
