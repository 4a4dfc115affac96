"""`probekit export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probekit.cli import options
from probekit.cli.costs import (
    MEASURED_CONTEXT,
    AnyCosts,
    Context,
    context_of,
    convention_of,
    costs_along,
    costs_of,
    engine_asked,
    engine_profile,
    predicted,
    profile_named,
)
from probekit.cli.terminal import notice, out, print_json, progress_bars
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.choice.choose import Choice
    from probekit.choice.schedule import Schedule
    from probekit.costs.engine_profile import EngineProfile
    from probekit.costs.profile import Costs
    from probekit.drafting.drafters import Drafter
    from probekit.engines.export import Export
    from probekit.traces.trace import Trace

EngineName = Annotated[
    str, typer.Option("--engine", help="transformers, vllm, llama.cpp, sglang or tensorrt-llm.", show_default=True)
]
GGUF = Annotated[
    Path | None,
    typer.Option("--gguf", metavar="FILE", help="For llama.cpp: the file that it serves; its first layers draft."),
]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `probekit trace` or `study` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Receives the folder's files.")],
    engine: EngineName = "transformers",
    exit_layer: Annotated[int | None, typer.Option("--exit-layer", help="[default: chosen, with --costs]")] = None,
    draft_length: Annotated[int | None, typer.Option("--draft-length", help="[default: chosen, with --costs]")] = None,
    drafter: options.Drafter = None,
    model: Annotated[str | None, typer.Option("--model", help="Of a study of several: which one.")] = None,
    costs: AnyCosts = "measured",
    context: Context = None,
    rows: Annotated[
        str | None, typer.Option("--rows", help="Rows in the batch, as 1,4,16: a schedule, with --costs.")
    ] = None,
    gguf: GGUF = None,
    settings_only: Annotated[bool, typer.Option("--settings-only", help="No draft checkpoint.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Hand a choice to the engine that you run: a draft checkpoint, settings, schedule and acceptance profile."""
    from probekit.engines.export import check_export, check_gguf
    from probekit.engines.known import engine_named

    told = engine_named(engine)
    check_export(output)
    check_gguf(told, gguf, "--gguf")
    trace, chosen = _opened(run, model)
    batches = options.counts(rows, "--rows")
    if (exit_layer is None and drafter is None) != (draft_length is None):
        raise InputError(
            "an exit layer (or a drafter) and a draft length go together.",
            "Give --exit-layer and --draft-length, or neither: the pair is then chosen.",
        )
    choice: Choice | None = None
    drafts: Drafter | None
    length, sentence = draft_length, None
    if draft_length is not None:
        drafts = _named(trace, exit_layer, drafter)
    elif chosen is not None:
        drafts, length, sentence = _of_study(trace, chosen)
    profile: EngineProfile | str = profile_named(costs) or costs
    chooses = draft_length is None and chosen is None
    if (chooses or batches is not None) and (asked := engine_asked(costs)) is not None:
        with progress_bars(quiet or as_json) as bars:
            places = [MEASURED_CONTEXT if context is None else context]
            profile = engine_profile(trace, asked, batches or [1], places, range(1, 9), device, dtype, bars)
    if chooses:
        choice = _chosen(trace, profile, engine, context, device, dtype, quiet or as_json)
        drafts = choice.best.drafts
    plan = None
    if batches is not None and drafts is not None:
        plan = schedule_of(trace, drafts, batches, profile, context, device, dtype)
    from probekit.handover.export import export as hand_over  # with torch: after what can be refused without

    exported = hand_over(
        trace, output, engine, choice, drafter=None if choice is not None else drafts, draft_length=length,
        schedule=plan, gguf=gguf, checkpoint=not settings_only, sentence=sentence,
    )  # fmt: skip
    if as_json:
        print_json(_document(output, exported))
        return
    notice(exported.sentence)
    out.print(f"{told.name}: {output / 'README.md'}", markup=False, highlight=False)


def _document(folder: Path, exported: Export) -> dict:
    return {
        "schema": "probekit/export/1",
        "folder": str(folder),
        "engine": exported.engine.name,
        "model": exported.model,
        "exit_layer": exported.drafting.exit_layer,
        "draft_length": exported.drafting.draft_length or None,
        "drafter": exported.drafting.label if exported.drafting.speculates else None,
        "sentence": exported.sentence,
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
    }


