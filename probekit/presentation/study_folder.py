"""The one reader of a study folder, for the report and for the figures.

A file is read when it is asked for, checked then, and kept. Each failure is one clear sentence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probekit.errors import InputError
from probekit.foreign.json import read_json
from probekit.foreign.text import read_bytes
from probekit.presentation.summary_schema import check_summary
from probekit.traces.trace import Trace

SCHEMA = "probekit/study/1"

TABLES: dict[str, tuple[str, ...]] = {
    "layers": ("model", "lens", "layer", "agreement", "agreement_low", "agreement_high", "echo", "entropy", "kl"),
    "cells": ("model", "drafter", "exit_layer", "draft_length", "first_round", "prompts", "acceptance_rate",
              "tokens_per_round", "speedup", "speedup_low", "speedup_high"),
    "validation": ("model", "drafter", "exit_layer", "draft_length", "predicted_rounds", "measured_rounds",
                   "predicted_acceptance_rate", "measured_acceptance_rate", "speedup_predicted", "speedup_measured"),
    "rounds": ("model", "prompt", "exit_layer", "draft_length", "round", "drafted"),
    "run_lengths": ("model", "exit_layer", "run", "at_least", "at_least_low", "at_least_high", "geometric_at_least"),
    "costs": ("model", "step", "exit_layer", "rows", "seconds"),
}  # fmt: skip
"""The study's tables, and the columns without which a file is another program's, or an older version's."""

MORE_TABLES: dict[str, tuple[str, ...]] = {
    "attribution": ("model", "prompt", "position", "term", "logit"),
    "probes": ("model", "label", "layer", "kind", "value", "low", "high"),
}
"""Tables that a study may lack, or that may say nothing of some of its models."""

TEXTS = ("model", "lens", "drafter", "first_round", "step", "term", "label", "kind")
WHOLE = ("layer", "draft_length", "run", "rows", "prompt", "round", "drafted", "prompts", "position")
"""Columns that hold texts, and whole numbers everywhere; all others hold numbers, or nothing."""

MAY_BE_EMPTY = ("rounds",)  # sampled text has expected rounds only


class Written(NamedTuple):
    """Shares of the logits of one text: values (positions, terms), logits (positions,); terms as in `Attribution`."""

    terms: tuple[str, ...]
    values: np.ndarray
    logits: np.ndarray


_RUN_AGAIN = "Run `probekit study` on that folder again: finished steps are kept."


@dataclass(frozen=True, eq=False)
class StudyFolder:
    """A finished study. Use `open_study`.

    summary: `summary.json`; each entry of its `models` holds at least the keys that `open_study` was asked for.
    """

    folder: Path
    summary: Mapping[str, Any]
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)
    _traces: dict[str, Trace] = field(default_factory=dict, repr=False)

    @property
    def models(self) -> list[str]:
        """Names, in the study's order."""
        return [entry["name"] for entry in self.entries]

    @property
    def entries(self) -> Sequence[Mapping[str, Any]]:
        """What the summary says of each model."""
        return self.summary["models"]

    def entry(self, model: str) -> Mapping[str, Any]:
        """What the summary says of one model."""
        return next(entry for entry in self.entries if entry["name"] == model)

    def label(self, model: str) -> str:
        """The model's name in tables and captions."""
        return str(self.entry(model).get("label", model))

    def chosen(self, model: str) -> tuple[int | None, int] | None:
        """The recommended (exit layer, draft length), the exit layer None for a draft model; None: do not speculate."""
        choice = self.entry(model).get("choice") or {}
        return (choice["exit_layer"], choice["draft_length"]) if choice.get("speculate") else None

    def table(self, name: str) -> pd.DataFrame:
        """One of TABLES or MORE_TABLES, models under their labels.

        Raises InputError when it is missing, foreign or incomplete.
        """
        if name not in self._tables:
            self._tables[name] = self._read_table(name)
        return self._tables[name].copy()

    def has(self, name: str) -> bool:
        """Whether one of MORE_TABLES is there and says something."""
        return (self.folder / "tables" / f"{name}.csv").is_file() and not self.table(name).empty

    def of(self, name: str, model: str) -> pd.DataFrame:
        """The rows of one model in a table."""
        table = self.table(name)
        return table[table["model"] == self.label(model)]

    def attributions(self, model: str) -> dict[int, Written]:
        """{prompt: who wrote the logits of the model's tokens}, of the texts that the study keeps it of.

        Raises InputError for shares that are not those of the run's texts.
        """
        if not (self.folder / "tables" / "attribution.csv").is_file():
            return {}
        run, found = self.trace(model), {}
        for prompt, rows in self.of("attribution", model).groupby("prompt"):
            at, terms = int(str(prompt)), tuple(dict.fromkeys(rows["term"]))
            positions = len(run.prompt_ids(at)) + len(run.outputs(at)) - 1 if at in run.prompts else 0
            grid = rows.drop_duplicates(["position", "term"]).pivot(index="position", columns="term", values="logit")
            values = grid.reindex(columns=list(terms)).to_numpy(float)
            if (
                len(rows) != values.size or grid.index.tolist() != list(range(positions))
                or not np.isfinite(values).all() or not all(_is_term(term, run.depth) for term in terms)
            ):  # fmt: skip
                raise InputError(
                    f"tables/attribution.csv in {self.folder} is not of prompt {at} of {model}.", _RUN_AGAIN
                )
            found[at] = Written(terms, values, values.sum(axis=1))
        return found

    def trace(self, model: str) -> Trace:
        """The model's trace. Raises InputError when it is missing or not finished."""
        if model not in self._traces:
            self._traces[model] = Trace.open(self.folder / str(self.entry(model)["trace"]))
        return self._traces[model]

    def check(self, tables: Iterable[str] = tuple(TABLES)) -> None:
        """Raise InputError if one of these tables, or a trace, is missing or foreign."""
        for name in tables:
            self.table(name)
        for model in self.models:
            self.trace(model)

    def _read_table(self, name: str) -> pd.DataFrame:
        path = self.folder / "tables" / f"{name}.csv"
        if not path.is_file():
            raise InputError(f"the study in {self.folder} has no tables/{name}.csv.", _RUN_AGAIN)
        try:
            table = pd.read_csv(BytesIO(read_bytes(path)))
        except (ValueError, OSError, OverflowError) as error:
            raise InputError(f"{path} cannot be read: {str(error).strip()}.", _RUN_AGAIN) from None
        columns = (TABLES | MORE_TABLES)[name]
        missing = [column for column in columns if column not in table.columns]
        if missing:
            raise InputError(f"{path} has no column {', '.join(missing)}.", _RUN_AGAIN)
        for column in columns:
            if column not in TEXTS and not table.empty and (wrong := _no_numbers(table[column])):
                raise InputError(f"{path} has {wrong} in its column {column}.", _RUN_AGAIN)
        unknown = sorted(set(self.models) - set(table["model"])) if name in TABLES else []
        if unknown and not (name in MAY_BE_EMPTY and table.empty):
            raise InputError(f"{path} says nothing of {', '.join(unknown)}.", _RUN_AGAIN)
        table["model"] = table["model"].map({model: self.label(model) for model in self.models})
        return table.dropna(subset=["model"])


