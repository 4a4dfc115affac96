"""The table times the costs: the best exit layer and draft length, its interval, the runners-up, or neither.

speedup = tokens x T_autoregressive / the sum over rounds of T_round(E, k), with the drafts k of each round as they are:
the last rounds of a text draft less. The interval is over prompts; the costs are taken as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from probekit.costs.profile import Costs
from probekit.errors import InputError
from probekit.html_tables import HtmlCell, grid_html
from probekit.prediction.intervals import bootstrap_ratio
from probekit.prediction.table import SELF, Cell, Prediction

SCHEMA = "probekit/choose/1"
RUNNERS_UP = 2


@dataclass(frozen=True)
class Candidate:
    """A way to decode, and what it should gain.

    method: "self-speculative", "speculative" (two models) or "autoregressive". exit_layer: None but for the first.
    speedup: over autoregressive decoding on the same engine, decoding only; its interval is over prompts, None with
    fewer than two.
    """

    method: str
    exit_layer: int | None
    draft_length: int
    drafter: str | None
    speedup: float
    interval: tuple[float, float] | None
    tokens_per_round: float | None = None
    acceptance_rate: float | None = None

    @property
    def label(self) -> str:
        if self.method == "autoregressive":
            return "no drafts"
        return f"layer {self.exit_layer}" if self.exit_layer is not None else str(self.drafter)

    @property
    def cell(self) -> tuple[int | None, int]:
        """(exit layer, draft length): what names it among the cells of a prediction."""
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


NO_DRAFTS = Candidate("autoregressive", None, 0, None, 1.0, (1.0, 1.0), 1.0)


@dataclass(frozen=True, eq=False)
class Choice:
    """What to do with this model on this device, and how sure that is.

    ranking: every way of drafting, the fastest first. methods: the best of each method, the fastest first;
    autoregressive decoding stands among them at 1.
    """

    model: str
    text: str
    ranking: tuple[Candidate, ...]
    costs: Costs
    prompts: int

    @property
    def draft_rows(self) -> int | None:
        """Rows of the head that exit layers draft with; None: all of them."""
        return self.costs.draft_rows

    @property
    def exit_heads(self) -> str | None:
        """The name of the exit heads that exit layers draft through; None: none."""
        return self.costs.exit_heads

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
    def methods(self) -> tuple[Candidate, ...]:
        best: dict[str, Candidate] = {"autoregressive": NO_DRAFTS}
        for candidate in self.ranking:
            best.setdefault(candidate.method, candidate)
        return tuple(sorted(best.values(), key=lambda each: -each.speedup))

    def sentence(self) -> str:
        """The recommendation, in one plain sentence or two."""
        costs = self.costs
        where = f"on {costs.device} in {costs.dtype} ({costs.source} costs, context {costs.context})"
        if not self.speculate:
            first = self.ranking[0]
            return (
                f"{self.model}: do not speculate {where}. The best that drafting could do, {_described(first)}, is "
                f"predicted to run at {_times(first)} the speed of plain autoregressive decoding."
            )
        best = self.best
        rate = "" if best.acceptance_rate is None else f", {best.acceptance_rate:.0%} of the drafts accepted"
        sentence = (
            f"{self.model}: draft with {_described(best)}; predicted to decode {_times(best)} as fast as plain "
            f"autoregressive decoding {where}, {best.tokens_per_round:.2f} tokens per round{rate}."
        )
        if best.interval is not None and best.interval[0] <= 1:
            sentence += " The interval reaches down to 1: on other prompts it may gain nothing."
        if self.exit_heads is not None and best.exit_layer is not None:
            sentence += " Drafts go through exit heads."
        if self.draft_rows is not None and best.exit_layer is not None:
            sentence += f" Drafts are chosen among the {self.draft_rows:,} most frequent tokens only."
        if self.text == "given":
            sentence += " Estimated from given text, which is taken for the model's own."
        return sentence

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
            "speedup": self.speedup,
            "interval": None if self.interval is None else list(self.interval),
            "speculate": self.speculate,
            "runners_up": [candidate.to_json() for candidate in self.runners_up],
            "methods": [candidate.to_json() for candidate in self.methods],
            "prompts": self.prompts,
            "sentence": self.sentence(),
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
        values = {candidate.cell: candidate.speedup for candidate in self.ranking}
        most = max(1.25, *values.values())
        drafter = next((candidate.drafter for candidate in self.ranking if candidate.drafter is not None), None)

        def cell(speedup: float) -> HtmlCell:
            if speedup < 1:
                return HtmlCell(f"{speedup:.2f}", 1 - speedup, "orange")
            return HtmlCell(f"{speedup:.2f}", (speedup - 1) / (most - 1))

        return f"<p>{escape(self.sentence())}</p>" + grid_html(
            "predicted speedup over exit layer E and draft length K: blue gains, orange loses, the frame is the choice",
            values, cell, framed=self.best.cell if self.speculate else None, drafter=drafter,
        )  # fmt: skip


def _described(candidate: Candidate) -> str:
    tokens = f"{candidate.draft_length} token{'s' if candidate.draft_length > 1 else ''} at a time"
    if candidate.exit_layer is None:
        return f"the model {candidate.drafter}, {tokens}"
    layers = "layer" if candidate.exit_layer == 1 else f"{candidate.exit_layer} layers"
    return f"the first {layers} (exit layer {candidate.exit_layer}), {tokens}"


def _times(candidate: Candidate) -> str:
    if candidate.interval is None:
        return f"{candidate.speedup:.2f}x"
    return f"{candidate.speedup:.2f}x [{candidate.interval[0]:.2f}, {candidate.interval[1]:.2f}]"


def choose(prediction: Prediction, costs: Costs) -> Choice:
    """Rank no drafting, self-speculative decoding at every pair and, where there is a draft model, two-model decoding.

    Cells that the costs do not know, and cells without a round, are left out.

    Raises InputError when no cell is left, or the costs are of a model of another depth or of another draft head.
    """
    check_draft_head(prediction.draft_rows, prediction.exit_heads, costs)
    exits = [cell.exit_layer for cell in prediction.cells if cell.exit_layer is not None]
    unknown = sorted({exit_layer for exit_layer in exits if exit_layer not in costs.early_s})
    if unknown:
        raise InputError(
            f"these costs are of a model with exits 1..{costs.depth - 1}; the prediction has exit layer {unknown[0]}.",
            "Measure them on the model that was traced.",
        )
    cells = [
        cell
        for cell in prediction.cells
        if cell.rounds
        and cell.draft_length <= costs.longest_draft
        and (cell.exit_layer is not None or cell.drafter == costs.drafter)
    ]
    if not cells:
        raise InputError(
            "there is nothing to choose from: no cell of the prediction has a round whose cost is known.",
            "Trace more tokens, or measure costs for these draft lengths and this draft model.",
        )
    plain = np.array([cell.tokens_of_prompt * costs.autoregressive_s for cell in cells])
    drafting = np.array([decoding_seconds(cell, costs) for cell in cells])
    low, high = bootstrap_ratio(plain, drafting)
    ratio = plain.sum(axis=1) / drafting.sum(axis=1)
    candidates = [
        Candidate(
            method="self-speculative" if cell.drafter == SELF else "speculative",
            exit_layer=cell.exit_layer,
            draft_length=cell.draft_length,
            drafter=None if cell.drafter == SELF else cell.drafter,
            speedup=float(ratio[place]),
            interval=None if np.isnan(low[place]) else (float(low[place]), float(high[place])),
            tokens_per_round=cell.tokens_per_round,
            acceptance_rate=cell.acceptance_rate,
        )
        for place, cell in enumerate(cells)
    ]
    ranking = tuple(sorted(candidates, key=lambda each: -each.speedup))
    return Choice(prediction.model, prediction.text, ranking, costs, len(prediction.prompts))


def check_draft_head(draft_rows: int | None, exit_heads: str | None, costs: Costs) -> None:
    """Raise InputError for costs of another draft head, or of other exit heads, than those that are predicted."""

    def head(rows: int | None, exit_heads: str | None) -> str:
        whole = "drafts with the whole head" if rows is None else f"a draft head of {rows:,} rows"
        return whole if exit_heads is None else f"{whole} behind exit heads {exit_heads}"

    if (draft_rows, exit_heads) != (costs.draft_rows, costs.exit_heads):
        raise InputError(
            f"the prediction is for {head(draft_rows, exit_heads)}, and these costs are of "
            f"{head(costs.draft_rows, costs.exit_heads)}.",
            "Make the costs with the same draft head.",
        )


def decoding_seconds(cell: Cell, costs: Costs) -> np.ndarray:
    """(prompts,) predicted seconds of each prompt's rounds."""
    return cell.rounds_by_drafted @ costs.rounds_seconds(cell.exit_layer, cell.draft_length)


def speedups(cells: Sequence[Cell], costs: Costs) -> list[float | None]:
    """The predicted speedup of each cell; None for a cell without a round."""
    seconds = [float(decoding_seconds(cell, costs).sum()) for cell in cells]
    return [
        cell.tokens * costs.autoregressive_s / total if total else None
        for cell, total in zip(cells, seconds, strict=True)
    ]
