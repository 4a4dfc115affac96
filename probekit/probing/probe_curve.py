"""What `probe` returns: how well a label is read off each layer, beside its control and its baselines. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probekit.html_tables import HtmlCell, html_table
from probekit.probing.probe_scores import Reliability

SCHEMA = "probekit/probe/1"


class Figure(NamedTuple):
    """A score with its 95 % interval over prompts; NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> float | None:
        return None if np.isnan(self.value) else float(self.value)

    @property
    def interval(self) -> list[float] | None:
        return None if np.isnan(self.low) else [float(self.low), float(self.high)]


# Kinds of probes in tables, and where their scores stand.
_KINDS = {"probe": "score"} | {name: name for name in ("control", "confidence", "position", "together")}
NONE = Figure(np.nan, np.nan, np.nan)


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """A probe at one layer, judged on prompts that it was not fitted on.

    Scores are AUROC for classes (of several, each against the rest, their mean) and R2 for numbers.

    Parameters
    ----------
    score: of the probe. control: of probes of shuffled labels, over the shuffles; its interval is where a probe that
        knows nothing falls.
    confidence: of a probe that sees the lens's probability, entropy and margin at this layer only; NaN where the trace
        has them not. position: of one that sees the position only.
    together: of a probe that sees the residual and the lens's three figures; added: what it has over confidence alone.
    alone: {"probability", "entropy", "margin"}: the AUROC of each figure as it is; entropy turned round.
    brier, ece: of classes: Brier score, expected calibration error. curve: the reliability curve behind it, of two
        classes: the second's probability, of more the top one's.
    regularisation: what each fold chose within its training part.
    positions, prompts, share: rows with a label, their prompts, and how many of the rows are of the second class.
    """

    layer: int
    score: Figure = NONE
    control: Figure = NONE
    confidence: Figure = NONE
    position: Figure = NONE
    together: Figure = NONE
    added: Figure = NONE
    alone: dict[str, float] = field(default_factory=dict)
    brier: float = np.nan
    ece: float = np.nan
    curve: tuple[Reliability, ...] = ()
    regularisation: tuple[float, ...] = ()
    positions: int = 0
    prompts: int = 0
    share: float = np.nan

    @property
    def selectivity(self) -> float:
        """The score above its control's (Hewitt and Liang, 2019)."""
        return self.score.value - self.control.value

    def to_json(self, number: bool) -> dict[str, Any]:
        """number: whether the label is a number, so that the score is R2."""
        scored, score = ("r2", "auroc") if number else ("auroc", "r2")
        best = self.confidence if self.confidence.known is not None else self.position
        return {
            "layer": self.layer,
            scored: self.score.known,
            f"{scored}_interval": self.score.interval,
            f"control_{scored}": self.control.known,
            f"control_{scored}_interval": self.control.interval,
            f"baseline_{scored}": best.known,
            f"baseline_{scored}_interval": best.interval,
            f"position_{scored}": self.position.known,
            f"together_{scored}": self.together.known,
            f"added_{scored}": self.added.known,
            f"added_{scored}_interval": self.added.interval,
            score: None,
            **{f"{name}_auroc": None if np.isnan(value) else value for name, value in self.alone.items()},
            "brier": None if np.isnan(self.brier) else self.brier,
            "ece": None if np.isnan(self.ece) else self.ece,
            "reliability": [each._asdict() for each in self.curve],
            "regularisation": list(self.regularisation),
            "share": None if np.isnan(self.share) else self.share,
            "positions": self.positions,
            "prompts": self.prompts,
        }


@dataclass(frozen=True, eq=False)
class ProbeCurve:
    """A label, probed layer by layer.

    number: whether the label is a number, and scores are R2. estimator: what was fitted. baseline: what stands as such
    in tables: the lens's confidence, or where a trace has none of it the position.
    """

    model: str
    label: str
    number: bool
    estimator: str
    layers: tuple[LayerProbe, ...]

    def __repr__(self) -> str:
        best = self.best
        found = (
            "nothing to tell apart"
            if best is None
            else f"best layer {best.layer}, {self.scored} {best.score.value:.3f}"
        )
        return f"ProbeCurve({self.label} in {self.model}: {len(self.layers)} layers, {found})"

    @property
    def scored(self) -> str:
        return "R2" if self.number else "AUROC"

    @property
    def best(self) -> LayerProbe | None:
        """The layer with the highest score; None where no layer has one."""
        known = [each for each in self.layers if each.score.known is not None]
        return max(known, key=lambda each: each.score.value, default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "label": self.label,
            "estimator": self.estimator,
            "layers": [each.to_json(self.number) for each in self.layers],
        }

    def to_pandas(self) -> pd.DataFrame:
        """A row a layer and a kind of probe: value, low, high.

        Kinds: probe, control, confidence, position, together; those that a layer has.
        """
        rows = [
            {"model": self.model, "label": self.label, "score": self.scored, "layer": each.layer, "kind": kind}
            | getattr(each, name)._asdict()
            for each in self.layers
            for kind, name in _KINDS.items()
            if getattr(each, name).known is not None
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["model", "label", "score", "layer", "kind", "value", "low", "high"])

    def _repr_html_(self) -> str:
        rows = []
        for each in self.layers:
            cells = [
                HtmlCell(
                    "-" if np.isnan(value) else f"{value:.3f}", 0.0 if np.isnan(value) else float(np.clip(value, 0, 1))
                )
                for value in (each.score.value, each.control.value, each.confidence.value, each.position.value)
            ]
            rows.append((str(each.layer), cells))
        return html_table(
            f"{self.label} read off the residual stream of {self.model}: {self.scored} on prompts not fitted on",
            "layer", [self.estimator, "shuffled labels", "lens confidence only", "position only"], rows,
        )  # fmt: skip
