"""What an engine's steps take, typed in or measured: a small file, and the costs that follow from it. Needs no torch.

A profile is a table of steps, as CSV or JSON. Its columns:

    step        autoregressive: a step of plain decoding; draft: one step of the drafter, head included; first: what the
                first of a round takes longer; verify: a pass of the whole model over the drafts and the token before;
                lookup: what a round of a lookup takes longer, whether it found drafts or none
    exit_layer  of a draft step, and of a first: the layers that the drafter has; empty otherwise
    drafter     instead of it: the name of a draft model of its own, as the trace has it
    tokens      of a verification: tokens of each row, K + 1; 1 otherwise
    rows        rows in the batch
    context     tokens in the cache of each row
    seconds     of the whole pass, all rows together

JSON is `{"schema": "probekit/cost-profile/1", "engine", "device", "dtype", "steps": [{..}]}`; a measured one also has
`details`: with what, how often, by which clock. No `first` or `lookup` step is none that takes longer. `llama-bench
-n` and `vllm bench latency` print the first kind (seconds = rows / tokens per second). What lies between known rows,
contexts, tokens and exits is read off a straight line; beyond them nothing is known, and asking for it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.costs.profile import Costs, DraftModelCosts
from probekit.errors import InputError
from probekit.foreign.json import read_object
from probekit.foreign.text import read_bytes

SCHEMA = "probekit/cost-profile/1"
NEEDED = ("autoregressive", "draft", "verify")
DRAFTS = ("draft", "first")
LONGER = ("first", "lookup")  # may be 0
STEPS = (*NEEDED, *LONGER)
MOST = 10_000  # layers, or tokens in a pass
MOST_SECONDS = 1e6


@dataclass(frozen=True)
class Step:
    """Seconds of one step, all rows of the batch together."""

    step: str
    seconds: float
    rows: int = 1
    context: int = 0
    tokens: int = 1
    exit_layer: int | None = None
    drafter: str | None = None

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise InputError(f"step {self.step!r} is not known: it is one of {', '.join(STEPS)}.")
        timed = isinstance(self.seconds, (int, float)) and not isinstance(self.seconds, bool)
        if not (timed and 0 <= self.seconds <= MOST_SECONDS and (self.seconds > 0 or self.step in LONGER)):
            raise InputError(f"a {self.step} step takes {self.seconds!r} seconds; expected a number above 0.")
        for name, least, most in (
            ("rows", 1, 2**20), ("context", 0, 2**31), ("tokens", 2 if self.step == "verify" else 1, MOST),
            ("exit_layer", 1, MOST),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name == "exit_layer":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"{name} of a {self.step} step is {value!r}; expected {least} to {most:,}.")
        if self.drafter is not None and not (isinstance(self.drafter, str) and self.drafter):
            raise InputError(f"drafter of a {self.step} step is {self.drafter!r}; expected the name of a draft model.")
        if (self.step in DRAFTS) != (self.exit_layer is not None or self.drafter is not None):
            raise InputError(
                f"a {self.step} step has exit_layer {self.exit_layer!r} and drafter {self.drafter!r}; draft and first "
                "steps have one of them, others none."
            )
        if self.exit_layer is not None and self.drafter is not None:
            raise InputError(
                f"a {self.step} step is of exit layer {self.exit_layer} and of the draft model {self.drafter}; "
                "expected one of them."
            )


@dataclass(frozen=True)
class EngineProfile:
    """The steps of one engine on one device. details: how they were measured; empty where they were typed in."""

    engine: str
    device: str
    dtype: str
    steps: tuple[Step, ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [name for name in NEEDED if not any(step.step == name for step in self.steps)]
        if missing:
            raise InputError(
                f"the profile of {self.engine} has no {missing[0]} step.",
                "It needs an autoregressive step, a draft step and a verification at least.",
            )

    @property
    def contexts(self) -> list[int]:
        """Tokens in the cache at which something was timed, ascending."""
        return sorted({step.context for step in self.steps})

    @property
    def drafters(self) -> list[str]:
        """Names of draft models of their own that were timed, in their order."""
        return list(dict.fromkeys(step.drafter for step in self.steps if step.drafter is not None))

    @property
    def longest_draft(self) -> int:
        """Most drafts that a timed verification covers."""
        return max(step.tokens for step in self.steps if step.step == "verify") - 1

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "engine": self.engine, "device": self.device, "dtype": self.dtype,
                "steps": [_without_nobody(asdict(step)) for step in self.steps],
                **({"details": dict(self.details)} if self.details else {})}  # fmt: skip

    def costs(self, depth: int, *, rows: int = 1, context: int | None = None, drafter: str | None = None) -> Costs:
        """Costs of a model of `depth` layers at so many rows in the batch and tokens in the cache.

        An engine runs the exit as a draft model of its own: a round is k draft steps and a pass of the whole model.
        drafter: the draft model whose rounds are costed too, where it was timed; by default the only one. Exits have
        costs where one of them was timed.
        Raises InputError for rows or a context beyond the profile's.
        """
        context = self.contexts[0] if context is None else context
        plain = self._at(rows, context, "autoregressive")
        tokens = sorted({step.tokens for step in self.steps if step.step == "verify"})
        passes = [plain, *(self._at(rows, context, "verify", tokens=count) for count in tokens)]
        widths = range(1, tokens[-1] + 1)
        whole = np.interp(widths, [1, *tokens], passes)
        looks_up = any(step.step == "lookup" for step in self.steps)
        common: dict[str, Any] = {
            "source": self.engine, "device": self.device, "dtype": self.dtype, "context": context, "depth": depth,
            "autoregressive_s": plain, "rows": rows, "whole_s": dict(zip(widths, whole.tolist(), strict=True)),
            "lookup_s": self._at(rows, context, "lookup") if looks_up else 0.0,
            "draft_model": self._draft_model(drafter, rows, context, whole),
        }  # fmt: skip
        drafts = {step.exit_layer for step in self.steps if step.step == "draft" and step.exit_layer is not None}
        if not drafts:
            return Costs(**common, early_s={}, head_s=plain, verify_s={})
        if max(drafts) >= depth:
            raise InputError(f"the profile has a drafter of {max(drafts)} layers; the model has {depth} all in all.")
        known = {exit_layer: self._at(rows, context, "draft", exit_layer=exit_layer) for exit_layer in sorted(drafts)}
        line = [*known.items(), (depth, plain)]
        slope = (line[1][1] - line[0][1]) / (line[1][0] - line[0][0])
        exits = range(1, depth)
        step_s = np.interp(exits, [at for at, _ in line], [seconds for _, seconds in line])
        below = np.array([line[0][1] - slope * (line[0][0] - exit_layer) for exit_layer in exits])
        step_s = np.where(np.array(exits) < line[0][0], np.maximum(below, line[0][1] / line[0][0]), step_s)
        colder = {step.exit_layer for step in self.steps if step.step == "first" and step.exit_layer is not None}
        longer = {exit_layer: self._at(rows, context, "first", exit_layer=exit_layer) for exit_layer in sorted(colder)}
        cold = np.interp(exits, list(longer), list(longer.values())) if longer else np.zeros(depth - 1)
        # As Costs counts a round, with an early pass more than drafts: its time is taken from the verification.
        early = np.minimum(step_s / 2, whole.min() / 2)
        if (step_s <= early).any():
            raise InputError(f"the profile of {self.engine} has draft steps that take no time.")
        return Costs(
            **common,
            early_s=dict(zip(exits, early.tolist(), strict=True)),
            head_s=float(np.median(step_s - early)),
            heads_s=dict(zip(exits, (step_s - early).tolist(), strict=True)),
            cold_s=dict(zip(exits, cold.tolist(), strict=True)),
            verify_s={
                (exit_layer, count): float(whole[count - 1] - early[exit_layer - 1])
                for exit_layer in exits for count in widths
            },
        )  # fmt: skip

    def _draft_model(self, name: str | None, rows: int, context: int, whole: np.ndarray) -> DraftModelCosts | None:
        """whole: (widths,) seconds of the whole model over 1, 2, .. tokens."""
        if name is None and len(self.drafters) == 1:
            [name] = self.drafters
        if name not in self.drafters:
            return None
        step_s = self._at(rows, context, "draft", drafter=name)
        colder = any(step.step == "first" and step.drafter == name for step in self.steps)
        longer = self._at(rows, context, "first", drafter=name) if colder else 0.0
        return DraftModelCosts(name, step_s, step_s + longer, dict(enumerate(whole.tolist(), start=1)))

    def _at(self, rows: int, context: int, name: str, **named: int | str) -> float:
        """Seconds of a step at so many rows and tokens in the cache, between those that are known."""
        points: dict[int, dict[int, float]] = {}
        for step in self.steps:
            if step.step == name and all(getattr(step, key) == value for key, value in named.items()):
                points.setdefault(step.context, {})[step.rows] = step.seconds
        what = f"{name} steps" + "".join(f" of {key} {value}" for key, value in named.items())
        by_context = {at: _between(known, rows, f"{what} at context {at}", "rows") for at, known in points.items()}
        return _between(by_context, context, what, "context")


def _without_nobody(step: dict[str, Any]) -> dict[str, Any]:
    """Files that know no draft model of its own stay as they were."""
    return {key: value for key, value in step.items() if key != "drafter" or value is not None}


def _between(known: Mapping[int, float], at: int, what: str, name: str) -> float:
    places = sorted(known)
    if not places[0] <= at <= places[-1]:
        there = f"{places[0]}" if len(places) == 1 else f"{places[0]} to {places[-1]}"
        raise InputError(f"the profile has {what} for {name} {there}, not {at}.", f"Add {name} {at} to the profile.")
    return float(np.interp(at, places, [known[place] for place in places]))


def read_profile(path: str | Path) -> EngineProfile:
    """A profile from a CSV or JSON file. Raises InputError that names the file and the row for what is not one."""
    path = Path(path)
    if path.suffix.lower() == ".csv":
        try:
            frame = pd.read_csv(BytesIO(read_bytes(path)), dtype=str)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        rows: Any = [
            {key: _number(value) for key, value in row.items() if pd.notna(value)} for row in frame.to_dict("records")
        ]
        about: dict[str, Any] = {"engine": path.stem, "device": "unknown", "dtype": "unknown"}
        about |= {name: str(rows[0][name]) for name in about if rows and name in rows[0]}
        rows = [{key: value for key, value in row.items() if key not in about} for row in rows]
    else:
        document = read_object(path)
        if document.get("schema") != SCHEMA:
            raise InputError(f"{path} has schema {document.get('schema')!r}; expected {SCHEMA}.")
        rows, details = document.get("steps"), document.get("details", {})
        about = {name: document.get(name, 0) for name in ("engine", "device", "dtype")}
        if not isinstance(rows, list) or not all(isinstance(each, str) for each in about.values()):
            raise InputError(f"{path} is no cost profile: it needs texts engine, device, dtype and a list of steps.")
        if not isinstance(details, dict):
            raise InputError(f"{path} is no cost profile: its details are no object.")
        about["details"] = details
    return EngineProfile(**about, steps=tuple(_steps(path, rows)))


def _number(text: str) -> Any:
    """A cell of a CSV file: a number where it is one."""
    try:
        number = float(text)
    except ValueError:
        return text.strip()
    return int(number) if number.is_integer() and "." not in text else number


def _steps(path: Path, rows: Iterable[Any]) -> Iterable[Step]:
    known = {each.name for each in fields(Step)}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, step {number}: "
        if not isinstance(row, dict) or not {"step", "seconds"} <= set(row):
            raise InputError(f"{where}it has no step and seconds.", "Its columns are " + ", ".join(sorted(known)) + ".")
        if set(row) - known:
            raise InputError(
                f"{where}{sorted(set(row) - known)[0]!r} is not known; there are {', '.join(sorted(known))}."
            )
        whole: dict[str, Any] = {
            key: int(value) if isinstance(value, float) and value.is_integer() and key != "seconds" else value
            for key, value in row.items()
        }
        try:
            yield Step(**whole)
        except InputError as error:
            raise InputError(where + str(error)) from None
