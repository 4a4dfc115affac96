"""What a trace will take, before it runs: from a few of its own batches here, or from a roofline of devices elsewhere.

Here, some batches of the plan go through the tracer as they will, into a folder that is removed again; each stands for
the batches of its length. Elsewhere, every product and byte of the plan is counted and held against the device's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

from probekit.costs.roofline import BYTES, DEVICES, Dimensions
from probekit.errors import InputError
from probekit.lens.exit_heads import pack_heads
from probekit.models.memory import free_bytes
from probekit.progress import no_progress
from probekit.ranks import Ranks
from probekit.traces.ledger import ledger_entries
from probekit.traces.storage import TraceWriter
from probekit.tracing.backends import open_backend
from probekit.tracing.plan import TracePlan
from probekit.tracing.tracer import TraceRun

SAMPLED_BATCHES = 4
LOGIT_PASSES = 3  # over the float32 logits of a (row, layer): written by the product, read by the reductions twice
CELL_BYTES = 30  # on disk, of one (lens, layer, row) with all statistics: docs/results/scale/plan.json


@dataclass(frozen=True)
class TraceEstimate:
    """What a trace takes.

    source: "sampled" (on this device) or "roofline" (the least that the devices allow). prompts, batches, rows,
    tokens: of the whole plan; rows are read positions, tokens at most generated. seconds: {phase: seconds}, all
    processes together; total_s: with `processes` at once. memory_bytes: of one device or process at its height.
    memory_free: now; None where it is not known. disk_bytes: of the run.
    """

    model: str
    device: str
    source: str
    processes: int
    prompts: int
    batches: int
    rows: int
    tokens: int
    seconds: Mapping[str, float]
    memory_bytes: int
    memory_free: int | None
    disk_bytes: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values()) / self.processes

    def to_json(self) -> dict[str, Any]:
        return {"schema": "probekit/trace-plan/1", **asdict(self), "total_s": self.total_s}


# -------------------------------------------------------------------------------------------------------- here
def sample_trace(plan: TracePlan, *, processes: int = 1, prompts: int | None = None) -> TraceEstimate:
    """An estimate from a few batches of the plan, each traced as it will be. Raises what a trace raises.

    processes: how many will share the run, each with a device (or processor) of its own. prompts: as if there were so
    many, of the lengths that the plan's have.
    """
    batches = plan.manifest.plan.batches
    strata = np.array_split(np.arange(len(batches)), min(SAMPLED_BATCHES, len(batches)))
    chosen = [int(stratum[len(stratum) // 2]) for stratum in strata]
    with tempfile.TemporaryDirectory() as folder:
        writer = _TimedWriter(
            Path(folder) / "run", plan.manifest, None if plan.heads is None else pack_heads(plan.heads)
        )
        run = TraceRun(plan, writer, open_backend(plan.manifest.settings.backend, plan.loaded), no_progress, Ranks())
        with torch.inference_mode():
            writer.mine, began = chosen[:1], perf_counter()
            run.go()  # the first passes of a process are slow, and the model is checked
            beginning = perf_counter() - began - sum(writer.seconds[0].values())
            writer.mine, writer.redo = chosen, True
            run.go()
        taken = writer.seconds[-len(chosen) :]
        entries = list(ledger_entries(Path(folder) / "run"))[-len(chosen) :]
        sizes = [sum(Path(folder, "run", name).stat().st_size for name in entry.files) for entry in entries]
    rows = [_rows_of(plan, batch) for batch in batches]
    scale = 1.0 if prompts is None else prompts / plan.manifest.prompt_count
    seconds, disk = dict.fromkeys(("generation", "reading", "writing"), 0.0), 0.0
    for stratum, part, spent, size in zip(strata, chosen, taken, sizes, strict=True):
        weight = scale * sum(rows[each] for each in stratum) / rows[part]
        seconds = {name: total + weight * spent[name] for name, total in seconds.items()}
        disk += weight * size
    seconds = {"beginning": processes * beginning, **seconds}  # of each process: its checks, and the noise
    return _estimate(plan, "sampled", processes, scale, seconds, _height(plan), free_bytes(plan.loaded.device), disk)


class _TimedWriter(TraceWriter):
    """A writer that counts what each part took, writing included. redo: whether parts that are written are pending."""

    def __init__(self, folder: Path, manifest: Any, exit_heads: bytes | None) -> None:
        super().__init__(folder, manifest, exit_heads=exit_heads)
        self.seconds: list[dict[str, float]] = []
        self.redo = False

    @property
    def pending(self) -> list[int]:
        return list(self.mine or ()) if self.redo else super().pending

    def write(self, part: int, frames: Mapping[str, pd.DataFrame], **given: Any) -> None:
        began = perf_counter()
        super().write(part, frames, **given)
        spent = given["seconds"]
        writing = perf_counter() - began
        self.seconds.append({"generation": spent["generation_s"], "reading": spent["trace_s"], "writing": writing})


def _rows_of(plan: TracePlan, batch: Sequence[int]) -> int:
    new = 0 if plan.written else plan.manifest.settings.max_new_tokens
    return sum(plan.encoded.sizes[index][0] + new - 1 for index in batch)


def _height(plan: TracePlan) -> int:
    if plan.loaded.device.type == "cuda":
        return torch.cuda.max_memory_allocated(plan.loaded.device)
    return psutil.Process().memory_info().rss


def _estimate(
    plan: TracePlan, source: str, processes: int, scale: float, seconds: Mapping[str, float], memory: int,
    free: int | None, disk: float, device: str | None = None,
) -> TraceEstimate:  # fmt: skip
    if processes < 1 or not scale > 0:
        raise InputError(f"{processes} processes and {scale:.3g} times the prompts make no trace.")
    batches, settings = plan.manifest.plan.batches, plan.manifest.settings
    rows = sum(_rows_of(plan, batch) for batch in batches)
    return TraceEstimate(
        model=plan.loaded.name,
        device=device or str(plan.loaded.device),
        source=source,
        processes=processes,
        prompts=round(scale * plan.manifest.prompt_count),
        batches=round(scale * len(batches)),
        rows=round(scale * rows),
        tokens=0 if plan.written else round(scale * plan.manifest.prompt_count * settings.max_new_tokens),
        seconds=dict(seconds),
        memory_bytes=memory,
        memory_free=free,
        disk_bytes=int(disk),
    )


# --------------------------------------------------------------------------------------------------- elsewhere
@dataclass(frozen=True)
class Machine:
    """Devices of a kind. count: of them. split: over how many of them each layer is split (tensor parallelism); the
    others take other prompts. link: bytes a second that one device sends to the others, where layers are split; by
    default one direction of an H100's NVLink, of whose 900 GB/s NVIDIA's datasheet speaks both."""

    device: str
    count: int = 1
    split: int = 1
    link: float = (
        450e9  # NVLink of an H100 or H200, one direction (NVIDIA H100 Tensor Core GPU datasheet: 900 GB/s both)
    )

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InputError(f"no roofline is known for {self.device!r}; there are {', '.join(DEVICES)}.")
        if self.split < 1 or self.count < 1 or self.count % self.split or not self.link > 0:
            raise InputError(f"{self.count} devices in groups of {self.split} make no machine.")

    @classmethod
    def of(cls, text: str) -> Machine:
        """As --on has it: h200, h200x8 (they share the prompts), h200x8/4 (two groups, layers split by four)."""
        found = re.fullmatch(r"(.+?)(?:x(\d{1,6})(?:/(\d{1,6}))?)?", text)
        name, count, split = found.groups() if found else (text, None, None)
        return cls(name, int(count or 1), int(split or 1))


def roofline_trace(
    source: Any,
    machine: Machine | str,
    *,
    prompts: int,
    prompt_tokens: int,
    max_new_tokens: int = 96,
    batch_size: int = 64,
    lenses: int = 2,
    dtype: str = "bfloat16",
    given: bool = False,
) -> TraceEstimate:
    """The least that a trace can take on devices that are not at hand.

    Each step takes the longer of its bytes over bandwidth and its products over speed. A split layer (Megatron's
    way, as transformers' `tp_plan` has it) adds two all-reduces of its rows, each 2 (n - 1) / n times their bytes
    over the link. Prompts are shared among the groups of devices, which costs nothing. Writing is not counted.

    Parameters
    ----------
    source: what Dimensions.of takes: a shape's name, a model or a trace.
    machine: a Machine, or its name: "h200x8/8".
    prompts, prompt_tokens: how many, and their length; batch_size: together in one pass.
    lenses: 2 for all statistics, 1 for agreement (whose witnesses then spare most of what is counted here).
    given: the text comes with the prompts: nothing is generated.
    """
    model, machine = Dimensions.of(source), Machine.of(machine) if isinstance(machine, str) else machine
    if min(prompts, prompt_tokens, max_new_tokens, batch_size) < 1:
        raise InputError("a trace has prompts, tokens in them, new tokens and a batch of at least 1 each.")
    batch_size = min(batch_size, prompts)
    roof, size, n, groups = DEVICES[machine.device], BYTES[dtype], machine.split, machine.count // machine.split
    weights = model.depth * model.layer_parameters
    cached = model.depth * 2 * (model.key_value_width or 0) * size

    def seconds(parameters: float, rows: float, context: float = 0.0, reduced: float = 0.0) -> float:
        moved = (parameters * size + context * cached) / n
        products = 2 * parameters * rows / n
        return max(moved / roof.bandwidth, products / roof.flops) + reduced * 2 * (n - 1) / n / machine.link

    def layers(rows: float, context: float = 0.0) -> float:
        return seconds(weights, rows, context, reduced=2 * model.depth * rows * model.width * size)

    new = max_new_tokens
    step = layers(batch_size, batch_size * (prompt_tokens + new / 2)) + seconds(model.head_parameters, batch_size)
    generation = 0.0 if given else layers(batch_size * prompt_tokens) + (new - 1) * step
    rows = batch_size * (prompt_tokens + new - 1)
    cells = rows * (model.depth + 1) * lenses
    logits = cells * model.vocabulary * 4 * LOGIT_PASSES / n / roof.bandwidth
    read = layers(rows)
    lens = seconds(model.head_parameters, cells) + logits
    batches = -(-prompts // batch_size)
    spent = {"generation": generation, "reading": read, "lens": lens}
    held = (weights + model.head_parameters * 2) * size / n + rows * (model.depth + 1) * model.width * size
    held += max(batch_size * (prompt_tokens + new) * cached / n, 2**30)
    return TraceEstimate(
        model=model.name,
        device=f"{machine.count} {machine.device}",
        source="roofline",
        processes=groups,
        prompts=prompts,
        batches=batches,
        rows=prompts * (prompt_tokens + new - 1),
        tokens=0 if given else prompts * new,
        seconds={name: batches * value for name, value in spent.items()},
        memory_bytes=int(held),
        memory_free=None,
        disk_bytes=int(prompts * (prompt_tokens + new - 1) * (model.depth + 1) * lenses * CELL_BYTES),
    )
