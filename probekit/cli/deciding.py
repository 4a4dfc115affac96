"""predict, choose, validate: from a trace to a decision, and to its proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probekit.cli import options
from probekit.cli.terminal import print_json, print_table, progress_bars, remark
from probekit.errors import InputError

FirstRound = Annotated[
    str, typer.Option("--first-round", help="prefill: the prefill emits the first token; draft: it is drafted.")
]
Costs = Annotated[str, typer.Option("--costs", help="measured on this device, or from a roofline.")]
Context = Annotated[int, typer.Option("--context", help="Tokens in the cache when a step is timed.")]


def predict(
    run: options.Run,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    first_round: FirstRound = "prefill",
    draft_rows: options.DraftRows = None,
    rounds: Annotated[bool, typer.Option("--rounds", help="Every round of every prompt, too.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict the acceptance of every exit layer and draft length from one trace."""
    from probekit.prediction.acceptance import predict as predict_rounds
    from probekit.tracing.traces import Trace

    prediction = predict_rounds(
        Trace.open(run),
        exit_layers=options.integers(exit_layers, "--exit-layers"),
        draft_lengths=options.integers(draft_lengths, "--draft-lengths") or range(1, 9),
        first_round=first_round,
        with_rounds=rounds,
        draft_rows=draft_rows,
    )
    if as_json:
        print_json(prediction.to_json())
        return
    print_table(
        f"{prediction.model}: predicted from {prediction.text} text, first round by {prediction.first_round}"
        + ("" if draft_rows is None else f", draft head of {draft_rows:,} rows")
        + ("" if prediction.exit_heads is None else ", through exit heads"),
        ["drafts at", "length", "acceptance rate", "95 %", "alpha", "tokens per round", "95 %", "rounds"],
        [
            [
                cell.drafter if cell.exit_layer is None else f"layer {cell.exit_layer}",
                cell.draft_length,
                cell.acceptance_rate,
                cell.acceptance_rate_interval,
                cell.alpha,
                cell.tokens_per_round,
                cell.tokens_per_round_interval,
                cell.rounds,
            ]
            for cell in prediction.cells
        ],
        "acceptance rate: accepted / drafted, pooled over prompts. alpha: accepted / (accepted + rounds that ended by "
        "a rejection). tokens per round: tokens / rounds, the token that verification adds is in it.",
    )


def choose(
    run: options.Run,
    costs: Costs = "measured",
    context: Context = 128,
    export: Annotated[Path | None, typer.Option("--export", help="Write the choice for use in transformers.")] = None,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    draft_rows: options.DraftRows = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose the exit layer and draft length with the greatest speedup, or neither."""
    from probekit.prediction.acceptance import predict as predict_rounds
    from probekit.prediction.choice import choose as choose_pair
    from probekit.prediction.choice import export_choice
    from probekit.tracing.traces import Trace

    if costs not in ("measured", "roofline"):
        raise InputError(f"--costs is {costs!r}; expected measured or roofline.")
    options.at_least_one(context, "--context")
    trace = Trace.open(run)
    lengths = options.integers(draft_lengths, "--draft-lengths") or range(1, 9)
    exits = options.integers(exit_layers, "--exit-layers")
    prediction = predict_rounds(trace, exits, lengths, draft_rows=draft_rows)
    with progress_bars(quiet or as_json) as bars:
        timed = _costs_of(trace, costs, context, lengths, draft_rows, device, dtype, bars)
    choice = choose_pair(prediction, timed)
    if export is not None:
        export_choice(choice, export)
    if as_json:
        print_json(choice.to_json())
        return
    remark(choice.sentence())
    print_table(
        f"costs: {timed.source}, {timed.device}, {timed.dtype}, context {timed.context}",
        ["drafts at", "length", "speedup", "95 %"],
        [[row.label, row.draft_length, row.speedup, row.interval] for row in choice.ranking[:10]],
        "speedup: time of autoregressive decoding on the same engine / time with drafts, decoding only.",
    )


def validate(
    run: options.Run,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    draft_rows: options.DraftRows = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N prompts.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the decoder and hold it against the prediction, round by round and token by token."""
    from probekit.prediction.validation import validate as validate_cells
    from probekit.tracing.traces import Trace

    trace = Trace.open(run)
    loaded, drafter = _models_of(trace, device, dtype)
    with progress_bars(quiet or as_json) as bars:
        validation = validate_cells(
            loaded,
            trace,
            exit_layers=options.integers(exit_layers, "--exit-layers"),
            draft_lengths=options.integers(draft_lengths, "--draft-lengths"),
            limit=limit,
            drafter=drafter,
            draft_rows=draft_rows,
            progress=bars,
        )
    if as_json:
        print_json(validation.to_json())
    else:
        print_table(
            f"{trace.manifest.model.name}: predicted and measured",
            ["drafts at", "length", "rounds equal", "tokens equal", "ties", "accepted", "drafted", "rounds",
             "speedup measured"],
            [
                [row.label, row.draft_length, row.rounds_equal, row.tokens_equal, row.ties,
                 f"{show_count(row.predicted['accepted'])} / {show_count(row.measured['accepted'])}",
                 f"{show_count(row.predicted['drafted'])} / {show_count(row.measured['drafted'])}",
                 f"{show_count(row.predicted['rounds'])} / {show_count(row.measured['rounds'])}",
                 row.speedup_measured]
                for row in validation.cells
            ],
            "counts are predicted / measured. ties: rounds that differ at a near-tie of the argmax.",
        )  # fmt: skip
    if not validation.holds:
        raise typer.Exit(1)


def show_count(value: float) -> str:
    """A count: whole when exact, with one decimal when expected."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _models_of(trace, device, dtype):
    """The model of a run and its drafter, loaded from where the manifest says."""
    from probekit.models.loading import load

    manifest = trace.manifest
    device = device or manifest.device
    loaded = load(manifest.model.reference, device=device, dtype=dtype or manifest.dtype)
    if manifest.drafter is None:
        return loaded, None
    return loaded, load(manifest.drafter.reference, device=device, dtype=dtype or manifest.dtype)


def _costs_of(trace, source, context, lengths, draft_rows, device, dtype, bars):
    """Costs that know every draft length asked for, and the run's draft model."""
    if source == "roofline":
        from probekit.prediction.costs import roofline_costs

        return roofline_costs(
            trace, context=context, device=device, dtype=dtype, longest_draft=max(lengths),
            drafter=trace.manifest.drafter, draft_rows=draft_rows,
        )  # fmt: skip
    from probekit.prediction.costs import measure_costs
    from probekit.tracing.tracer import traced_heads

    loaded, drafter = _models_of(trace, device, dtype)
    kept = None if draft_rows is None else trace.draft_head_ids(draft_rows).tolist()
    return measure_costs(
        loaded, context, draft_lengths=lengths, drafter=drafter, draft_vocabulary=kept,
        exit_heads=traced_heads(trace, loaded), progress=bars,
    )  # fmt: skip
