"""`probekit choose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probekit.cli import options
from probekit.cli.terminal import notice, print_json, print_table, progress_bars
from probekit.cli.traced_models import models_of
from probekit.errors import InputError

Costs = Annotated[str, typer.Option("--costs", help="measured on this device, or from a roofline.")]
Context = Annotated[int, typer.Option("--context", help="Tokens in the cache when a step is timed.")]


def choose(
    run: options.Run,
    costs: Costs = "measured",
    context: Context = 128,
    export: Annotated[Path | None, typer.Option("--export", help="Write the choice for use in transformers.")] = None,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    draft_rows: options.DraftRows = None,
    policy: options.Policy = "fixed",
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose the exit layer and draft length with the greatest speedup, or neither."""
    from probekit.choice.choose import choose as choose_pair
    from probekit.choice.export import export_choice
    from probekit.drafting.policies import policy_named
    from probekit.prediction.predict import predict as predict_rounds
    from probekit.traces.trace import Trace

    if costs not in ("measured", "roofline"):
        raise InputError(f"--costs is {costs!r}; expected measured or roofline.")
    options.at_least_one(context, "--context")
    trace = Trace.open(run)
    lengths = options.integers(draft_lengths, "--draft-lengths") or range(1, 9)
    exits = options.integers(exit_layers, "--exit-layers")
    when_to_stop = policy_named(policy)
    prediction = predict_rounds(trace, exits, lengths, draft_rows=draft_rows, policy=when_to_stop)
    with progress_bars(quiet or as_json) as bars:
        timed = _costs_of(trace, costs, context, lengths, draft_rows, when_to_stop, device, dtype, bars)
    choice = choose_pair(prediction, timed)
    if export is not None:
        export_choice(choice, export)
    if as_json:
        print_json(choice.to_json())
        return
    notice(choice.sentence())
    print_table(
        f"costs: {timed.source}, {timed.device}, {timed.dtype}, context {timed.context}",
        ["drafts at", "length", "speedup", "95 %"],
        [[row.label, row.draft_length, row.speedup, row.interval] for row in choice.ranking[:10]],
        "speedup: time of autoregressive decoding on the same engine / time with drafts, decoding only.",
    )


def _costs_of(trace, source, context, lengths, draft_rows, policy, device, dtype, bars):
    """Costs that know every draft length asked for, and the run's draft model."""
    if source == "roofline":
        from probekit.costs.roofline import roofline_costs

        return roofline_costs(
            trace, context=context, device=device, dtype=dtype, longest_draft=max(lengths),
            drafter=trace.manifest.drafter, draft_rows=draft_rows,
        )  # fmt: skip
    from probekit.costs.measure import measure_costs
    from probekit.tracing.plan import traced_heads

    loaded, drafter = models_of(trace, device, dtype)
    kept = None if draft_rows is None else trace.draft_head_ids(draft_rows).tolist()
    return measure_costs(
        loaded, context, draft_lengths=lengths, drafter=drafter, draft_vocabulary=kept,
        exit_heads=traced_heads(trace, loaded), policy=policy, progress=bars,
    )  # fmt: skip
