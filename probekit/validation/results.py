"""Cells that were predicted and run, side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from probekit.drafting.keys import DrafterKey, NamedByKey
from probekit.drafting.policies import FIXED, Policy
from probekit.html_tables import Colour, HtmlCell, html_table
from probekit.validation.differences import Difference

SCHEMA = "probekit/validate/1"


@dataclass(frozen=True, eq=False)
class CellValidation(NamedByKey):
    """One cell, predicted and run on the same prompts.

    predicted, measured: counts: rounds, drafted, accepted, tokens. For sampled text expected counts, and the mean of
    the decoder's runs.
    rounds_equal, tokens_equal: every round as predicted; every token as autoregressive decoding gives it. None for
        sampled text.
    differences: where not, each place once.
    excusable_share: of the output positions, those near a tie of the drafter or the model, where a difference would
        count as explained: the more there are, the less `holds` says. None for sampled text.
    differ_interval: {count: (low, high)} of measured - predicted, for sampled text only: joint 95 % intervals of the
        three counts of all cells of a validation (Bonferroni: each at 1 - 5 % / counts), by bootstrap over prompts.
    speedup_measured: time of autoregressive decoding over the cell's, decoding only, all prompts together, the median
        of each prompt's runs; end to end, with the prefill. speedup_measured_quantiles: 20 % and 80 % of single runs.
    rounds: (prompt, round, drafted, accepted as predicted, accepted as measured), greedy text only.
    """

    key: DrafterKey
    draft_length: int
    prompts: int
    predicted: dict[str, float]
    measured: dict[str, float]
    rounds_equal: bool | None
    tokens_equal: bool | None
    differences: tuple[Difference, ...]
    differ_interval: dict[str, tuple[float, float] | None] | None
    speedup_predicted: float | None
    speedup_measured: float | None
    speedup_measured_quantiles: tuple[float, float] | None
    speedup_measured_end_to_end: float | None
    rounds: tuple[tuple[int, int, int, int | None, int | None], ...]
    excusable_share: float | None = None

    @property
    def ties(self) -> int:
        return sum(difference.kind == "near-tie" for difference in self.differences)

    @property
    def unexplained(self) -> int:
        return len(self.differences) - self.ties

    @property
    def within_interval(self) -> bool | None:
        """Sampled text: every interval of measured - predicted holds 0."""
        if self.differ_interval is None:
            return None
        return all(pair is None or pair[0] <= 0 <= pair[1] for pair in self.differ_interval.values())

    def shaded(self) -> list[HtmlCell]:
        """A row of the table that a notebook shows: counts, what was equal, speedups."""
        counts = [
            HtmlCell(f"{side[name]:,.0f}" if float(side[name]).is_integer() else f"{side[name]:,.1f}")
            for name in ("rounds", "accepted")
            for side in (self.predicted, self.measured)
        ]
        equal = [
            HtmlCell("-") if same is None else HtmlCell("yes" if same else "no", 0.5, "blue" if same else "orange")
            for same in (self.rounds_equal, self.tokens_equal)
        ]
        odd = [HtmlCell(str(self.ties)), HtmlCell(str(self.unexplained), float(self.unexplained > 0), "orange")]
        speedups = [
            HtmlCell("-") if speedup is None else HtmlCell(f"{speedup:.2f}", abs(speedup - 1), _colour(speedup))
            for speedup in (self.speedup_predicted, self.speedup_measured)
        ]
        return [HtmlCell(str(self.draft_length)), HtmlCell(str(self.prompts)), *counts, *equal, *odd, *speedups]

    def to_json(self) -> dict[str, Any]:
        quantiles = self.speedup_measured_quantiles
        document: dict[str, Any] = {
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafter": self.drafter,
            "prompts": self.prompts,
            "predicted": self.predicted,
            "measured": self.measured,
            "rounds_equal": self.rounds_equal,
            "tokens_equal": self.tokens_equal,
            "ties": self.ties,
            "unexplained": self.unexplained,
            "excusable_share": self.excusable_share,
            "differences": [asdict(difference) for difference in self.differences],
            "speedup_predicted": self.speedup_predicted,
            "speedup_measured": self.speedup_measured,
            "speedup_measured_quantiles": None if quantiles is None else list(quantiles),
            "speedup_measured_end_to_end": self.speedup_measured_end_to_end,
        }
        if self.differ_interval is not None:
            listed = {name: None if pair is None else list(pair) for name, pair in self.differ_interval.items()}
            document |= {"difference_interval": listed, "within_interval": self.within_interval}
        return document


def _colour(speedup: float) -> Colour:
    return "blue" if speedup >= 1 else "orange"


@dataclass(frozen=True, eq=False)
class Validation:
    """Cells that were run, beside what was predicted of them."""

    model: str
    text: str
    cells: tuple[CellValidation, ...]
    draft_rows: int | None = None
    exit_heads: str | None = None
    policy: Policy = FIXED

    @property
    def holds(self) -> bool:
        """No difference but near-ties; for sampled text, every count within its interval."""
        return all(cell.unexplained == 0 and cell.within_interval is not False for cell in self.cells)

    def rounds_json(self) -> list[dict[str, Any]]:
        """A row a round: its cell, prompt, round, drafted, accepted_predicted, accepted_measured.

        Where the decoder left the prediction, one of the two may have more rounds; the other's are null.
        """
        names = ("prompt", "round", "drafted", "accepted_predicted", "accepted_measured")
        return [
            {"exit_layer": cell.exit_layer, "draft_length": cell.draft_length, "drafter": cell.drafter}
            | dict(zip(names, row, strict=True))
            for cell in self.cells
            for row in cell.rounds
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "text": self.text,
            "draft_rows": self.draft_rows,
            "exit_heads": self.exit_heads,
            **({} if self.policy == FIXED else {"policy": str(self.policy)}),
            "cells": [cell.to_json() for cell in self.cells],
        }

    def __repr__(self) -> str:
        held = "holds" if self.holds else "does not hold"
        return f"Validation({self.model}: {len(self.cells)} cells, {self.text} text, {held})"

    def to_pandas(self) -> pd.DataFrame:
        """A row a cell; counts as `predicted_*` and `measured_*`."""
        rows = []
        for cell in self.cells:
            row = cell.to_json()
            for name in ("differences", "difference_interval"):
                row.pop(name, None)
            low, high = row.pop("speedup_measured_quantiles") or (np.nan, np.nan)
            for side in ("predicted", "measured"):
                row |= {f"{side}_{name}": value for name, value in row.pop(side).items()}
            rows.append({"model": self.model, **row, "speedup_measured_20": low, "speedup_measured_80": high})
        return pd.DataFrame(rows).astype({"exit_layer": "Int64"})

    def _repr_html_(self) -> str:
        heads = ["K", "prompts", "rounds predicted", "measured", "accepted predicted", "measured", "rounds equal",
                 "tokens equal", "near-ties", "unexplained", "speedup predicted", "measured"]  # fmt: skip
        return html_table(
            f"{self.model}: the prediction beside the running decoder, {self.text} text; speedups: blue gains, "
            "orange loses",
            "drafts at", heads, [(cell.label, cell.shaded()) for cell in self.cells],
        )  # fmt: skip
