"""`probekit validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from probekit.cli import options
from probekit.cli.terminal import print_json, print_table, progress_bars
from probekit.cli.traced_models import models_of


def validate(
    run: options.Run,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    draft_rows: options.DraftRows = None,
    policy: options.Policy = "fixed",
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N prompts.")] = None,
    engine: options.Engine = "host",
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the decoder and hold it against the prediction, round by round and token by token."""
    from probekit.drafting.policies import policy_named
    from probekit.traces.trace import Trace
    from probekit.validation.run import validate as validate_cells

    trace = Trace.open(run)
    loaded, drafter = models_of(trace, device, dtype)
    if limit is not None:
        options.at_least_one(limit, "--limit")
    with progress_bars(quiet or as_json) as bars:
        validation = validate_cells(
            loaded,
            trace,
            exit_layers=options.integers(exit_layers, "--exit-layers"),
            draft_lengths=options.integers(draft_lengths, "--draft-lengths"),
            limit=limit,
            drafter=drafter,
            draft_rows=draft_rows,
            policy=policy_named(policy),
            engine=engine,
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
