"""A study folder as the figures read it: checked when asked, each failure one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from probekit.errors import InputError
from probekit.traces.trace import Trace

SCHEMA = "probekit/study/1"

TABLES: dict[str, tuple[str, ...]] = {
    "layers": ("model", "lens", "layer", "agreement", "agreement_low", "agreement_high", "echo", "entropy", "kl"),
    "cells": ("model", "drafter", "exit_layer", "draft_length", "acceptance_rate", "tokens_per_round", "speedup"),
    "validation": ("model", "drafter", "exit_layer", "draft_length", "predicted_rounds", "measured_rounds",
                   "predicted_acceptance_rate", "measured_acceptance_rate", "speedup_predicted", "speedup_measured"),
    "rounds": ("model", "prompt", "exit_layer", "draft_length", "round", "drafted"),
    "run_lengths": ("model", "exit_layer", "run", "at_least", "at_least_low", "at_least_high", "geometric_at_least"),
    "costs": ("model", "step", "exit_layer", "rows", "seconds"),
}  # fmt: skip
"""The study's tables, and the columns without which it is another program's, or an older one's."""


@dataclass(frozen=True, eq=False)
class Study:
    """A finished study. Use `open_study`."""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def models(self) -> list[str]:
        """Names, in the study's order."""
        return [entry["name"] for entry in self.summary["models"]]

    def entry(self, model: str) -> Mapping[str, Any]:
        """What the summary says of a model."""
        return next(entry for entry in self.summary["models"] if entry["name"] == model)

    def label(self, model: str) -> str:
        return str(self.entry(model).get("label", model))

    def chosen(self, model: str) -> tuple[int | None, int] | None:
        """The recommended (exit layer, draft length), the exit layer None for a draft model; None: do not speculate."""
        choice = self.entry(model)["choice"]
        return (choice["exit_layer"], choice["draft_length"]) if choice["speculate"] else None

    def table(self, name: str) -> pd.DataFrame:
        """One of TABLES, models under their labels. Raises InputError when it is missing, foreign or empty."""
        path = self.folder / "tables" / f"{name}.csv"
        if not path.is_file():
            raise InputError(f"the study in {self.folder} has no tables/{name}.csv.", _AGAIN)
        try:
            table = pd.read_csv(path)
        except (ValueError, OSError) as error:
            raise InputError(f"{path} cannot be read: {str(error).strip()}.", _AGAIN) from None
        missing = [column for column in TABLES[name] if column not in table.columns]
        if missing:
            raise InputError(f"{path} has no column {', '.join(missing)}.", _AGAIN)
        unknown = sorted(set(self.models) - set(table["model"]))
        if unknown:
            raise InputError(f"{path} says nothing of {', '.join(unknown)}.", _AGAIN)
        table["model"] = table["model"].map({model: self.label(model) for model in self.models})
        return table.dropna(subset=["model"])

    def of(self, name: str, model: str) -> pd.DataFrame:
        """The rows of one model."""
        table = self.table(name)
        return table[table["model"] == self.label(model)]

    def trace(self, model: str) -> Trace:
        return Trace.open(self.folder / str(self.entry(model)["trace"]))

    def check(self) -> None:
        """Raise InputError if anything that a figure reads is missing."""
        for name in TABLES:
            self.table(name)
        for model in self.models:
            self.trace(model)


_AGAIN = "Run `probekit study` on that folder again: what is done is kept."


def open_study(folder: str | Path) -> Study:
    """The study in a folder. Raises InputError when there is none, when it is not finished, or another's."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one that `probekit study -o {folder}` wrote.")
    path = folder / "summary.json"
    if not path.is_file():
        if (folder / "study.json").is_file():
            raise InputError(f"the study in {folder} is not finished: it has no summary.json.", _AGAIN)
        what = "holds other files" if any(folder.iterdir()) else "is empty"
        raise InputError(f"{folder} {what}; expected a folder that `probekit study -o {folder}` wrote.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}.", _AGAIN) from None
    schema = summary.get("schema") if isinstance(summary, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has the schema {schema!r}; expected {SCHEMA!r}, as `probekit study` writes it.")
    entries = summary.get("models")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} names no model.", _AGAIN)
    for entry in entries:
        lacking = [key for key in ("name", "trace", "choice", "timings") if key not in entry]
        if lacking:
            raise InputError(f"{path} has no {', '.join(lacking)} for {entry.get('name', 'a model')!r}.", _AGAIN)
    return Study(folder, summary)
