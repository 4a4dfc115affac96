"""The phase of a study that probes the residual stream: what it knows by layer, beside what the lens says."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probekit.errors import InputError, Remark
from probekit.kept import Kept
from probekit.presentation.study_folder import MORE_TABLES
from probekit.progress import Progress
from probekit.settings import StudySettings
from probekit.traces.trace import Trace

if TYPE_CHECKING:
    from probekit.models.loaded import Loaded

MOST_LAYERS = 12  # probed: each costs about as much as another
COLUMNS = MORE_TABLES["probes"][1:]


def probe_texts(
    loaded: Loaded, trace: Trace, settings: StudySettings, kept: Kept, progress: Progress
) -> pd.DataFrame:  # fmt: skip
    """What the residual stream knows of a run's texts: a row a label, layer and kind, with the columns COLUMNS.

    Of the label "accepted" the AUROC with which a probe tells accepted drafts of an exit (see `probekit.probe`), of
    "answer" the share of the model's tokens that a linear map finds (see `linear_answer`). Empty for a study that was
    not asked for probes; what cannot be probed is left out, with a Remark that says why.
    """
    if not settings.probes:
        return pd.DataFrame(columns=list(COLUMNS))

    def run() -> dict[str, Any]:
        from probekit.probing.linear_answer import linear_answer
        from probekit.probing.probe import probe

        exits, parts = probed_layers(trace.depth), [pd.DataFrame(columns=list(COLUMNS))]
        for label, table in (
            ("accepted", lambda: probe(trace, "accepted", exits, progress=progress).to_pandas()),
            ("answer", lambda: linear_answer(loaded, trace, [0, *exits], progress=progress)),
        ):
            try:
                parts.append(table().assign(label=label)[list(COLUMNS)])
            except InputError as error:
                warnings.warn(f"The study has no probes of {label!r}: {error.problem}", Remark, stacklevel=2)
        rows = pd.concat(parts[1:] or parts, ignore_index=True).astype(object)
        return {"rows": rows.where(rows.notna(), None).to_numpy().tolist()}

    found = pd.DataFrame(kept.once("probes", run)["rows"], columns=list(COLUMNS))
    return found.astype(dict.fromkeys(("value", "low", "high"), float))


def probed_layers(depth: int) -> list[int]:
    """The exits that are probed: all of them, or MOST_LAYERS evenly spread, the first and the last among them."""
    return sorted({round(layer) for layer in np.linspace(1, depth - 1, min(MOST_LAYERS, depth - 1)).tolist()})
