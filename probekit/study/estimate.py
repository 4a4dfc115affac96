"""What a study will take, before it runs: from a few tokens of each of its models, traced and decoded here.

Times are measured on two prompts and multiplied; a study batches more, so that the trace tends to be faster than said.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from probekit.costs.measure import CALIBRATION_S
from probekit.decoding.autoregressive import Autoregressive
from probekit.models.loaded import Loaded
from probekit.models.memory import free_bytes
from probekit.progress import Progress, usual_progress
from probekit.settings import StudySettings
from probekit.study.phases import SPREAD_PROMPTS, TIMED_PROMPTS, load_model, spread_cells
from probekit.study.plan import StudyPlan, label_of
from probekit.study.probes import probed_layers
from probekit.tracing.prompts import encode
from probekit.tracing.tracer import trace

SAMPLE_PROMPTS, SAMPLE_TOKENS = 2, 16
BEST_CELLS = 3  # of the ranking, validated on every odd prompt
WAYS = 10  # of drafting: the best five and a spread, validated on a few
WRITING_S = 6.0  # tables, figures and the report of one model, on a common processor
PROBE_S = 1e-3  # of a probe, for each row of each layer, on a common processor
PICTURES_BYTES = 4_000_000  # of figures and report, for each model


@dataclass(frozen=True)
class Estimate:
    """What one model's part of a study takes.

    seconds: {phase: seconds} on this device. memory_bytes: of this process while it traces, and memory_free now.
    disk_bytes: of the run, tables, figures and report.
    """

    model: str
    prompts: int
    tokens: int
    seconds: dict[str, float]
    memory_bytes: int
    memory_free: int | None
    disk_bytes: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_s": self.total_s}


def estimate_study(plan: StudyPlan, progress: Progress | None = None) -> list[Estimate]:
    """An Estimate for each model, which is loaded and runs two prompts. Writes nothing. Raises what a study raises."""
    report = usual_progress(progress)
    return [
        _estimate(plan, load_model(plan.settings, reference, plan.prompts, report).loaded, label_of(reference), report)
        for reference in plan.settings.models
    ]


def _estimate(plan: StudyPlan, loaded: Loaded, name: str, progress: Progress) -> Estimate:
    settings, prompts = plan.settings, len(plan.traced)
    sample = plan.traced[:SAMPLE_PROMPTS]
    budget = min(SAMPLE_TOKENS, settings.max_new_tokens)
    sampled = partial(trace, loaded, sample, max_new_tokens=budget, sampling=settings.sampling, progress=progress)
    sampled()  # the first passes of a process are slow
    traced = sampled()
    timings = traced.manifest.measured.timings
    step = _autoregressive_step(loaded, encode(sample[0], loaded.tokenizer).ids, budget)

    text_s = step * settings.max_new_tokens
    rows = sum(len(encode(prompt, loaded.tokenizer).ids) for prompt in plan.traced)
    scored = prompts * settings.max_new_tokens
    rows += scored
    rows_of_sample = sum(len(traced.prompt_ids(prompt)) + len(traced.outputs(prompt)) for prompt in traced.prompts)
    row_s = timings["trace_s"] / rows_of_sample
    batched_s = timings["generation_s"] / timings["tokens"]
    odd = prompts // 2
    seconds = {
        "learn drafting": text_s * len(plan.learned) * 4 if settings.learns else 0.0,
        "trace": batched_s * prompts * settings.max_new_tokens + row_s * rows,
        "time the trace": min(TIMED_PROMPTS, prompts) * (text_s + row_s * rows / prompts),
        "probes": (PROBE_S * len(probed_layers(loaded.depth)) + row_s) * scored if settings.probes else 0.0,
        "costs": 2 * CALIBRATION_S,
        "validate": text_s
        * ((1 + BEST_CELLS) * odd + (2 + WAYS + _others(loaded, settings)) * min(SPREAD_PROMPTS, odd)),
        "tables, figures, report": WRITING_S,
    }
    residuals = scored * (loaded.depth + 1) * loaded.anatomy.width * loaded.dtype.itemsize if settings.probes else 0
    with tempfile.TemporaryDirectory() as folder:
        saved = traced.save(Path(folder) / "run").folder or Path(folder)
        of_sample = sum(path.stat().st_size for path in saved.iterdir())
    return Estimate(
        model=name,
        prompts=prompts,
        tokens=prompts * settings.max_new_tokens,
        seconds=seconds,
        memory_bytes=psutil.Process().memory_info().rss,
        memory_free=free_bytes(loaded.device),
        disk_bytes=int(of_sample * rows / rows_of_sample) + residuals + PICTURES_BYTES,
    )


def _others(loaded: Loaded, settings: StudySettings) -> int:
    """Cells that are validated beside the best."""
    return len(spread_cells(settings.exit_layers or range(1, loaded.depth), settings.draft_lengths, []))


def _autoregressive_step(loaded: Loaded, prompt_ids: tuple[int, ...], tokens: int) -> float:
    began = perf_counter()
    [done] = Autoregressive(loaded).decode([list(prompt_ids)], max_new_tokens=tokens)
    return (perf_counter() - began) / max(1, len(done.tokens))