def _is_term(term: Any, depth: int) -> bool:
    """Whether a share's name is one of `Attribution` in a model of `depth` layers."""
    kind, _, layer = str(term).partition(":")
    if kind in ("attention", "mlp"):
        return layer.isdecimal() and layer.isascii() and int(layer[:9]) < depth
    return term in ("embedding", "norm bias", "head bias", "soft cap")


def _no_numbers(column: pd.Series[Any]) -> str:
    """What a column holds that its readers do not expect; empty: nothing."""
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return "other values than numbers"
    if column.name not in WHOLE:
        return ""
    whole = column.notna() & (column.abs() < 2**53) & (column % 1 == 0)
    return "" if whole.all() else "other values than whole numbers"


def open_study(folder: str | Path, keys: Sequence[str] = ("trace", "choice", "timings")) -> StudyFolder:
    """The study in a folder.

    keys: what the summary must say of each model, beside its name.

    Raises InputError when there is no study, when it is not finished, or when another program wrote it.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder; expected one that `probekit study -o {folder}` wrote.")
    path = folder / "summary.json"
    if not os.path.isfile(path):
        raise _not_finished(folder)
    summary = read_json(path, _RUN_AGAIN)
    schema = summary.get("schema") if isinstance(summary, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}; expected {SCHEMA!r}, as `probekit study` writes it.")
    entries = summary.get("models")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} names no model.", _RUN_AGAIN)
    for entry in entries:
        if not isinstance(entry, dict):
            raise InputError(f"{path} names a model by a {type(entry).__name__}, not by an object.", _RUN_AGAIN)
        lacking = [key for key in ("name", *keys) if entry.get(key) is None]
        if lacking:
            raise InputError(f"{path} has no {', '.join(lacking)} for {entry.get('name', 'a model')!r}.", _RUN_AGAIN)
    check_summary(summary, path, _RUN_AGAIN)
    return StudyFolder(folder, summary)


def _not_finished(folder: Path) -> InputError:
    """Why a folder without a summary is no finished study."""
    if (folder / "study.json").is_file():
        return InputError(f"the study in {folder} is not finished: it has no summary.json.", _RUN_AGAIN)
    wanted = f"expected a folder that `probekit study -o {folder}` wrote."
    if any(folder.iterdir()):
        return InputError(f"{folder} holds other files and is not a finished study: it has no summary.json; {wanted}")
    return InputError(f"{folder} is empty; {wanted}")
