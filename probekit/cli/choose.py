"""`probekit choose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.terminal import notice, out, print_json, print_table, progress_bars
from probekit.cli.traced_models import models_of, pretrained_of
from probekit.errors import InputError
from probekit.presentation.study_folder import open_study

MEASURED_CONTEXT, SERVED_CONTEXT = 128, 1024

Costs = Annotated[str, typer.Option("--costs", help="measured on this device, or from a roofline.")]
Context = Annotated[
    int | None,
    typer.Option("--context", help="Tokens in the cache of a step. [default: 128, of a roofline 1024]"),
]

Imported = Annotated[
    list[Path] | None,
    typer.Option("--imported", metavar="FILE", help="A drafter from elsewhere, as Parquet; may be repeated."),
]


def choose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `probekit trace` or `study` wrote.")],
    costs: Costs = "measured",
    context: Context = None,
    export: Annotated[Path | None, typer.Option("--export", help="Write the choice for use in transformers.")] = None,
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
    from probekit.choice.export import check_export, export_choice
    from probekit.choice.rank import rank as rank_ways
    from probekit.choice.rank import with_trees
    from probekit.drafting.imported import import_drafter
    from probekit.drafting.policies import FIXED, policy_named
    from probekit.prediction.predict import predict as predict_rounds
    from probekit.traces.trace import Trace

    context = context_of(costs, context)
    if export is not None:
        check_export(export)  # before minutes of timing
    if (run / "study.json").is_file():
        _choose_of_study(run, export, as_json)
        return
    trace = Trace.open(run)
    lengths = options.integers(draft_lengths, "--draft-lengths") or range(1, 9)
    exits = options.integers(exit_layers, "--exit-layers")
    when_to_stop = policy_named(policy)
    others = [import_drafter(path, trace) for path in imported or ()]
    prediction = predict_rounds(trace, exits, lengths, draft_rows=draft_rows, policy=when_to_stop)
    with progress_bars(quiet or as_json) as bars:
        timed = costs_of(
            trace, costs, context, with_trees(trace, lengths, context), draft_rows, when_to_stop, device, dtype, bars
        )
    ways = None
    if when_to_stop == FIXED:  # a policy that was asked for is the only one, and these costs hold its time
        ways = rank_ways(trace, timed, exits, lengths, draft_rows=draft_rows, drafters=others)
    choice = choose_pair(prediction, timed, ways=ways)
    if export is not None:
        export_choice(choice, export, pretrained_of(trace))
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
    if ways is not None:
        print_table(
            "all ways of drafting; `probekit rank` shows more",
            ["drafts", "policy", "length", "tokens per round", "speedup", "95 %", "of the oracle"],
            [
                [row.label, row.policy, row.draft_length, row.tokens_per_round, row.speedup, row.interval,
                 ways.share_of_oracle(row)]
                for row in ways.shortlist(5)
            ],
        )  # fmt: skip


def context_of(costs: str, context: int | None) -> int:
    """Tokens in the cache of a step, by default those that suit where the costs come from. Raises InputError."""
    if costs not in ("measured", "roofline"):
        raise InputError(f"--costs is {costs!r}; expected measured or roofline.")
    if context is None:
        return MEASURED_CONTEXT if costs == "measured" else SERVED_CONTEXT
    return options.at_least_one(context, "--context")


def _choose_of_study(folder: Path, export: Path | None, as_json: bool) -> None:
    """A study has chosen already, for each of its models: say what."""
    study = open_study(folder, keys=("choice", "sentence"))
    if export is not None:
        raise InputError(
            f"{folder} is a study of {len(study.models)} models; a choice is exported of one run.",
            f"Give one of its runs: {folder / 'traces' / study.models[0]}.",
        )
    if as_json:
        print_json({"schema": "probekit/choose/1", "study": str(folder), "models": [
            {"name": entry["name"], "choice": entry["choice"]} for entry in study.entries]})  # fmt: skip
        return
    for entry in study.entries:
        out.print(Text(str(entry["sentence"])))


def costs_of(trace, source, context, lengths, draft_rows, policy, device, dtype, bars):
    """Costs that know every draft length asked for, and the run's draft model."""
    if source == "roofline":
        from probekit.costs.roofline import roofline_costs

        return roofline_costs(
            trace, context=context, device=device, dtype=dtype or served_dtype(device), longest_draft=max(lengths),
            drafter=trace.manifest.drafter, draft_rows=draft_rows,
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
