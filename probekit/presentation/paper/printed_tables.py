"""A study's tables as a page holds them: the columns that a reader looks for, short headings, units, captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from probekit.files import atomic_text, make_folder
from probekit.presentation.latex import to_latex
from probekit.presentation.paper.look import Page
from probekit.presentation.study_folder import TABLES, StudyFolder


@dataclass(frozen=True)
class Printed:
    """What is printed of one of the study's tables; the rest stays in its CSV file.

    columns: {column: heading}, in this order. decimals: digits after the mark. bare: columns that are printed without
        their interval. factors: what columns are multiplied by, for a handier unit. intervals: what they are.
    """

    caption: str
    columns: Mapping[str, str]
    decimals: Mapping[str, int]
    bare: frozenset[str] = frozenset()
    factors: Mapping[str, float] = field(default_factory=dict)
    intervals: str = "95 % intervals, bootstrap over prompts."

    def of(self, table: pd.DataFrame, intervals: bool = True) -> pd.DataFrame:
        """The printed columns, each followed by the ends of its interval where there are any and they are wanted."""
        kept = []
        for column in self.columns:
            ends = () if column in self.bare or not intervals else ("_low", "_high", "_20", "_80")
            kept += [name for name in (column, *(column + end for end in ends)) if name in table.columns]
        return table[kept].assign(**{name: table[name] * factor for name, factor in self.factors.items()})


def _stacked(above: str, below: str) -> str:
    """A heading of two lines."""
    return rf"\shortstack[r]{{{above}\\{below}}}"


_ROOM_FOR_INTERVALS = 5.4  # inches of text in which they can be read
_SHARE, _RATIO, _MEAN = 3, 2, 2  # digits after the mark
_CELL = {"model": "model", "exit_layer": "$E$", "draft_length": "$K$"}

PRINTED: dict[str, Printed] = {
    "layers": Printed(
        "What each layer says, pooled over the generated tokens: shares, and means in nats.",
        {"model": "model", "lens": "lens", "layer": "layer", "agreement": "agreement", "echo": "echo",
         "entropy": "entropy (nats)", "kl": "KL (nats)"},
        {"agreement": _SHARE, "echo": _SHARE, "entropy": _MEAN, "kl": _MEAN},
    ),
    "cells": Printed(
        "Predicted rounds over exit layers E (–: the draft model) and draft lengths K, and the speedup that they give "
        "with the study's costs.",
        {**_CELL, "rounds": "rounds", "drafted": "drafted", "accepted": "accepted",
         "acceptance_rate": "acceptance rate", "alpha": r"$\alpha$", "tokens_per_round": "tokens per round",
         "speedup": "speedup"},
        {"acceptance_rate": _SHARE, "alpha": _SHARE, "tokens_per_round": _RATIO, "speedup": _RATIO},
        intervals="95 % intervals, bootstrap over prompts; those of the speedup over blocks of the calibration as "
        "well, for all pairs at once.",
    ),
    "validation": Printed(
        "The prediction beside the running decoder, at exit layers E (–: the draft model) and draft lengths K.",
        {**_CELL, "predicted_rounds": _stacked("rounds,", "predicted"), "measured_rounds": "measured",
         "predicted_acceptance_rate": _stacked("acceptance,", "predicted"), "measured_acceptance_rate": "measured",
         "rounds_equal": _stacked("rounds", "equal"), "ties": _stacked("near-", "ties"),
         "speedup_predicted": _stacked("speedup,", "predicted"), "speedup_measured": "measured"},
        {"predicted_acceptance_rate": _SHARE, "measured_acceptance_rate": _SHARE, "speedup_predicted": _RATIO,
         "speedup_measured": _RATIO},
        frozenset({"predicted_rounds", "predicted_acceptance_rate", "measured_rounds"}),
        intervals="Brackets: 95 % intervals over prompts; of the measured speedup, the 20 % and 80 % quantiles of "
        "repeated timings.",
    ),
    "rounds": Printed(
        "Every round of every cell that was run: exit layer E (–: the draft model), draft length K.",
        {"model": "model", "prompt": "prompt", "exit_layer": "$E$", "draft_length": "$K$", "round": "round",
         "drafted": "drafted", "accepted_predicted": _stacked("accepted,", "predicted"),
         "accepted_measured": "measured"},
        {},
    ),
    "run_lengths": Printed(
        "Runs of r agreements at exit layer E, beside the geometric law of independent agreements.",
        {"model": "model", "exit_layer": "$E$", "run": "$r$", "count": "runs of $r$", "geometric": "law",
         "at_least": r"runs of $r$ or more", "geometric_at_least": "law"},
        {"count": 0, "geometric": 1, "at_least": 0, "geometric_at_least": 1},
    ),
    "costs": Printed(
        "Time of each step on the machine of the study, at exit layer E and over so many rows.",
        {"model": "model", "step": "step", "exit_layer": "$E$", "rows": "rows", "seconds": "time (ms)"},
        {"seconds": 3},
        factors={"seconds": 1000.0},
    ),
}  # fmt: skip


def make_tables(study: StudyFolder, output: Path, page: Page) -> Iterator[Path]:
    """Write each of the study's tables as LaTeX, on a narrow page without intervals; yields every file."""
    make_folder(output / "tables")
    for name in TABLES:
        printed, path = PRINTED[name], output / "tables" / f"{name}.tex"
        frame = printed.of(study.table(name), intervals=page.text >= _ROOM_FOR_INTERVALS)
        shown = any(str(column).endswith(("_low", "_20")) for column in frame)
        table = to_latex(
            frame, f"{printed.caption} {printed.intervals}" if shown else printed.caption,
            f"tab:{name.replace('_', '-')}", headings=printed.columns, decimals=printed.decimals, width=page.text,
            column=page.column,
        )  # fmt: skip
        atomic_text(path, table)
        yield path
