"""What the readers of a study take from its `summary.json`: types and bounds, checked once. Other keys are free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from probekit.errors import InputError

Size = Annotated[int, Field(ge=0, le=10**6)]
Count = Annotated[float, Field(ge=0)]  # expected counts are no whole numbers
Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]
Span = Annotated[list[float], Field(min_length=2, max_length=2)]
RUN = re.compile(r"traces/[^/\\]+")


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Pair(Part):
    exit_layer: Size | None
    draft_length: Size
    speedup: float


class RankedWay(Part):
    drafter: str
    policy: str
    exit_layer: Size | None
    draft_length: Size
    tokens_per_round: float
    drafted_per_token: float
    speedup: float
    interval: Interval | None
    cross_fitted: bool
    oracle_share: float | None


class Choice(Part):
    exit_layer: Size | None = None
    draft_length: Size | None = None
    speedup: float | None = None
    interval: Interval | None = None
    speculate: bool = False
    drafter: str | None = None
    draft_rows: Size | None = None
    exit_heads: str | None = None
    runners_up: list[Pair] | None = None
    way: RankedWay | None = None
    costs: dict[str, Any] | None = None


class Counts(Part):
    rounds: Count
    drafted: Count
    accepted: Count


class Cell(Part):
    exit_layer: Size | None
    draft_length: Size
    predicted: Counts
    measured: Counts
    drafter: str | None = None
    ties: Count | None = None
    unexplained: Count | None = None
    speedup_predicted: float | None = None
    speedup_measured: float | None = None
    speedup_measured_quantiles: Span | None = None


class Validation(Part):
    cells: list[Cell] | None = None


class Rung(Part):
    rung: str
    way: str
    speedup: float
    speedup_low: float | None
    speedup_high: float | None


class WayRun(Part):
    drafters: list[str]
    policy: str
    exit_layer: Size | None
    draft_length: Size
    predicted: Counts
    measured: Counts
    rounds_equal: bool
    unexplained: Count
    speedup_predicted: float | None
    speedup_measured: float | None


class Best(Part):
    drafter: str
    policy: str
    exit_layer: Size | None
    draft_length: Size


class Kind(Part):
    kind: str
    prompts: Size
    best: Best
    speedup: float
    choice_speedup: float
    loss: float
    oracle_speedup: float | None


class HeldOut(Part):
    speedup: float
    interval: Interval | None


class Ways(Part):
    sentence: str
    held_out: HeldOut | None
    oracle: RankedWay | None
    ways: list[RankedWay]
    ladder: list[Rung]
    kinds: list[Kind]
    validated: list[WayRun]


class Timings(Part):
    prompts: Count | None = None
    tokens: Count | None = None
    generation_s: Count | None = None
    agreement_trace_s: Count | None = None


class Model(Part):
    name: Annotated[str, Field(min_length=1, max_length=1000)]
    label: str | None = None
    reference: str | None = None
    sentence: str | None = None
    trace: Annotated[str, Field(pattern=RUN.pattern + "$")] | None = None
    choice: Choice | None = None
    chosen_validation: Cell | None = None
    validation: Validation | None = None
    ways: Ways | None = None
    timings: Timings | None = None


class Settings(Part):
    draft_lengths: list[Annotated[int, Field(ge=1, le=10_000)]] | None = None
    exit_layers: list[Annotated[int, Field(ge=1, le=10_000)]] | None = None


class Summary(Part):
    created: str | None = None
    versions: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    settings: Settings | None = None
    models: Annotated[list[Model], Field(min_length=1)]


def check_summary(summary: Mapping[str, Any], path: Path, hint: str) -> None:
    """Raise InputError, which names the key, for a wrong type, a missing value or a number out of bounds."""
    try:
        Summary.model_validate(summary)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} is no whole summary of a study: {where}: {first['msg']}.", hint) from None
    names = [entry["name"] for entry in summary["models"]]
    if len(set(names)) < len(names):
        raise InputError(f"{path} names a model twice.", hint)
