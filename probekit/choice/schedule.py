"""The best way, or none, by rows in the batch and tokens in the cache: where does speculation stop paying?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from probekit.choice.choose import Candidate, Choice, choose
from probekit.costs.batch import BatchCosts
from probekit.costs.profile import Costs
from probekit.errors import InputError
from probekit.prediction.table import Prediction

SCHEMA = "probekit/schedule/1"


@dataclass(frozen=True, eq=False)
class Schedule:
    """One choice for each (rows, context), in ascending order. It is a value: an export writes it down."""

    model: str
    choices: dict[tuple[int, int], Choice]

    def best(self, rows: int, context: int) -> Candidate:
        return self.choices[rows, context].best

    def stops_at(self, context: int) -> int | None:
        """The fewest rows, of those that were asked for, from which on nothing beats plain decoding; None: never."""
        rows = [each for each, at in self.choices if at == context]
        stop = None
        for count in sorted(rows, reverse=True):
            if self.choices[count, context].speculate:
                break
            stop = count
        return stop

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "entries": [
                {"rows": rows, "context": context, "speculate": choice.speculate, "alike": len(choice.alike),
                 **(choice.best.to_json() | {"draft_length": choice.draft_length or 0})}
                for (rows, context), choice in self.choices.items()
            ],
            "stops_at": {str(at): self.stops_at(at) for at in dict.fromkeys(at for _, at in self.choices)},
        }  # fmt: skip


def schedule(
    prediction: Prediction,
    costs_at: Callable[[int, int], Costs | BatchCosts],
    rows: Iterable[int],
    contexts: Iterable[int],
) -> Schedule:
    """Choose at every number of rows and every context.

    costs_at: (rows, context) -> costs there: `EngineProfile.costs`, `roofline_costs` with `rows` and `context`,
        or `measure_batch`.
    """
    rows, contexts = sorted(set(rows)), sorted(set(contexts))
    if not rows or not contexts or rows[0] < 1 or contexts[0] < 0:
        raise InputError("a schedule needs rows of 1 or more, and contexts of 0 or more.")
    found = {(count, at): choose(prediction, costs_at(count, at)) for at in contexts for count in rows}
    return Schedule(prediction.model, found)
