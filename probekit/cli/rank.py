"""`probekit rank`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from probekit.cli import options
from probekit.cli.choose import Imported
from probekit.cli.costs import Context, Costs, context_of, costs_of
from probekit.cli.kept import kept_costs, kept_in, no_longer_kept
from probekit.cli.signals import keeping
from probekit.cli.terminal import notice, print_json, print_table, progress_bars
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.choice.ranking import Ranking
    from probekit.costs.profile import Costs as Profile
    from probekit.validation.ways import WaysValidation


def rank(
    run: options.Run,
    costs: Costs = "measured",
    context: Context = None,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    draft_rows: options.DraftRows = None,
    imported: Imported = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Rank this policy too, as confidence:0.7 or probe:FILE.")
    ] = None,
    validate: Annotated[
        int, typer.Option("--validate", metavar="N", help="Run the N best ways, and hold them against their rounds.")
    ] = 0,
    limit: Annotated[int | None, typer.Option("--limit", help="Validate on the first N prompts only.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Every way of drafting on one scale, and the oracle above them."""
    from probekit.choice.rank import STOPPING, with_trees
    from probekit.choice.rank import rank as rank_ways
    from probekit.drafting.imported import import_drafter
    from probekit.drafting.policies import FIXED, policy_named
    from probekit.prediction.rounds import within_budget
    from probekit.ranks import Ranks
    from probekit.traces.trace import Trace

    context = context_of(costs, context)
    if validate < 0:
        raise InputError(f"--validate is {validate}; expected 0 or more.")
    ranks = Ranks.of_environment()
    if not (validate or ranks.first):
        return  # a ranking is seconds of replay: only what the decoder runs is shared
    trace, quiet, device = Trace.open(run), quiet or not ranks.first, ranks.device(device)
    asked = options.integers(draft_lengths, "--draft-lengths") or range(1, 9)
    lengths = within_budget(asked, trace.manifest.settings.max_new_tokens)
    exits = options.integers(exit_layers, "--exit-layers")
    policies = STOPPING if policy is None else {**STOPPING, policy: policy_named(policy)}
    others = [import_drafter(path, trace) for path in imported or ()]

    def timed() -> Profile:
        widest = with_trees(trace, lengths, context)
        return costs_of(trace, costs, context, widest, draft_rows, FIXED, device, dtype, bars)

    def ranked(known: Profile) -> Ranking:
        return rank_ways(trace, known, exits, lengths, draft_rows=draft_rows, drafters=others, policies=policies)

    # A roofline's device is described, not here: the ways run where the run was traced.
    where = (None, None) if costs == "roofline" else (device, dtype)
    place = kept_in(run, "rank", costs, context, exit_layers, draft_lengths, draft_rows, imported, policy, validate,
                    limit, device, dtype)  # fmt: skip
    with keeping(lambda: "What was decoded is kept." if validate else ""), progress_bars(quiet or as_json) as bars:
        if validate:
            ranking, checked = _validated(trace, timed, ranked, validate, limit, *where, place, ranks, bars)
        else:
            ranking, checked = ranked(timed()), None
    if ranking is None:
        return  # the first process says it
    if validate:
        no_longer_kept(place)
    if as_json:
        document = ranking.to_json()
        if checked is not None:
            document["validated"] = [each.to_json() for each in checked.ways]
        print_json(document)
    else:
        _show(ranking, checked)
    if checked is not None and not checked.holds:
        raise typer.Exit(1)


def _validated(trace, timed, ranked, best, limit, device, dtype, place, ranks, bars):
    """The first process's ranking, None in others, and its best ways, run by all processes, each a share of them.

    place: keeps what was decoded, and the costs that the ways were ranked by.
    """
    from probekit.kept import Kept
    from probekit.ranks import joined
    from probekit.tracing.traced_models import models_of
    from probekit.validation.run import texts_digest
    from probekit.validation.ways import validate_ways

    with joined(ranks) as ranks:
        loaded, drafter = ranks.agreed(lambda: models_of(trace, device, dtype))
        kept = Kept(place, texts_digest(loaded, trace, "host"))
        ranking = ranks.agreed(lambda: ranked(kept_costs(kept, timed)) if ranks.first else None)
        costs, ways = ranks.from_first_of(
            lambda: (ranking.costs, [each.way for each in ranking.shortlist(best) if each.way is not None])
        )
        checked = validate_ways(
            loaded, trace, ways, draft_model=drafter, limit=limit, costs=costs, keep=place, ranks=ranks, progress=bars
        )
    return ranking, checked


def _show(ranking: Ranking, checked: WaysValidation | None) -> None:
    notice(ranking.sentence())
    costs = ranking.costs
    above = [ranking.oracle] if ranking.oracle is not None else []
    print_table(
        f"costs: {costs.source}, {costs.device}, {costs.dtype}, context {costs.context}",
        ["drafts", "policy", "length", "tokens per round", "drafted a token", "speedup", "95 %", "of the oracle",
         "exact"],
        [
            [way.label, way.policy, way.draft_length, way.tokens_per_round, way.drafted_per_token, way.speedup,
             way.interval, ranking.share_of_oracle(way), way.exact]
            for way in [*above, *ranking.shortlist()]
        ],
        "speedup: predicted, over autoregressive decoding on the same engine, decoding only; of each drafter and "
        "policy the best length. of the oracle: its speed over the oracle's. exact: so are drafted tokens; what a "
        "policy that looks at drafts lets be drafted behind a mismatch is estimated. Learned ways are judged on the "
        "half of the prompts that they were not learned on.",
        keys=3,
    )  # fmt: skip
    for ways, why in ranking.not_ranked:
        notice(f"Not ranked: {ways}; {why}.")
    kinds = ranking.kinds()
    if len(kinds) > 1:
        print_table(
            "by kind of text",
            ["kind", "prompts", "best there", "policy", "speedup", "one choice for all", "loses", "oracle"],
            [
                [row.kind, row.prompts, row.best.label, row.best.policy, row.best_speedup, row.choice_speedup, row.loss,
                 row.oracle_speedup]
                for row in kinds
            ],
        )  # fmt: skip
    if checked is not None:
        show_run(checked)


def show_run(checked: WaysValidation) -> None:
    """What the decoder did, beside what was predicted."""
    print_table(
        "run by the decoder",
        ["drafts", "policy", "length", "rounds equal", "tokens equal", "ties", "drafted", "rounds", "speedup predicted",
         "measured"],
        [
            [each.way.label, each.way.name, each.way.draft_length, each.rounds_equal, each.tokens_equal, each.near_ties,
             f"{each.predicted['drafted']:,} / {each.measured['drafted']:,}",
             f"{each.predicted['rounds']:,} / {each.measured['rounds']:,}", each.speedup_predicted,
             each.speedup_measured]
            for each in checked.ways
        ],
        "counts are predicted / measured.",
        keys=3,
    )  # fmt: skip