def _opened(run: Path, model: str | None) -> tuple[Trace, dict | None]:
    """The trace of a run; or of one model of a study, with what the study says of it."""
    from probekit.presentation.study_folder import open_study
    from probekit.traces.trace import Trace

    if not (run / "study.json").is_file():
        if model is not None:
            raise InputError(f"{run} is the run of one model; --model {model} is of a study.", "Leave it out.")
        return Trace.open(run), None
    study = open_study(run, keys=("choice", "sentence"))
    names = study.models
    if model is None and len(names) > 1:
        raise InputError(f"{run} is a study of {len(names)} models.", f"Name one with --model: {', '.join(names)}.")
    name = names[0] if model is None else model
    if name not in names:
        raise InputError(f"{run} is no study of {name}; its models are {', '.join(names)}.")
    return Trace.open(run / "traces" / name), dict(study.entry(name))


def _named(trace: Trace, exit_layer: int | None, drafter: str | None) -> Drafter:
    """The one drafter that was named."""
    from probekit.drafting.named import drafters_named

    exits = None if exit_layer is None else [exit_layer]
    if drafter is not None and exit_layer is not None and drafter != "exit":
        raise InputError(f"--drafter {drafter} has no exit layer.", "Leave --exit-layer out.")
    found = drafters_named("exit" if drafter is None else drafter, trace, exits)
    if len(found) != 1:
        raise InputError(f"--drafter {drafter} means {len(found)} drafters.", "Name one: with --exit-layer.")
    return found[0]


def _of_study(trace: Trace, entry: dict) -> tuple[Drafter | None, int, str]:
    """Who drafts by what the study chose (None: nobody), how many tokens, and its sentence."""
    from probekit.drafting.drafters import traced_drafters

    chosen, sentence = entry["choice"], str(entry["sentence"])
    if not chosen["speculate"]:
        return None, 0, sentence
    known = traced_drafters(trace, draft_model=trace.manifest.drafter is not None, draft_rows=chosen["draft_rows"])
    return next(each for each in known if each.key.names(chosen["exit_layer"])), chosen["draft_length"], sentence


def _chosen(
    trace: Trace, costs: str | EngineProfile, engine: str, context: int | None, device: str | None, dtype: str | None,
    silent: bool,
) -> Choice:  # fmt: skip
    from probekit.choice.choose import choose
    from probekit.drafting.policies import FIXED

    profile, lengths = None if isinstance(costs, str) else costs, range(1, 9)
    if profile is not None:
        lengths = range(1, min(8, profile.longest_draft) + 1)
        prediction = predicted(trace, profile.engine, None, lengths, None, FIXED, target=engine)
        return choose(prediction, costs_along(trace, profile, 1, context))
    prediction = predicted(trace, None, None, lengths, None, FIXED)
    with progress_bars(silent) as bars:
        timed = costs_of(trace, costs, context_of(str(costs), context), lengths, None, FIXED, device, dtype, bars)
    return choose(prediction, timed)


def schedule_of(
    trace: Trace, drafts: Drafter, batches: list[int], costs: str | EngineProfile, context: int | None,
    device: str | None, dtype: str | None,
) -> Schedule:  # fmt: skip
    """The best length of this drafter at each batch, or none. costs, context: as `--costs` and `--context`."""
    from probekit.choice.schedule import schedule
    from probekit.drafting.policies import FIXED
    from probekit.prediction.predict import predict

    profile = None if isinstance(costs, str) else costs
    if costs == "measured":
        raise InputError(
            "--rows makes a schedule for an engine, and needs the costs of a batch there; measured costs are of the "
            "decoder here.",
            "Give --costs roofline, or the profile of that engine.",
        )
    if profile is not None:
        at = profile.contexts[0] if context is None else context
    else:
        at = context_of(str(costs), context)

    def costs_at(count: int, place: int) -> Costs:
        if profile is not None:
            return costs_along(trace, profile, count, place)
        return costs_of(trace, costs, place, range(1, 9), drafts.key.rows, FIXED, device, dtype, None, rows=count)

    longest, whose = (8, None) if profile is None else (min(8, profile.longest_draft), profile.engine)
    prediction = predict(
        trace, draft_lengths=range(1, longest + 1), drafters=[drafts], first_round=convention_of(trace, whose)
    )
    return schedule(prediction, costs_at, batches, [at])
