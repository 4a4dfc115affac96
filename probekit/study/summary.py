"""The results of a study: tables, figures, `summary.json`, and the recommendation."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import probekit
from probekit.choice.choose import Choice
from probekit.costs.profile import Costs
from probekit.files import atomic_text, make_folder
from probekit.prediction.table import Prediction
from probekit.presentation import tables
from probekit.presentation.previews import draw_previews
from probekit.presentation.study_folder import MORE_TABLES
from probekit.study.phases import Validated
from probekit.study.plan import SCHEMA, StudyPlan
from probekit.traces.trace import Trace

LIBRARIES = ("torch", "transformers", "numpy", "nnsight")
MISSED = 0.15  # a prediction that is further off than this share is remarked on


ROUND_COLUMNS = (
    "model",
    "exit_layer",
    "draft_length",
    "drafter",
    "prompt",
    "round",
    "drafted",
    "accepted_predicted",
    "accepted_measured",
)


@dataclass(frozen=True, eq=False)
class ModelStudy:
    """What the phases made of one model. timings: of its trace beside its text; seconds: of each phase; attribution:
    who wrote the logits of its first texts; probes: what its residuals know, by layer."""

    name: str
    reference: str
    trace: Trace
    prediction: Prediction
    costs: Costs
    choice: Choice
    validated: Validated
    timings: dict[str, float]
    seconds: dict[str, float]
    attribution: pd.DataFrame
    probes: pd.DataFrame

    @property
    def pair(self) -> tuple[int | None, int] | None:
        """The chosen (exit layer, draft length), as tables name it; None: do not speculate."""
        return self.choice.best.cell if self.choice.speculate else None


@dataclass(frozen=True)
class Study:
    """A finished study: its folder and its summary (the contents of `summary.json`)."""

    folder: Path
    summary: dict[str, Any]
    models: tuple[ModelStudy, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """A row a model: the choice, its predicted speedup with its interval, and what was measured of it."""
        rows = []
        for model in self.summary["models"]:
            choice, measured = model["choice"], model["chosen_validation"] or {}
            low, high = choice["interval"] or (np.nan, np.nan)
            row = {name: choice[name] for name in ("speculate", "drafter", "exit_layer", "draft_length", "speedup")}
            rows.append(
                {"model": model["name"], **row, "speedup_low": low, "speedup_high": high,
                 "speedup_measured": measured.get("speedup_measured", np.nan)}
            )  # fmt: skip
        return pd.DataFrame(rows).astype({"exit_layer": "Int64", "draft_length": "Int64"})

    def __repr__(self) -> str:
        return f"Study({', '.join(model['name'] for model in self.summary['models'])} in {self.folder})"

    def _repr_html_(self) -> str:
        """The recommendations, the table, and the agreement of each layer as the study drew it."""
        sentences = "".join(f"<li>{escape(model['sentence'])}</li>" for model in self.summary["models"])
        table = self.to_pandas().to_html(index=False, float_format="{:.2f}".format, na_rep="-")
        picture = self.folder / "figures" / "agreement.png"
        image = ""
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode("ascii")
            image = f'<img alt="agreement by layer" style="max-width:100%" src="data:image/png;base64,{data}">'
        where = escape(str(self.folder / "report.html"))
        return f"<ul>{sentences}</ul>{table}{image}<p>The whole report: <code>{where}</code></p>"


def write_tables(folder: Path, studies: Sequence[ModelStudy]) -> None:
    """One CSV file a table, the models below one another."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for study in studies:
        rounds = pd.DataFrame([{"model": study.name, **row} for row in study.validated.rounds])
        if rounds.empty:  # sampled text has none; the table is there all the same
            rounds = pd.DataFrame(columns=list(ROUND_COLUMNS))
        for name, table in (
            ("layers", tables.layers_table(study.trace, study.name)),
            ("cells", tables.cells_table(study.prediction, study.choice, study.name)),
            ("validation", tables.validation_table({"cells": study.validated.cells}, study.name, rounds)),
            ("rounds", rounds),
            ("run_lengths", tables.run_lengths_table(study.trace, model=study.name)),
            ("costs", tables.costs_table(study.costs, study.name)),
            ("attribution", study.attribution.assign(model=study.name)[list(MORE_TABLES["attribution"])]),
            (
                "probes",
                study.probes.assign(model=study.name)[list(MORE_TABLES["probes"])] if len(study.probes) else None,
            ),
            ("ways", None if study.choice.ways is None else study.choice.ways.to_pandas().assign(model=study.name)),
        ):
            if table is not None:
                parts.setdefault(name, []).append(table)
    make_folder(folder / "tables")
    for name, each in parts.items():
        atomic_text(folder / "tables" / f"{name}.csv", pd.concat(each, ignore_index=True).to_csv(index=False))


