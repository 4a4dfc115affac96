"""What holds of traces at scale: the plan against what a trace took, many processes, many prompts.

    python analyses/trace_at_scale.py plan [MODEL ...]      # `trace --plan` against measurements
    python analyses/trace_at_scale.py processes             # 1, 2, 3 and 4 processes at one trace
    python analyses/trace_at_scale.py prompts               # predictions over up to 100,000 prompts: memory and time

Each writes docs/results/scale/NAME.json. Times are a process's own processor time: on a shared machine the clock on the
wall tells of others. The work of n processes is even when the busiest of them has an n-th of what one alone has.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path("docs/results/scale")
SIZES = (1, 2, 3, 4)
PROMPTS = (1_000, 10_000, 100_000)
PART = 50
TURNS = 2
KINDS = {  # by parameters: prompts, and what the trace of them is asked for
    20e6: (96, {"max_new_tokens": 32}),
    200e6: (32, {"max_new_tokens": 8, "batch_size": 2, "statistics": "agreement"}),
    1e12: (16, {"max_new_tokens": 4, "batch_size": 1, "statistics": "agreement"}),
}
app = typer.Typer(add_completion=False)
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the records.")]


def record(output: Path, name: str, question: str, found: Mapping[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    document = {
        "question": question,
        **found,
        "machine": {
            "processors": os.cpu_count(), "kind": platform.machine(), "system": platform.platform(),
            "threads of a process": 1, "other load": [round(each, 1) for each in os.getloadavg()],
        },
        "versions": {package: version(package) for package in ("probekit", "torch", "transformers", "numpy", "pandas")},
    }  # fmt: skip
    (output / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    typer.echo(json.dumps(found, indent=1))


def texts(count: int) -> list[str]:
    """Prompts of many lengths, out of the bundled ones."""
    from probekit.tracing.prompts import bundled_prompts

    words = [prompt.text.split() for name in ("tales", "general") for prompt in bundled_prompts(name)]
    return [" ".join(words[number % len(words)][: 2 + (7 * number) % 23]) for number in range(count)]


# --------------------------------------------------------------------------------------------------------- plan
@app.command()
def plan(models: Annotated[list[str] | None, typer.Argument()] = None, output: Output = RESULTS) -> None:
    """Estimates of `trace --plan` beside what the whole trace took."""
    import torch

    from probekit.costs import trace_plan
    from probekit.models.loaded import load
    from probekit.settings import TraceSettings
    from probekit.tracing import plan as plans
    from probekit.tracing import tracer

    torch.set_num_threads(1)
    for room in (tracer, trace_plan):
        room.perf_counter = time.process_time
    rows = []
    for name in models or ["tales-tied"]:
        loaded = load(name, device="cpu", dtype="float32")
        count, asked = next(kind for most, kind in KINDS.items() if loaded.anatomy.parameters < most)
        settings = TraceSettings(**asked)
        estimate = trace_plan.sample_trace(plans.plan_trace(loaded, texts(count), settings))
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            traced = tracer.trace(loaded, texts(count), Path(folder) / "run", **asked)
            whole = time.process_time() - began
            disk = sum(path.stat().st_size for path in (Path(folder) / "run").glob("*.parquet"))
            timings, settings_there = traced.manifest.measured.timings, traced.manifest.settings
            cells = len(traced.tokens) * (loaded.depth + 1) * len(settings_there.lenses)
        rows.append({
            "model": loaded.name, "parameters": loaded.anatomy.parameters, "prompts": count, "asked": asked,
            "estimated_s": estimate.total_s, "measured_s": whole, "ratio": estimate.total_s / whole,
            "estimated": dict(estimate.seconds), "measured": dict(timings),
            "estimated_bytes": estimate.disk_bytes, "measured_bytes": disk, "bytes_ratio": estimate.disk_bytes / disk,
            "bytes_of_a_cell": disk / cells,
        })  # fmt: skip
        typer.echo(json.dumps(rows[-1]))
    record(output, "plan", "How far is `trace --plan` from what the trace takes?", {"models": rows})


# ---------------------------------------------------------------------------------------------------- processes
RANK = """
import json, sys, time
import torch
from probekit.models.loaded import load
from probekit.ranks import Ranks, joined
from probekit.tracing.tracer import trace
torch.set_num_threads(1)
folder, asked = sys.argv[1], json.loads(sys.argv[2])
loaded = load(asked.pop("model"), device="cpu")
with joined(Ranks.of_environment()) as ranks:
    trace(loaded, asked["prompts"][:2], None if ranks.size == 1 else folder + "-warm", max_new_tokens=4, ranks=ranks)
    began, wall = time.process_time(), time.perf_counter()
    trace(loaded, folder=folder, ranks=ranks, **asked)
    print(json.dumps([time.process_time() - began, time.perf_counter() - wall]))
