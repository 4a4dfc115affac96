"""What `validate_on_gpu.py` runs, and how it keeps what was run: records that grow cell by cell."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarking import machine, say, versions

from probekit.files import atomic_text
from probekit.models.cuda_kernels import attention_order
from probekit.models.shipped import TALES
from probekit.models.synthetic import SHAPES, Shape

GIB = 2**30


class Part(StrEnum):
    """In the order in which they are run: what would make the rest worthless comes first."""

    SMOKE = "smoke"
    MICRO = "micro"
    COSTS = "costs"
    CELLS = "cells"
    PEERS = "peers"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class Plan:
    """What is run. Lengths in tokens; `shapes` by the name that they have in tables, the largest first.

    shares: E/L. dials: factors on what the layers behind the exit write; the lower, the more is accepted.
    logit_scale: of the untied shapes; it keeps margins above bfloat16's rounding. smoke_tests: what pytest is given.
    tutorial_exit: the exit of the setting that the drafter, the last of the shapes, is tried in.
    """

    device: str
    dtype: str
    shapes: dict[str, Shape]
    engine: str = "cuda"
    shares: tuple[float, ...] = (1 / 8, 1 / 4)
    dials: tuple[float, ...] = (0.02, 0.03, 0.04, 0.05, 0.15)
    logit_scale: float = 4.0
    draft_lengths: tuple[int, ...] = (2, 4, 8)
    contexts: tuple[int, ...] = (128, 1024, 8192)
    widths: tuple[int, ...] = (1, 5, 9)
    prompts: int = 3
    prompt_tokens: int = 16
    new_tokens: int = 64
    repeats: int = 2
    sweeps: int | None = 5
    samples: int = 20
    lens_rows: int = 2048
    tutorial_exit: int = 6
    tutorial_prompt: int = 5
    tutorial_tokens: int = 100
    tutorial_repeats: int = 5
    copied_bytes: int = 2 * GIB
    product_width: int = 8192
    smoke_tests: tuple[str, ...] = (
        "tests/lens/test_row_kernel.py", "tests/models/test_decode_kernels.py", "tests/decoding/test_device_round.py",
        "tests/decoding/test_fused_rounds.py",
    )  # fmt: skip
    weights: tuple[str, ...] = tuple(TALES)
    weights_tokens: int = 96


def full(device: str, dtype: str | None) -> Plan:
    return Plan(device, dtype or "bfloat16", {"8B": SHAPES["llama-3-8b"], "1B": SHAPES["llama-3.2-1b"]})


def miniature(device: str, dtype: str | None) -> Plan:
    large = Shape(8, 32, 48, 4, 2, 64, 96, 8)
    return Plan(
        device, dtype or "float32", {"large": large, "small": replace(large, layers=4, tied=True)},
        shares=(1 / 4,), dials=(0.1, 0.6), draft_lengths=(2, 4), contexts=(8, 96), prompts=2, prompt_tokens=4,
        new_tokens=12, repeats=1, sweeps=2, samples=3, lens_rows=16, tutorial_exit=2, tutorial_tokens=12,
        tutorial_repeats=2, copied_bytes=2**22, product_width=128, smoke_tests=("tests/foreign/test_json.py",),
        weights_tokens=8,
    )  # fmt: skip


class Cell(NamedTuple):
    """One thing that is measured: its name in the part's record, and how. `run` takes what is on record by then."""

    part: Part
    name: str
    run: Callable[[Mapping[str, Any]], dict[str, Any]]


class Records:
    """The folder of the records, one file a part: `cells` by name, written after every one.

    A cell that is on record for the same device, versions and settings is not run again.
    """

    def __init__(self, folder: Path, plan: Plan, mini: bool) -> None:
        self.folder = folder
        self.head = {
            "machine": machine(torch.device(plan.device).type),
            "versions": versions(),
            "attention_order": attention_order(),
            "settings": json.loads(json.dumps(asdict(plan) | {"miniature": mini})),
        }

    def path(self, part: Part) -> Path:
        return self.folder / f"{part}.json"

    def read(self, part: Part) -> dict[str, Any]:
        """A part's record; an empty one where there is none of this run's kind."""
        if self.path(part).is_file():
            found = json.loads(self.path(part).read_text(encoding="utf-8"))
            if all(found.get(name) == value for name, value in self.head.items()):
                return found
        return {"schema": f"probekit/gpu-{part}/2", **self.head, "cells": {}}

    def cells(self) -> dict[str, Any]:
        """{part: {cell: what it found}}."""
        return {part.value: self.read(part)["cells"] for part in Part}

    def keep(self, cell: Cell, found: Mapping[str, Any]) -> None:
        record = self.read(cell.part)
        record["cells"][cell.name] = dict(found)
        self.folder.mkdir(parents=True, exist_ok=True)
        # whole or not at all: a call may be ended at any moment
        atomic_text(self.path(cell.part), json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def missing(cells: Sequence[Cell], records: Records) -> Iterator[Cell]:
    done = records.cells()
    return (cell for cell in cells if cell.name not in done[cell.part])


def run(cells: Sequence[Cell], records: Records, seconds: float) -> int:
    """Run what is missing until the time is up; a cell that has begun is finished. Returns how many cells are left."""
    began = time.perf_counter()
    left = list(missing(cells, records))
    while left and time.perf_counter() - began < seconds:
        cell = left.pop(0)
        say(f"{cell.part}: {cell.name} ({len(left)} more)")
        started = time.perf_counter()
        found = cell.run(records.cells())
        records.keep(cell, found | {"cell_seconds": time.perf_counter() - started})
    return len(left)
