"""`probekit trace --plan`: what a trace will take, and nothing is done."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from probekit.cli.terminal import print_json, print_table
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.costs.trace_plan import TraceEstimate
    from probekit.tracing.plan import TracePlan

_HOW = {
    "sampled": "from some of the plan's own batches, traced here and thrown away. Nothing was written.",
    "roofline": "the least that these devices allow: bytes over bandwidth, products over speed. Nothing was run.",
}


def say_plan(
    plan: TracePlan, *, on: str | None, processes: int, prompts: int | None, batch_size: int | None, as_json: bool
) -> None:
    """Print the estimate of a trace: on this device, or of devices that are named."""
    from probekit.costs.trace_plan import roofline_trace, sample_trace

    if on is None:
        estimate = sample_trace(plan, processes=processes, prompts=prompts)
    else:
        settings, sizes = plan.manifest.settings, plan.encoded.sizes.values()
        new = [tokens - context if plan.written else settings.max_new_tokens for tokens, context in sizes]
        context = [context if plan.written else tokens for tokens, context in sizes]
        estimate = roofline_trace(
            plan.loaded,
            on,
            prompts=prompts or plan.manifest.prompt_count,
            prompt_tokens=max(1, round(fmean(context))),
            max_new_tokens=max(1, round(fmean(new))),
            batch_size=batch_size or 64,
            lenses=len(settings.lenses),
            given=plan.written,
        )
    _say(estimate, as_json)


def say_described(
    model: str, on: str, *, prompts: int, prompt_tokens: int, max_new_tokens: int, batch_size: int | None,
    statistics: str, given: bool, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the estimate of a trace of a model that is only described, on devices that are named."""
    from probekit.costs.trace_plan import roofline_trace
    from probekit.models.described import described

    source, new = described(model), 1 if given else max_new_tokens
    if prompt_tokens + new > source.anatomy.context:
        raise InputError(
            f"{prompt_tokens} tokens with {new} new ones exceed the context of {source.anatomy.context} tokens of "
            f"{source.name}."
        )
    estimate = roofline_trace(
        source, on, prompts=prompts, prompt_tokens=prompt_tokens, max_new_tokens=new, batch_size=batch_size or 64,
        lenses=2 if statistics == "all" else 1, given=given, dtype=dtype or "bfloat16",
    )  # fmt: skip
    _say(estimate, as_json)


def _say(estimate: TraceEstimate, as_json: bool) -> None:
    if as_json:
        print_json(estimate.to_json())
        return
    print_table(_title(estimate), ["", estimate.model], _rows(estimate), _HOW[estimate.source])


def _title(estimate: TraceEstimate) -> str:
    hours = estimate.total_s / 3600
    time = f"{estimate.total_s:.0f} seconds" if hours < 0.05 else f"{hours:,.1f} hours"
    return f"what this trace will take: about {time} on {estimate.device}"


def _rows(estimate: TraceEstimate) -> list[list[Any]]:
    free = None if estimate.memory_free is None else f"{estimate.memory_free / 1e9:.1f}"
    return [
        *([f"{phase}, s", f"{seconds:,.1f}"] for phase, seconds in estimate.seconds.items()),
        ["processes", estimate.processes],
        ["all, s", f"{estimate.total_s:,.1f}"],
        ["prompts", estimate.prompts],
        ["batches", estimate.batches],
        ["tokens generated, at most", estimate.tokens],
        ["memory of one device, GB", f"{estimate.memory_bytes / 1e9:.1f}"],
        ["free, GB", free],
        ["disk, MB", f"{estimate.disk_bytes / 1e6:,.0f}"],
    ]
