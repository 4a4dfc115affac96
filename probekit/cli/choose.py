"""`probekit choose`."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.costs import (
    MEASURED_CONTEXT,
    AnyCosts,
    Context,
    context_of,
    costs_along,
    costs_of,
    engine_asked,
    engine_profile,
    predicted,
    profile_named,
)
from probekit.cli.export import EngineName, schedule_of
from probekit.cli.terminal import notice, out, print_json, print_table, progress_bars
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.costs.profile import Costs as Profile

Imported = Annotated[
    list[Path] | None,
    typer.Option("--imported", metavar="FILE", help="A drafter from elsewhere, as Parquet; may be repeated."),
]


def choose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `probekit trace` or `study` wrote.")],
    costs: AnyCosts = "measured",
    context: Context = None,
    rows: Annotated[str | None, typer.Option("--rows", help="Rows in the batch, as 1,4,16: a choice for each.")] = None,
    contexts: Annotated[
        str | None, typer.Option("--contexts", help="Tokens in the cache, as 128,4096: a choice for each.")
    ] = None,
    weight_bits: Annotated[
        float | None, typer.Option("--weight-bits", help="Of a roofline: bits of a quantised weight.")
    ] = None,
    scenarios: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="WHERE",
            help="Another device, as device=h200,weight-bits=4,rows=8,context=8192; may be repeated.",
        ),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Hand the choice to an engine, as `probekit export`.")
    ] = None,
    engine: EngineName = "transformers",
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    draft_rows: options.DraftRows = None,
    policy: options.Policy = "fixed",
    imported: Imported = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose the exit layer and draft length with the greatest speedup, or neither; and the best way of all."""
    from probekit.choice.choose import choose as choose_pair
    from probekit.choice.rank import rank as rank_ways
    from probekit.choice.rank import with_trees
    from probekit.choice.schedule import schedule
    from probekit.choice.what_if import BATCHES, Scenario, what_if
    from probekit.costs.batch import BatchCosts
    from probekit.drafting.imported import import_drafter
    from probekit.drafting.policies import FIXED, policy_named
    from probekit.engines.engine import Drafting, check_drafting
    from probekit.engines.export import check_export
    from probekit.engines.known import engine_named
    from probekit.prediction.joint import check_batch
    from probekit.traces.trace import Trace

    if os.path.isfile(run / "study.json"):
        anew = {
            "--costs": None if costs == "measured" else costs, "--context": context, "--rows": rows,
            "--contexts": contexts, "--weight-bits": weight_bits, "--what-if": scenarios, "--export": export,
            "--exit-layers": exit_layers, "--draft-lengths": draft_lengths, "--draft-rows": draft_rows,
            "--policy": None if policy == "fixed" else policy, "--imported": imported,
        }  # fmt: skip
        _choose_of_study(run, [name for name, value in anew.items() if value is not None], as_json)
        return
    profile, asked, told = profile_named(costs), engine_asked(costs), engine_named(engine)
    if profile is None and asked is None:
        context = context_of(costs, context)
    elif context is None:
        context = MEASURED_CONTEXT if profile is None else profile.contexts[0]  # 0 where a profile says none
    else:
        options.at_least_one(context, "--context")
    batches = options.counts(rows, "--rows")
    places = options.counts(contexts, "--contexts", options.MOST_TOKENS)
    of_batches = costs == "measured" and max(batches or [1]) > 1
    if of_batches and export is not None:
        raise InputError(
            f"--rows {rows} exports a schedule, and batches are measured of the decoder here, not of {told.title}.",
            "Give --costs roofline, or the profile of that engine.",
        )
    elsewhere = [Scenario.named(each) for each in scenarios or ()]
    if weight_bits is not None and costs != "roofline":
        raise InputError("--weight-bits is of a roofline.", "Give --costs roofline.")
    if export is not None:
        check_export(export)  # before minutes of timing
    trace = Trace.open(run)
    if export is not None:
        check_drafting(told, Drafting(1, 1, draft_rows=draft_rows, exit_heads=trace.manifest.heads_name))
    longest = 8 if profile is None else min(8, profile.longest_draft)
    lengths = options.integers(draft_lengths, "--draft-lengths") or range(1, longest + 1)
    exits = options.integers(exit_layers, "--exit-layers")
    when_to_stop = policy_named(policy)
    others = [import_drafter(path, trace) for path in imported or ()]
    whose = profile.engine if profile is not None else None if asked is None else asked[0]
    prediction = predicted(
        trace, whose, exits, lengths, draft_rows, when_to_stop, target=None if export is None else engine,
        with_rounds=of_batches,
    )  # fmt: skip
    if of_batches:
        check_batch(prediction, max(batches or [1]))
    lengths = sorted({cell.draft_length for cell in prediction.cells})
    with progress_bars(quiet or as_json) as bars:
        if asked is not None:
            profile = engine_profile(
                trace, asked, batches or [1], places or [context], lengths, device, dtype, bars
            )  # fmt: skip

        @cache
        def costs_of_rows(count: int, at: int) -> Profile:
            if profile is not None:
                return costs_along(trace, profile, count, at)
            widest = with_trees(trace, lengths, at)
            return costs_of(
                trace, costs, at, widest, draft_rows, when_to_stop, device, dtype, bars, rows=count, bits=weight_bits
            )

        def costs_at(count: int, at: int) -> Profile | BatchCosts:
            if costs != "measured" or count == 1:
                return costs_of_rows(count, at)
            return BatchCosts.of(count, lambda rows: costs_of_rows(rows, at))

        first = costs_at(1 if batches is None else min(batches), context if places is None else min(places))
        plan = None
        if batches is not None or places is not None:
            plan = schedule(prediction, costs_at, batches or [1], places or [context])
    timed, ways = first.whole if isinstance(first, BatchCosts) else first, None
    if (
        when_to_stop == FIXED and profile is None and not isinstance(first, BatchCosts)
    ):  # a policy that was asked for is the only one, and these costs hold its time
        ways = rank_ways(trace, timed, exits, lengths, draft_rows=draft_rows, drafters=others)
    choice = choose_pair(prediction, first, ways=ways)
    answers = what_if(trace, prediction, elsewhere, draft_rows)
    if export is not None:
        from probekit.handover.export import export as hand_over

        drafts, scheduled = choice.best.drafts, None
        if batches is not None and drafts is not None:
            chosen_costs = costs if profile is None else profile
            scheduled = schedule_of(trace, drafts, batches, chosen_costs, timed.context, device, dtype)
        hand_over(trace, export, engine, choice, schedule=scheduled)
    if as_json:
        more = {} if plan is None else {"schedule": plan.to_json()}
        print_json(choice.to_json() | more | ({"what_if": [each.to_json() for each in answers]} if answers else {}))
        return
    notice(choice.sentence())
    if plan is not None:
        print_table(
            "the best way by rows in the batch and tokens in the cache",
            ["rows", "context", "drafts at", "length", "speedup", "95 %"],
            [
                [
                    count,
                    at,
                    each.best.label if each.speculate else "off",
                    each.draft_length,
                    each.speedup,
                    each.interval,
                ]
                for (count, at), each in plan.choices.items()
            ],
            "off: no way of drafting is predicted to beat plain decoding of the same batch."
            + (" A batch starts together, and whose text has ended leaves it." if of_batches else ""),
            keys=2,
        )
    if answers:
        print_table(
            "and elsewhere, by the roofline",
            ["where", "drafts at", "length", "speedup", "95 %", "stops paying at"],
            [
                [
                    each.scenario.label,
                    each.choice.best.label if each.choice.speculate else "off",
                    each.choice.draft_length,
                    each.choice.speedup,
                    each.choice.interval,
                    "-" if each.stops_at is None else f"{each.stops_at} rows",
                ]
                for each in answers
            ],
            f"rows: in the batch, tried from {BATCHES[0]} to {BATCHES[-1]}. A roofline is the least that each step can "
            "take; no step was timed there.",
        )
    print_table(
        f"costs: {timed.source}, {timed.device}, {timed.dtype}, context {timed.context}",
        ["drafts at", "length", "speedup", "95 %"],
        [[row.label, row.draft_length, row.speedup, row.interval] for row in choice.ranking[:10]],
        "speedup: time of autoregressive decoding on the same engine / time with drafts, decoding only.",
    )
    if ways is not None:
        print_table(
            "all ways of drafting; `probekit rank` shows more",
            ["drafts", "policy", "length", "tokens per round", "speedup", "95 %", "of the oracle"],
            [
                [row.label, row.policy, row.draft_length, row.tokens_per_round, row.speedup, row.interval,
                 ways.share_of_oracle(row)]
                for row in ways.shortlist(5)
            ],
            keys=3,
        )  # fmt: skip


def _choose_of_study(folder: Path, anew: list[str], as_json: bool) -> None:
    """A study has chosen already, for each of its models: say what. anew: options that ask for another choice."""
    from probekit.presentation.study_folder import open_study

    study = open_study(folder, keys=("choice", "sentence"))
    if anew:
        raise InputError(
            f"{folder} is a study, which has chosen already: a choice with {' and '.join(anew)} is of one run.",
            f"Give one of its runs: {folder / 'traces' / study.models[0]}.",
        )
    if as_json:
        print_json({"schema": "probekit/choose/1", "study": str(folder), "models": [
            {"name": entry["name"], "choice": entry["choice"]} for entry in study.entries]})  # fmt: skip
        return
    for entry in study.entries:
        out.print(Text(str(entry["sentence"])))