"""


@app.command()
def processes(output: Output = RESULTS, model: str = "tales-tied", prompts: int = 96, tokens: int = 48) -> None:
    """One trace by 1 to 4 processes: processor time of each, and how even the work is."""
    asked = {"model": model, "prompts": texts(prompts), "max_new_tokens": tokens, "batch_size": 8}
    turns: dict[int, list[dict[str, Any]]] = {size: [] for size in SIZES}
    for _ in range(TURNS):
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                busy, wall = zip(*_job(size, f"{folder}/run", asked), strict=True)
            turns[size].append({"busiest_s": max(busy), "all_s": sum(busy), "wall_s": max(wall)})
            typer.echo(f"{size}: {turns[size][-1]}")
    rows = []
    for size in SIZES:
        best = min(turns[size], key=lambda turn: turn["busiest_s"])
        alone = min(turn["busiest_s"] for turn in turns[1])
        rows.append({
            "processes": size, **best, "efficiency": alone / (size * best["busiest_s"]),
            "work_more": best["all_s"] / alone, "turns": turns[size],
        })  # fmt: skip
    question = "How much of n processes' time is used, by processor time of the busiest (1 is all of it)?"
    record(output, "processes", question, {"model": model, "prompts": prompts, "tokens": tokens, "sizes": rows})


def _job(size: int, folder: str, asked: Mapping[str, Any]) -> list[list[float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(size):
        own = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, "-c", RANK, folder, json.dumps(asked)]
        environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    said = [process.communicate() for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(error for _, error in said))
    return [json.loads(answer.splitlines()[-1]) for answer, _ in said]


# ------------------------------------------------------------------------------------------------------ prompts
PREDICT = """
import json, sys, time
from pathlib import Path
from probekit.traces.trace import Trace
from probekit.prediction.predict import predict
def peak():  # of this program, not of what started it, as ru_maxrss has it
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024
before = peak()
began = time.process_time()
trace = Trace.open(sys.argv[1])
opened = time.process_time() - began
table = predict(trace)
cell = table.cells[0]
print(json.dumps({
    "peak_mb": peak(), "imported_mb": before,
    "opened_s": opened, "seconds": time.process_time() - began, "cells": len(table.cells),
    "tokens": cell.tokens, "acceptance_rate": cell.acceptance_rate, "interval": cell.acceptance_rate_interval,
}))
"""


@app.command()
def prompts(output: Output = RESULTS, depth: int = 12, tokens: int = 32) -> None:
    """Predictions of larger and larger runs: what the process holds at most, in a fresh process for each."""
    sys.path.insert(0, "tests")
    rows = []
    for count in PROMPTS:
        with tempfile.TemporaryDirectory() as folder:
            bytes_written = _fabricated(Path(folder) / "run", count, depth, tokens)
            words = [sys.executable, "-c", PREDICT, str(Path(folder) / "run")]
            said = subprocess.run(
                words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        rows.append({"prompts": count, "run_bytes": bytes_written, **json.loads(said.stdout)})
        typer.echo(json.dumps(rows[-1]))
    question = "What does a prediction of many prompts hold at most, all exits and 8 draft lengths?"
    record(output, "prompts", question, {"layers": depth, "budget": tokens, "runs": rows})


def _fabricated(folder: Path, count: int, depth: int, tokens: int) -> int:
    """A run of so many prompts: a thousand plausible texts again and again, in parts of PART prompts."""
    from traces.fabricate import fabricate

    from probekit.traces.storage import tables_of, writing_run

    many = fabricate(depth=depth, prompts=min(count, 1000), tokens=tokens)
    batches = tuple(tuple(range(first, first + PART)) for first in range(0, count, PART))
    manifest = many.manifest.but(batches=batches)
    groups = {
        name: {key: frame for key, frame in getattr(many, name).groupby(getattr(many, name)["prompt"] // PART)}
        for name in tables_of(manifest)
    }
    with writing_run(folder, manifest) as writer:
        for part in range(len(batches)):
            source = part % len(groups["texts"])
            shift = PART * (part - source)
            writer.write(
                part,
                {name: parts[source].assign(prompt=parts[source]["prompt"] + shift) for name, parts in groups.items()},
            )
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    app()