def draw_figures(folder: Path, studies: Sequence[ModelStudy]) -> None:
    """Previews; `probekit figures STUDY` draws a paper's."""
    names = ["layers", "cells", "validation", *(["probes"] if (folder / "tables" / "probes.csv").is_file() else [])]
    read = {name: pd.read_csv(folder / "tables" / f"{name}.csv") for name in names}
    traces = {study.name: study.trace for study in studies}
    chosen = {study.name: study.pair for study in studies}
    draw_previews(folder / "figures", read, traces, chosen)


def write_summary(plan: StudyPlan, studies: Sequence[ModelStudy], writing_s: float, total_s: float) -> dict[str, Any]:
    """`summary.json`: what was asked, what came out, and what it took."""
    summary = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"probekit": probekit.__version__}
        | {name: installed for name in LIBRARIES if (installed := _version(name)) is not None},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads()},
        "settings": {"schema": SCHEMA, **plan.settings.to_json()},
        "seconds": {"tables_and_figures": writing_s, "total": total_s},
        "models": [_summary_of(study) for study in studies],
    }  # fmt: skip
    atomic_text(plan.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    return summary


def _version(name: str) -> str | None:
    """A library's version; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _summary_of(study: ModelStudy) -> dict[str, Any]:
    trace, choice = study.trace, study.choice
    model = trace.manifest.model
    document = choice.to_json()
    best = choice.ranking[0]
    cells = [{key: value for key, value in cell.items() if key != "rounds"} for cell in study.validated.cells]
    chosen = next(
        (cell for cell in cells if (cell["exit_layer"], cell["draft_length"]) == best.cell and document["speculate"]),
        None,
    )
    agreement = np.mean(np.concatenate([trace.agreement(prompt) for prompt in trace.prompts], axis=1), axis=1)
    return {
        "name": study.name,
        "label": study.name,
        "reference": study.reference,
        "trace": f"traces/{study.name}",
        "anatomy": {"layers": model.depth, "width": model.width, "vocabulary": model.vocabulary, "tied": model.tied,
                    "parameters": model.parameters},
        "threads": int(trace.manifest.provenance.versions["threads"]),
        "sentence": recommendation(choice, chosen, study.validated.ways),
        "choice": document,
        "chosen_validation": chosen,
        "validation": {"schema": "probekit/validate/1", "cells": cells},
        "ways": _ways_of(study),
        "agreement": agreement.tolist(),
        "looped": float(np.average(trace.texts["looped"], weights=trace.texts["new_tokens"])),
        "timings": study.timings,
        "seconds": study.seconds,
    }  # fmt: skip


def _ways_of(study: ModelStudy) -> dict[str, Any] | None:
    """All ways of drafting, as the report shows them: the best length of each drafter and policy."""
    ways = study.choice.ways
    if ways is None:
        return None
    return {**ways.brief(), "validated": study.validated.ways}


def recommendation(
    choice: Choice, chosen: dict[str, Any] | None, ways: Sequence[dict[str, Any]] = ()
) -> str:  # fmt: skip
    """The choice in a sentence or two, with what the decoder then did on prompts that had no part in it.

    chosen: the validation of the chosen pair, as in `validate --json`; None where nothing was chosen. ways: the
    validation of other ways, the best of all first.
    """
    said, measured = choice.pair_sentence(), None if chosen is None else chosen["speedup_measured"]
    if measured is not None:
        said += f" Measured on the other prompts: {measured:.2f}x."
        foreseen = chosen["speedup_predicted"] if chosen else None
        if measured <= 1:
            said += " That is no gain: do not draft so here, or study again while the machine does nothing else."
        elif foreseen is not None and abs(foreseen / measured - 1) > MISSED:
            said += (
                f" Predicted for those prompts: {foreseen:.2f}x; a miss of over {MISSED:.0%} mostly means that "
                "something else ran while steps were timed."
            )
    said += choice.ways_sentence()
    if choice.other_way is not None and ways and ways[0]["speedup_measured"] is not None:
        said += f" Measured on {ways[0]['prompts']} other prompts: {ways[0]['speedup_measured']:.2f}x."
    return said
