"""`--costs` and `--context`: what they may say, and the costs that they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from probekit.cli import options
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.costs.engine_profile import EngineProfile
    from probekit.costs.profile import Costs as Profile
    from probekit.progress import Progress
    from probekit.traces.trace import Trace

MEASURED_CONTEXT, SERVED_CONTEXT, MOST_CONTEXT = 128, 1024, 2**40
SWEEPS = 3  # of an engine that is timed within another command
MOST_LENGTHS = 8  # drafts, up to which every length is timed: engines multiply a few rows in tiles, with jumps between

Costs = Annotated[str, typer.Option("--costs", help="measured on this device, or from a roofline.")]
AnyCosts = Annotated[
    str,
    typer.Option(
        "--costs",
        help="measured on this device, from a roofline, an engine's profile (.json, .csv), or an engine to be timed "
        "now: transformers, vllm:PYTHON, llama.cpp:SERVER.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context", help="Tokens in the cache of a step. [default: 128, of a roofline 1024]"),
]


def context_of(costs: str, context: int | None) -> int:
    """Tokens in the cache of a step, by default those that suit where the costs come from. Raises InputError."""
    if costs not in ("measured", "roofline"):
        raise InputError(
            f"--costs is {costs!r}; expected measured or roofline.",
            "`choose` takes an engine's profile, too (a .json or .csv file), or transformers, vllm:PYTHON, "
            "llama.cpp:SERVER.",
        )
    if context is None:
        return MEASURED_CONTEXT if costs == "measured" else SERVED_CONTEXT
    return options.within(1, MOST_CONTEXT, context, "--context")


def profile_named(costs: str) -> EngineProfile | None:
    """The engine's profile that `--costs` names by its file; None for the words that are none."""
    if not costs.lower().endswith((".json", ".csv")):
        return None
    from probekit.costs.engine_profile import read_profile

    return read_profile(costs)


def engine_asked(costs: str) -> tuple[str, Path | None] | None:
    """(engine, its program) that `--costs` wants timed now; None where it wants something else."""
    name, colon, program = costs.partition(":")
    if name not in ("transformers", "vllm", "llama.cpp"):
        return None
    return name, Path(program).expanduser() if colon else None


def engine_profile(
    trace: Trace, asked: tuple[str, Path | None], rows: Sequence[int], contexts: Sequence[int], lengths: Sequence[int],
    device: str | None, dtype: str | None, bars: Progress | None,
) -> EngineProfile:  # fmt: skip
    """What this engine's steps take with the run's model."""
    from probekit.tracing.traced_models import models_of
    from probekit.validation.engine_costs import CostPlan, measure_home
    from probekit.validation.open_engine import EngineHome

    loaded, helper = models_of(trace, device, dtype)
    longest = max(lengths)
    widths = tuple(sorted({each for each in (1, 2, 4, 8, *lengths) if each <= min(MOST_LENGTHS, longest)} | {longest}))
    plan = CostPlan(
        (1, loaded.depth - 1), widths, tuple(rows), tuple(contexts), SWEEPS, together=asked[0] != "vllm",
        drafter=None if helper is None else helper.name,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        home = EngineHome(
            asked[0], loaded, Path(folder), asked[1], longest=plan.longest_text, rows=plan.rows[-1], helper=helper
        )
        return measure_home(home, plan, progress=bars)


def costs_along(trace: Trace, profile: EngineProfile, rows: int, context: int | None) -> Profile:
    """An engine's costs of a run's model, and of its draft model where that was timed."""
    helper = trace.manifest.drafter
    return profile.costs(trace.depth, rows=rows, context=context, drafter=None if helper is None else helper.name)


def convention_of(trace: Trace, engine: str | None) -> str:
    """By which convention rounds are predicted whose costs are those of an engine."""
    from probekit.engines.export import convention
    from probekit.engines.known import ENGINES

    told = None if engine is None else ENGINES.get(engine)
    return "prefill" if told is None else convention(trace, told)


def predicted(trace, whose, exits, lengths, draft_rows, policy, *, target=None, with_rounds=False):
    """The rounds of what an engine can draft with, where the costs are those of one (`whose`); otherwise of ours.

    target: the engine that is exported to; another one's prompt lookups are none of its.
    """
    from probekit.engines.inside import predict_inside
    from probekit.engines.known import ENGINES
    from probekit.prediction.predict import predict

    told = None if whose is None else ENGINES.get(whose)
    if told is None:
        return predict(trace, exits, lengths, with_rounds=with_rounds, draft_rows=draft_rows, policy=policy)
    look_up = False if target not in (None, whose) else None
    return predict_inside(trace, told, exits, lengths, draft_rows=draft_rows, policy=policy, look_up=look_up)


def costs_of(trace, source, context, lengths, draft_rows, policy, device, dtype, bars, *, rows=1, bits=None):
    """Costs that know every draft length asked for, and the run's draft model."""
    if source == "roofline":
        from probekit.costs.roofline import roofline_costs

        return roofline_costs(
            trace, context=context, device=device, dtype=dtype or served_dtype(device), longest_draft=max(lengths),
            drafter=trace.manifest.drafter, draft_rows=draft_rows, rows=rows, weight_bits=bits,
        )  # fmt: skip
    from probekit.costs.measure import measure_costs
    from probekit.tracing.plan import traced_heads
    from probekit.tracing.traced_models import models_of

    loaded, drafter = models_of(trace, device, dtype)
    kept = None if draft_rows is None else trace.draft_head_ids(draft_rows).tolist()
    return measure_costs(
        loaded, context, draft_lengths=lengths, drafter=drafter, draft_vocabulary=kept,
        exit_heads=traced_heads(trace, loaded), sampling=trace.sampling, policy=policy, rows=rows, progress=bars,
    )  # fmt: skip


def served_dtype(device: str | None) -> str | None:
    """A named accelerator serves in 16 bits; the run's own type elsewhere."""
    return None if device is None or device == "cpu" else "bfloat16"
