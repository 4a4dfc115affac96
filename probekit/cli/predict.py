"""`probekit predict`."""

from __future__ import annotations

from typing import Annotated

import typer

from probekit.cli import options
from probekit.cli.terminal import notice, print_json, print_table

FirstRound = Annotated[
    str,
    typer.Option(
        "--first-round",
        help="Whose rounds: prefill (probekit: the prefill emits the first token), draft (transformers: it is "
        "drafted), vllm or llama.cpp.",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option("--budget", help="New tokens, fewer than were traced: what vllm drafts past them is then known."),
]


def predict(
    run: options.Run,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    first_round: FirstRound = "prefill",
    budget: Budget = None,
    drafter: options.Drafter = None,
    draft_rows: options.DraftRows = None,
    policy: options.Policy = "fixed",
    rounds: Annotated[bool, typer.Option("--rounds", help="Every round of every prompt, too.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict the acceptance of every exit layer and draft length, or of another drafter, from one trace."""
    from probekit.drafting.named import drafters_named, levels_of
    from probekit.drafting.policies import policy_named
    from probekit.prediction.intervals import FEW_PROMPTS
    from probekit.prediction.predict import predict as predict_rounds
    from probekit.traces.trace import Trace

    trace, exits = Trace.open(run), options.integers(exit_layers, "--exit-layers")
    drafters = None if drafter is None else drafters_named(drafter, trace, exits, draft_rows=draft_rows)
    prediction = predict_rounds(
        trace,
        exit_layers=exits,
        draft_lengths=levels_of(drafters or (), options.integers(draft_lengths, "--draft-lengths")),
        first_round=first_round,
        with_rounds=rounds,
        draft_rows=draft_rows,
        drafters=drafters,
        policy=policy_named(policy),
        budget=budget,
    )
    if as_json:
        print_json(prediction.to_json())
        return
    if len(prediction.prompts) < FEW_PROMPTS:
        notice(
            f"{len(prediction.prompts)} prompts only: intervals are rough; take at least {FEW_PROMPTS}.", quiet=quiet
        )
    print_table(
        f"{prediction.model}: predicted from {prediction.text} text, first round by {prediction.first_round}"
        + ("" if draft_rows is None else f", draft head of {draft_rows:,} rows")
        + ("" if prediction.exit_heads is None else ", through exit heads"),
        ["drafts at", "length", "acceptance rate", "95 %", "alpha", "tokens per round", "95 %", "rounds"],
        [
            [
                cell.label,
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
        keys=2,
    )
