"""What the benchmarks share: turns on one clock, honest peaks of memory, and records that say where they come from.

Ways of doing the same job take turns in one process, so that a busy machine is busy for all of them; ratios are taken
turn by turn. Memory is measured apart, in a fresh process for each way: what was resident at most beyond the model.
Every record keeps its raw samples. A benchmark that is run again on the same machine and settings adds to them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.batch import DecodeBatch
from probekit.errors import InputError
from probekit.models.loaded import Loaded, load
from probekit.models.shipped import TALES
from probekit.presentation.plots.style import STYLE
from probekit.settings import Sampling
from probekit.tracing.prompts import bundled_prompts_for

RESULTS = Path("docs/results/benchmarks")
TEXTS = Path("build/benchmarks/texts")
QUANTILES = (0.2, 0.5, 0.8)
PACKAGES = ("probekit", "torch", "transformers", "triton", "nnsight", "transformer-lens", "numpy")
CONTINUATION = 96  # new tokens after each bundled prompt, when text is made
MIB = 2**20

Way = Callable[[], Any]

Models = Annotated[
    str, typer.Option("--models", help="Bundled names, folders, GGUF files or hub ids, with commas between.")
]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder that receives the records and the figure.")]
Repeats = Annotated[int, typer.Option("--repeats", min=0, help="Turns of each way; added to those on record.")]


# Options of the scripts that decode one model in cells of (exit layer, draft length).
Model = Annotated[str, typer.Argument(help="A bundled name, a folder, a GGUF file or a hub id.")]
Cells = Annotated[
    list[str] | None, typer.Option("--cell", help="Exit layer and draft length, as 3,2; may be repeated.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of torch. [default: all cores]")]
Dtype = Annotated[str | None, typer.Option("--dtype")]
AnyDevice = Annotated[str | None, typer.Option("--device")]
Record = Annotated[Path, typer.Option("--output", "-o", help="Receives OUTPUT.json and .csv.")]
MODEL = "tales-layerskip"
CELLS = ("3,2",)


def references(models: str) -> list[str]:
    """The models that were named; the bundled ones by default."""
    return [name.strip() for name in models.split(",") if name.strip()] or list(TALES)


def opened(reference: str, device: str) -> Loaded:
    """The model, in float32 on the CPU and in its own dtype elsewhere."""
    return load(reference, device=device, dtype="float32" if device == "cpu" else None)


def opened_with(reference: str, threads: int | None, device: str | None, dtype: str | None) -> Loaded:
    """The model in the dtype and on the device that were asked for, with so many threads of torch."""
    if threads is not None:
        torch.set_num_threads(threads)
    return load(reference, device=device, dtype=dtype)


def pair_of(text: str) -> tuple[int, int]:
    """(exit layer, draft length) of `3,2`."""
    exit_layer, _, length = text.partition(",")
    try:
        return int(exit_layer), int(length)
    except ValueError:
        raise InputError(f"--cell is {text!r}; expected an exit layer and a draft length, as 3,2.") from None


def prompt_ids(loaded: Loaded, prompts: int) -> list[list[int]]:
    """Token ids of the first bundled prompts."""
    return [loaded.tokenizer(prompt.text)["input_ids"] for prompt in bundled_prompts_for(loaded.name)[:prompts]]


# ------------------------------------------------------------------------------------------------------ the text
def packed_text(loaded: Loaded, tokens: int, length: int = 256) -> torch.Tensor:
    """(texts, length) ids: the model's own greedy text after the bundled prompts, end to end, cut to one length.

    It holds at least one text, and `tokens` tokens where these are whole texts. Made once, then read.
    """
    length = min(length, loaded.anatomy.context, tokens)
    path = TEXTS / f"{loaded.name}-{(loaded.weights_hash or '')[:12]}-{tokens}x{length}.json"
    if not path.is_file():
        most = loaded.anatomy.context - CONTINUATION
        prompts = [loaded.tokenizer(prompt.text)["input_ids"][:most] for prompt in bundled_prompts_for(loaded.name)]
        ids: list[int] = []
        while len(ids) < tokens:  # later rounds are sampled, so that no text comes twice
            ids += _continued(loaded, prompts, seed=len(ids))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ids[: max(1, tokens // length) * length]))
    return torch.tensor(json.loads(path.read_text()), device=loaded.device).view(-1, length)


def _continued(loaded: Loaded, prompts: Sequence[list[int]], seed: int) -> list[int]:
    sampling = Sampling() if seed == 0 else Sampling(temperature=1.0, seed=seed)
    decoded = Autoregressive(loaded).decode(prompts, max_new_tokens=CONTINUATION, sampling=sampling)
    return [token for prompt, text in zip(prompts, decoded, strict=True) for token in (*prompt, *text.tokens)]


def fingerprint(ids: torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids.cpu().numpy()).tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ the clock
def timed(way: Way, device: torch.device | str) -> tuple[float, Any]:
    """Seconds of one call, the device's work included, and what it returned."""
    wait = partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else _nothing
    wait()
    began = time.perf_counter()
    returned = way()
    wait()
    return time.perf_counter() - began, returned


