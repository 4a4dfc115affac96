"""`--costs` and `--context`: what they may say, and the costs that they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from probekit.cli import options
from probekit.cli.traced_models import models_of
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.costs.engine_profile import EngineProfile

MEASURED_CONTEXT, SERVED_CONTEXT = 128, 1024

Costs = Annotated[str, typer.Option("--costs", help="measured on this device, or from a roofline.")]
AnyCosts = Annotated[
    str, typer.Option("--costs", help="measured on this device, from a roofline, or an engine's profile (.json, .csv).")
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
            "`choose` takes an engine's profile, too: a .json or .csv file.",
        )
    if context is None:
        return MEASURED_CONTEXT if costs == "measured" else SERVED_CONTEXT
    return options.at_least_one(context, "--context")


def profile_named(costs: str) -> EngineProfile | None:
    """The engine's profile that `--costs` names by its file; None for the words that are none."""
    if not costs.lower().endswith((".json", ".csv")):
        return None
    from probekit.costs.engine_profile import read_profile

    return read_profile(costs)


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

    loaded, drafter = models_of(trace, device, dtype)
    kept = None if draft_rows is None else trace.draft_head_ids(draft_rows).tolist()
    return measure_costs(
        loaded, context, draft_lengths=lengths, drafter=drafter, draft_vocabulary=kept,
        exit_heads=traced_heads(trace, loaded), sampling=trace.sampling, policy=policy, progress=bars,
    )  # fmt: skip


def served_dtype(device: str | None) -> str | None:
    """A named accelerator serves in 16 bits; the run's own type elsewhere."""
    return None if device is None or device == "cpu" else "bfloat16"
