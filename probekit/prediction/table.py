"""The table over (exit layer, draft length): counts of each prompt, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probekit.drafting.drafters import Drafter, sizes_of
from probekit.drafting.keys import DrafterKey, NamedByKey
from probekit.drafting.policies import FIXED, Policy
from probekit.errors import InputError
from probekit.html_tables import HtmlCell
from probekit.prediction.grids import grid_html
from probekit.prediction.intervals import listed
from probekit.prediction.rounds import closed_form_tokens_per_round, within_budget

SCHEMA = "probekit/predict/1"


@dataclass(frozen=True, eq=False)
class Cell(NamedByKey):
    """What one drafter does at one draft length K: counts of each prompt, and what follows from them.

    Counts are whole for greedy text and expected ones otherwise.

    Parameters
    ----------
    drafts: who drafts.
    tokens_of_prompt: (prompts,) tokens that rounds emit.
    rounds_by_drafted: (prompts, K + 1) rounds with 0, 1, ... K drafts, one after the other; of a tree, levels.
    accepted_at: (prompts, K) rounds that accept their first, second, ... draft.
    rejections_of_prompt: (prompts,) rounds that a rejection ended.
    expected_acceptance: mean over the generated tokens of the sum of min(p, q), the chance that one draft is accepted
        (arXiv 2211.17192, definition 3.1 and corollary 3.6); only for text that is not greedy.
    near_ties: output positions where the drafter's or the model's two top logits are closer than the noise: only
        there may a greedy decoder differ from the prediction. None for text that is not greedy.
    counts_interval: {"rounds", "drafted", "accepted"} over prompts, for expected counts only.
    """

    drafts: Drafter
    draft_length: int
    tokens_of_prompt: np.ndarray
    rounds_by_drafted: np.ndarray
    accepted_at: np.ndarray
    rejections_of_prompt: np.ndarray
    acceptance_rate_interval: tuple[float, float] | None = None
    tokens_per_round_interval: tuple[float, float] | None = None
    expected_acceptance: float | None = None
    near_ties: int | None = None
    counts_interval: dict[str, tuple[float, float] | None] | None = None

    def __repr__(self) -> str:
        return (
            f"Cell({self.label}, {self.draft_length} drafts: {self.tokens:,} tokens in {self.rounds:,.6g} rounds, "
            f"{self.accepted:,.6g} of {self.drafted:,.6g} drafts accepted)"
        )

    @property
    def key(self) -> DrafterKey:  # type: ignore[override]
        return self.drafts.key

    @property
    def cell(self) -> tuple[int | None, int]:
        """(exit layer, draft length), as tables and JSON name it."""
        return self.exit_layer, self.draft_length

    @property
    def prompts(self) -> int:
        return len(self.tokens_of_prompt)

    @property
    def tokens(self) -> int:
        return int(self.tokens_of_prompt.sum())

    @property
    def rounds_of_prompt(self) -> np.ndarray:
        return self.rounds_by_drafted.sum(axis=1)

    @property
    def drafted_of_prompt(self) -> np.ndarray:
        return self.rounds_by_drafted @ sizes_of(self.drafts, self.draft_length)

    @property
    def accepted_of_prompt(self) -> np.ndarray:
        return self.accepted_at.sum(axis=1)

    @property
    def rounds(self) -> int | float:
        return self.rounds_by_drafted.sum().item()

    @property
    def drafted(self) -> int | float:
        return self.drafted_of_prompt.sum().item()

    @property
    def accepted(self) -> int | float:
        return self.accepted_at.sum().item()

    @property
    def rejections(self) -> int | float:
        return self.rejections_of_prompt.sum().item()

    @property
    def accepted_by_position(self) -> list[int] | list[float]:
        return self.accepted_at.sum(axis=0).tolist()

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def alpha(self) -> float | None:
        trials = self.accepted + self.rejections
        return self.accepted / trials if trials else None

    @property
    def tokens_per_round(self) -> float | None:
        return self.tokens / self.rounds if self.rounds else None

    @property
    def tokens_per_round_closed_form(self) -> float | None:
        """An estimate beside the exact figure, which assumes independent acceptances; papers quote it."""
        return closed_form_tokens_per_round(self.alpha, self.draft_length)

    def counts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("rounds", "drafted", "accepted", "tokens")}

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafter": self.drafter,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "rejections": self.rejections,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_rate_interval": listed(self.acceptance_rate_interval),
            "alpha": self.alpha,
            "tokens_per_round": self.tokens_per_round,
            "tokens_per_round_interval": listed(self.tokens_per_round_interval),
            "tokens_per_round_closed_form_estimate": self.tokens_per_round_closed_form,
            "accepted_by_position": self.accepted_by_position,
        }
        if self.expected_acceptance is not None:
            document["expected_acceptance"] = self.expected_acceptance
        if self.near_ties is not None:
            document["near_ties"] = self.near_ties
        if self.counts_interval is not None:
            document["counts_interval"] = {name: listed(pair) for name, pair in self.counts_interval.items()}
        return document


class PromptRounds(NamedTuple):
    """The rounds of one prompt in one cell; for text that is not greedy, w of each position instead."""

    prompt: int
    key: DrafterKey
    draft_length: int
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    accept_probability: tuple[float, ...] | None = None

    @property
    def exit_layer(self) -> int | None:
        """E, as tables and JSON hold it: null where a draft model drafts."""
        return self.key.exit_or_null

    def to_json(self) -> dict[str, Any]:
        keys = {
            "prompt": self.prompt,
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "drafter": self.key.model,
        }
        if self.accept_probability is not None:
            return keys | {"accept_probability": list(self.accept_probability)}
        return keys | {"drafted": list(self.drafted), "accepted": list(self.accepted)}


@dataclass(frozen=True, eq=False)
class Prediction:
    """The table over (exit layer, draft length), read off one trace.

    text: "greedy", "sampled" or "given". exact: False for given text, which is taken for a sample of the model.
    decoding: the run's temperature, top_k, top_p. budget: M. prompts: their indices. rounds: only when asked for.
    draft_rows: F, the rows of the head that exit layers draft with; None: all of them.
    exit_heads: the name (fingerprint) of the exit heads that exit layers draft through; None: none.
    policy: when rounds stop drafting early; JSON names it only where it is not the fixed length.
    """

    model: str
    text: str
    decoding: dict[str, float]
    first_round: str
    budget: int
    exact: bool
    prompts: tuple[int, ...]
    cells: tuple[Cell, ...]
    rounds: tuple[PromptRounds, ...] | None = None
    draft_rows: int | None = None
    exit_heads: str | None = None
    policy: Policy = FIXED

    def __repr__(self) -> str:
        size = f"{len(self.cells)} cells on {len(self.prompts)} prompts of {self.text} text"
        return f"Prediction({self.model}: {size}, {'exact' if self.exact else 'estimated'})"

    @property
    def keys(self) -> list[DrafterKey]:
        """The drafters of the cells, each once, in their order."""
        return list(dict.fromkeys(cell.key for cell in self.cells))

    def cell(self, drafter: DrafterKey | int | None, draft_length: int) -> Cell:
        """The cell of a drafter and a draft length.

        drafter: its key; or an exit layer, or None for the draft model, as JSON names them.
        """
        lengths = draft_length, *within_budget([draft_length], self.budget)
        for cell in self.cells:
            if cell.key.names(drafter) and cell.draft_length in lengths:
                return cell
        raise InputError(f"this prediction has no cell for exit layer {drafter} and draft length {draft_length}.")

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "text": self.text,
            "decoding": dict(self.decoding),
            "first_round": self.first_round,
            "budget": self.budget,
            "draft_rows": self.draft_rows,
            "exit_heads": self.exit_heads,
            "exact": self.exact,
            **({} if self.policy == FIXED else {"policy": str(self.policy)}),
            "cells": [cell.to_json() for cell in self.cells],
        }
        if self.rounds is not None:
            document["rounds"] = [rounds.to_json() for rounds in self.rounds]
        return document

    def to_pandas(self) -> pd.DataFrame:
        """A row a cell, with the JSON's keys as columns; intervals as `_low` and `_high`."""
        rows = []
        for cell in self.cells:
            row = {"model": self.model, "text": self.text, "first_round": self.first_round, **cell.to_json()}
            row.pop("counts_interval", None)
            for name in ("acceptance_rate", "tokens_per_round"):
                low, high = row.pop(f"{name}_interval") or (np.nan, np.nan)
                row |= {f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        return pd.DataFrame(rows).astype({"exit_layer": "Int64"})

    def _repr_html_(self) -> str:
        longest = max(2.0, *(cell.tokens_per_round or 1.0 for cell in self.cells))
        about = f"{self.model}: {len(self.prompts)} prompts, {self.text} text, first round: {self.first_round}"
        rates = grid_html(
            "acceptance rate over exit layer E and draft length K",
            {(cell.key, cell.draft_length): cell.acceptance_rate for cell in self.cells},
            lambda rate: HtmlCell(f"{rate:.2f}", rate),
        )
        per_round = grid_html(
            "tokens per round",
            {(cell.key, cell.draft_length): cell.tokens_per_round for cell in self.cells},
            lambda tokens: HtmlCell(f"{tokens:.2f}", (tokens - 1) / (longest - 1)),
        )
        return f"<p>{escape(about)}</p>{rates}{per_round}"
