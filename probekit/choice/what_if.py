"""The choice on a device, at a batch and a context that are not at hand: where would speculation stop paying?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from probekit.choice.choose import Choice, choose
from probekit.choice.schedule import schedule
from probekit.costs.profile import Costs
from probekit.costs.roofline import BYTES, DEVICES, roofline_costs
from probekit.errors import InputError
from probekit.prediction.table import Prediction
from probekit.traces.trace import Trace

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows in the batch at which a scenario is tried, to find where speculation stops paying."""
_KEYS = ("device", "dtype", "weight-bits", "rows", "context")


@dataclass(frozen=True)
class Scenario:
    """A device of `probekit.costs.roofline.DEVICES` and how a model would run on it; weight_bits: None, as the dtype.

    Examples
    --------
    >>> Scenario.named("device=h200, weight-bits=4, rows=8, context=8192").label
    'h200, bfloat16, 4-bit weights, 8 rows, context 8,192'
    """

    device: str = "h100"
    dtype: str = "bfloat16"
    weight_bits: float | None = None
    rows: int = 1
    context: int = 1024

    @classmethod
    def named(cls, text: str) -> Scenario:
        """Of `device=h200,weight-bits=4,rows=8,context=8192`; what is not said stays as it is by default.

        Raises InputError for what is no such list, and for values out of range.
        """
        given: dict[str, Any] = {}
        for piece in filter(None, (piece.strip() for piece in text.split(","))):
            key, sign, value = (part.strip() for part in piece.partition("="))
            if not sign or key not in _KEYS or key in given:
                raise InputError(
                    f"a scenario is a list of {', '.join(f'{key}=..' for key in _KEYS)}; {piece[:60]!r} is none of it.",
                    "Write for instance device=h200,weight-bits=4,rows=8,context=8192.",
                )
            given[key] = value
        made = cls(
            given.get("device", cls.device).lower(), given.get("dtype", cls.dtype),
            _number(given, "weight-bits", 0.1, 32), int(_number(given, "rows", 1, 10**5) or cls.rows),
            cls.context if "context" not in given else int(_number(given, "context", 0, 10**7) or 0),
        )  # fmt: skip
        if made.device not in (*DEVICES, "cpu"):
            raise InputError(f"no roofline is known for {made.device!r}: it is cpu or one of {', '.join(DEVICES)}.")
        if made.dtype not in BYTES:
            raise InputError(f"dtype {made.dtype!r} is not known: it is one of {', '.join(BYTES)}.")
        return made

    @property
    def label(self) -> str:
        bits = "" if self.weight_bits is None else f", {self.weight_bits:g}-bit weights"
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''}"
        return f"{self.device}, {self.dtype}{bits}, {rows}, context {self.context:,}"


def _number(given: dict[str, Any], key: str, least: float, most: float) -> float | None:
    if key not in given:
        return None
    try:
        value = float(given[key])
        whole = key == "weight-bits" or value == int(value)
    except (ValueError, OverflowError):
        whole, value = False, 0.0
    if not whole or not least <= value <= most:
        raise InputError(
            f"{key} of a scenario is {str(given[key])[:60]!r}; expected a {'' if key == 'weight-bits' else 'whole '}"
            f"number from {least:g} to {most:g}."
        )
    return value


@dataclass(frozen=True, eq=False)
class Answer:
    """What would be chosen there. stops_at: the fewest of `BATCHES` from which on no drafts pay; None: they do."""

    scenario: Scenario
    choice: Choice
    stops_at: int | None

    def to_json(self) -> dict[str, Any]:
        there, best = self.scenario, self.choice.best.to_json()
        return {
            "device": there.device, "dtype": there.dtype, "weight_bits": there.weight_bits, "rows": there.rows,
            "context": there.context, "speculate": self.choice.speculate, **best,
            "draft_length": self.choice.draft_length or 0, "stops_at": self.stops_at,
        }  # fmt: skip


def what_if(
    trace: Trace, prediction: Prediction, scenarios: Iterable[Scenario], draft_rows: int | None = None
) -> Sequence[Answer]:
    """One choice for each scenario, on its roofline: the least that each step can take there.

    draft_rows: as the prediction was made with.
    """
    longest = max(cell.draft_length for cell in prediction.cells)
    answers = []
    for there in scenarios:

        def costs_at(rows: int, context: int, there: Scenario = there) -> Costs:
            return roofline_costs(
                trace, device=there.device, dtype=there.dtype, context=context, rows=rows,
                weight_bits=there.weight_bits, longest_draft=longest, drafter=trace.manifest.drafter,
                draft_rows=draft_rows,
            )  # fmt: skip

        batches = schedule(prediction, costs_at, BATCHES, [there.context])
        place = there.rows, there.context
        choice = batches.choices.get(place) or choose(prediction, costs_at(*place))
        answers.append(Answer(there, choice, batches.stops_at(there.context)))
    return answers