def turns(
    ways: Mapping[str, Way],
    repeats: int,
    device: torch.device | str,
    before: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each way, turn by turn; each turn begins with another way, also after those on record."""
    done = max(map(len, before.values()), default=0) if before else 0
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(done, done + repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(timed(ways[name], device)[0])
            say(f"  turn {turn + 1}: {name}: {seconds[name][-1]:.3f} s")
    return seconds


def _nothing() -> None:
    pass


@contextmanager
def stopwatch(clock: Callable[[], float] = time.perf_counter) -> Iterator[list[float]]:
    """The moments at which rounds of decoding begin and end, by a clock: those at which a batch says so itself."""
    ticks: list[float] = []
    lap = DecodeBatch.lap

    def noted(batch: DecodeBatch, phase: str) -> None:
        lap(batch, phase)
        if phase in ("prefill", "verify"):
            ticks.append(clock())

    DecodeBatch.lap = noted  # type: ignore[assignment, method-assign]
    try:
        yield ticks
    finally:
        DecodeBatch.lap = lap  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------ memory
@contextmanager
def extra_memory(device: torch.device | str) -> Iterator[Callable[[], int | None]]:
    """Ask, at the end, for the most bytes that were held beyond those at the start; None where nobody counts.

    On the CPU it is resident memory of the process as the kernel counts it, so call it in a fresh one.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        yield lambda: None
        return
    before = _resident("VmRSS")
    yield lambda: max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def in_fresh_process(script: str, *arguments: Any) -> dict[str, Any]:
    """Run a benchmark's script with these arguments; it prints one JSON document. Raises InputError if it fails."""
    command = [sys.executable, script, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{Path(script).name} {' '.join(map(str, arguments))} failed: {last}")
    return json.loads(run.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------------------------ the record
def spread(samples: Iterable[float | None]) -> dict[str, float] | None:
    """20 %, 50 % and 80 % quantiles of samples; None without any."""
    known = [sample for sample in samples if sample is not None]
    if not known:
        return None
    return {
        f"p{share * 100:.0f}": float(each) for share, each in zip(QUANTILES, np.quantile(known, QUANTILES), strict=True)
    }


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def target(what: str, samples: Sequence[float], *, at_most: float | None = None, at_least: float | None = None) -> dict:
    """A line of the judgement: the median against what was asked for."""
    found = spread(samples)
    assert found is not None
    met = found["p50"] <= at_most if at_most is not None else found["p50"] >= (at_least or 0.0)
    return {"what": what, "at_most": at_most, "at_least": at_least, "measured": found, "met": bool(met)}


def machine(device: str) -> dict[str, Any]:
    """What it was measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {"device": device, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def header(benchmark: str, loaded: Loaded, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two records comparable."""
    return {
        "schema": f"probekit/benchmark-{benchmark}/1",
        "model": loaded.name,
        "weights_hash": loaded.weights_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "machine": machine(loaded.device.type),
        "versions": versions(),
        "settings": dict(settings),
    }


def decoding_header(name: str, loaded: Loaded, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What a record of decoding says of itself: `more` stands behind the model."""
    return {
        "schema": f"probekit/{name}/1",
        "model": loaded.name,
        **more,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "settings": dict(settings),
        "versions": {package: version(package) for package in ("probekit", "torch", "transformers")},
    }


def write_record(output: Path, record: Mapping[str, Any], table: pd.DataFrame, float_format: str = "%.6g") -> None:
    """OUTPUT.json and, for the table, OUTPUT.csv."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    table.to_csv(output.with_suffix(".csv"), index=False, float_format=float_format)


def kept_samples(path: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """The samples of a record that was made in just the same way; nothing otherwise."""
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    same = all(record.get(name) == json.loads(json.dumps(value)) for name, value in head.items())
    return record.get("samples", {}) if same else {}


def extended(old: Mapping[str, Sequence[Any]] | None, new: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Samples by way, the new behind the old; only ways that both have keep their turns together."""
    if not old or set(old) != set(new):
        return {name: list(values) for name, values in new.items()}
    return {name: [*old[name], *values] for name, values in new.items()}


def write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"wrote {path}")
    for line in record.get("targets", ()):
        asked = f"at most {line['at_most']:g}" if line["at_most"] is not None else f"at least {line['at_least']:g}"
        say(f"  {'met   ' if line['met'] else 'MISSED'} {line['what']}: {line['measured']['p50']:.3g} ({asked})")


def records(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    """The records of a benchmark, one for each model and device, in the order of their files."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{benchmark}-*.json"))]


def record_path(folder: Path, benchmark: str, loaded: Loaded) -> Path:
    place = "" if loaded.device.type == "cpu" else f"-{loaded.device.type}"
    return folder / f"{benchmark}-{Path(loaded.name).name}{place}.json"


# ------------------------------------------------------------------------------------------------------ the figure
@contextmanager
def paper_figure(folder: Path, name: str, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches; written as PDF, SVG and PNG at the end."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for kind in ("pdf", "svg", "png"):
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            figure.savefig(folder / f"{name}.{kind}", metadata=metadata)
    say(f"wrote {folder / name}.pdf, .svg, .png")


def bars(axis: Axes, rows: Sequence[Mapping[str, Any]], field: str, scale: float, colours: Mapping[str, Any]) -> None:
    """Medians, with 20 % and 80 % quantiles as whiskers, and the figure beside each."""
    if not any(row[field] for row in rows):
        axis.set_axis_off()  # not measured
        return
    for place, row in enumerate(rows):
        if row[field] is None:
            continue
        low, middle, high = (row[field][name] * scale for name in ("p20", "p50", "p80"))
        axis.barh(place, middle, height=0.7, color=colours[row["way"]])
        axis.plot([low, high], [place, place], color="black", linewidth=0.8)
        axis.text(high, place, f"  {middle:#.3g}" if middle < 100 else f"  {middle:,.0f}", va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [row["way"] for row in rows])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.16)


def say(message: str) -> None:
    typer.echo(message, err=True)
