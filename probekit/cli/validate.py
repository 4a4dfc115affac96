"""`probekit validate`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from probekit.cli import options
from probekit.cli.costs import costs_of
from probekit.cli.kept import kept_costs, kept_in, no_longer_kept
from probekit.cli.rank import show_run
from probekit.cli.signals import keeping
from probekit.cli.terminal import print_json, print_table, progress_bars
from probekit.errors import InputError

SHOWN_DIFFERENCES = 12


def validate(
    run: options.Run,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    drafter: options.Drafter = None,
    draft_rows: options.DraftRows = None,
    policy: options.Policy = "fixed",
    ways: Annotated[
        bool, typer.Option("--ways", help="Rank all ways of drafting; run the best five and a spread of others.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N prompts.")] = None,
    engine: options.Engine = "host",
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the decoder and hold it against the prediction, round by round and token by token."""
    from probekit.drafting.named import drafters_named, levels_of
    from probekit.drafting.policies import policy_named
    from probekit.models.device_map import is_splitting
    from probekit.ranks import Ranks
    from probekit.traces.trace import Trace
    from probekit.tracing.traced_models import models_of
    from probekit.validation.run import validate as validate_cells

    ranks = replace(Ranks.of_environment(), in_step=is_splitting())
    trace, quiet = Trace.open(run), quiet or not ranks.first
    if limit is not None:
        options.at_least_one(limit, "--limit")
    if ways:
        if drafter is not None or policy != "fixed":
            raise InputError("--ways ranks every drafter and policy; one was named.", "Leave one of them out.")
        asked = exit_layers, draft_lengths, draft_rows, limit
        place = kept_in(run, "ways", *asked, device, dtype)
        with keeping(lambda: "What was decoded is kept."):
            _validate_ways(trace, *asked, ranks.device(device), dtype, place, ranks, as_json, quiet)
        return
    exits = options.integers(exit_layers, "--exit-layers")
    named = None if drafter is None else drafters_named(drafter, trace, exits, draft_rows=draft_rows)
    lengths = levels_of(named or (), options.integers(draft_lengths, "--draft-lengths"))
    place = kept_in(run, exit_layers, draft_lengths, drafter, draft_rows, policy, limit, engine, device, dtype)
    loaded, draft_model = models_of(trace, ranks.device(device), dtype)
    with keeping(lambda: "What was decoded is kept."), progress_bars(quiet or as_json) as bars:
        validation = validate_cells(
            loaded,
            trace,
            exit_layers=exits,
            draft_lengths=lengths,
            limit=limit,
            drafter=draft_model,
            drafters=named,
            draft_rows=draft_rows,
            policy=policy_named(policy),
            engine=engine,
            keep=place,
            ranks=ranks,
            progress=bars,
        )
    if not ranks.first:
        return
    no_longer_kept(place)
    if as_json:
        print_json(validation.to_json())
    else:
        print_table(
            f"{trace.manifest.model.name}: predicted and measured",
            ["drafts at", "length", "rounds equal", "tokens equal", "ties", "excusable", "accepted", "drafted",
             "rounds", "speedup measured"],
            [
                [row.label, row.draft_length, row.rounds_equal, row.tokens_equal, row.ties,
                 "-" if row.excusable_share is None else f"{row.excusable_share:.1%}",
                 f"{show_count(row.predicted['accepted'])} / {show_count(row.measured['accepted'])}",
                 f"{show_count(row.predicted['drafted'])} / {show_count(row.measured['drafted'])}",
                 f"{show_count(row.predicted['rounds'])} / {show_count(row.measured['rounds'])}",
                 row.speedup_measured]
                for row in validation.cells
            ],
            "counts are predicted / measured. ties: rounds that differ at a near-tie of the argmax. excusable: "
            "positions that are near one, where a difference would be excused.",
            keys=2,
        )  # fmt: skip
        _show_differences(validation.cells)
    if not validation.holds:
        raise typer.Exit(1)


def _show_differences(cells):
    """Each place where the decoder left the prediction, and how near to a tie it was."""
    rows = [
        [row.label, row.draft_length, each.prompt, each.output, each.what, each.predicted, each.measured, each.kind,
         each.margin]
        for row in cells
        for each in row.differences
    ]  # fmt: skip
    if rows:
        more = len(rows) - SHOWN_DIFFERENCES
        print_table(
            "where they differ",
            ["drafts at", "length", "prompt", "output", "of", "predicted", "measured", "kind", "margin"],
            [["-" if value is None else value for value in row] for row in rows[:SHOWN_DIFFERENCES]],
            "margin: logits between the two most probable tokens there, of the model or the exit, the smaller one."
            + (f" {more} more are in the JSON (--json)." if more > 0 else ""),
            keys=4,
        )


def _validate_ways(trace, exit_layers, draft_lengths, draft_rows, limit, device, dtype, place, ranks, as_json, quiet):
    """Rank with costs of this device at the context of these texts, run the best and a spread of others.

    Of several processes the first one's costs, and its ranking, are everybody's; where they share a model, all measure.
    place: keeps the costs as well, since which ways are run follows from them.
    """
    from probekit.choice.rank import rank, with_trees
    from probekit.drafting.policies import FIXED
    from probekit.kept import Kept
    from probekit.prediction.rounds import within_budget
    from probekit.ranks import joined
    from probekit.tracing.traced_models import models_of
    from probekit.validation.run import texts_digest
    from probekit.validation.ways import validate_ways

    asked = options.integers(draft_lengths, "--draft-lengths") or range(1, 9)
    lengths = within_budget(asked, trace.manifest.settings.max_new_tokens)
    exits = options.integers(exit_layers, "--exit-layers")
    middle = int((trace.texts["prompt_tokens"] + trace.texts["new_tokens"] / 2).median())
    with joined(ranks) as ranks, progress_bars(quiet or as_json) as bars:

        def timed():
            widest = with_trees(trace, lengths, middle)
            return costs_of(trace, "measured", middle, widest, draft_rows, FIXED, device, dtype, bars)

        def chosen(costs):
            ranking = rank(trace, costs, exits, lengths, draft_rows=draft_rows)
            return costs, [each.way for each in ranking.to_run() if each.way is not None]

        loaded, draft_model = ranks.agreed(lambda: models_of(trace, device, dtype))
        mine = ranks.agreed(timed) if ranks.in_step else None
        kept = Kept(place, texts_digest(loaded, trace, "host"))
        costs, run = ranks.from_first_of(lambda: chosen(kept_costs(kept, lambda: mine or timed())))
        checked = validate_ways(
            loaded, trace, run, draft_model=draft_model, limit=limit, costs=costs,
            keep=place, ranks=ranks, progress=bars,
        )  # fmt: skip
    if not ranks.first:
        return
    no_longer_kept(place)
    if as_json:
        print_json({"schema": "probekit/validate/1", "cells": [], "ways": [each.to_json() for each in checked.ways]})
    else:
        show_run(checked)
    if not checked.holds:
        raise typer.Exit(1)


def show_count(value: float) -> str:
    """A count: whole when exact, with one decimal when expected."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
