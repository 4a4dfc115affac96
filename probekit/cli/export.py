"""`probekit export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probekit.cli import options
from probekit.cli.costs import AnyCosts, Context, context_of, convention_of, costs_of, profile_named
from probekit.cli.terminal import notice, out, print_json, progress_bars
from probekit.cli.traced_models import models_of, pretrained_of
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.choice.choose import Choice
    from probekit.choice.schedule import Schedule
    from probekit.costs.engine_profile import EngineProfile
    from probekit.costs.profile import Costs
    from probekit.drafting.drafters import Drafter
    from probekit.engines.engine import Drafting, Engine, Entry
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
    from probekit.engines.engine import Drafting, check_drafting
    from probekit.engines.export import check_export
    from probekit.engines.known import engine_named

    told = engine_named(engine)
    check_export(output)
    _check_gguf(told, gguf)
    trace, chosen = _opened(run, model)
    batches = options.integers(rows, "--rows")
    if (exit_layer is None and drafter is None) != (draft_length is None):
        raise InputError(
            "an exit layer (or a drafter) and a draft length go together.",
            "Give --exit-layer and --draft-length, or neither: the pair is then chosen.",
        )
    choice: Choice | None = None
    drafts: Drafter | None
    if draft_length is not None:
        drafts = _named(trace, exit_layer, drafter)
        drafting = Drafting.with_drafter(drafts, draft_length, trace.sampling)
        sentence = f"{trace.manifest.model.name}: draft with {drafting.label}, {draft_length} tokens at a time."
    elif chosen is not None:
        drafts, drafting = _of_study(trace, chosen)
        sentence = str(chosen["sentence"])
    else:
        choice = _chosen(trace, costs, context, device, dtype, quiet or as_json)
        drafts, drafting, sentence = choice.best.drafts, Drafting.of(choice), choice.sentence()
    check_drafting(told, drafting)
    batch_costs = None if batches is None else (batches, costs, context)
    exported = exported_of(trace, told, drafting, drafts, sentence, choice, batch_costs, device, dtype)
    folder = write(trace, exported, output, None if settings_only else (gguf,))
    if as_json:
        print_json(_document(folder, exported))
        return
    notice(exported.sentence)
    out.print(f"{told.name}: {folder / 'README.md'}", markup=False, highlight=False)


def exported_of(
    trace: Trace,
    engine: Engine,
    drafting: Drafting,
    drafts: Drafter | None,
    sentence: str,
    choice: Choice | None = None,
    batch_costs: tuple[list[int], str | EngineProfile, int | None] | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Export:
    """Everything that is written, before it is. batch_costs: rows, `--costs` and `--context` of a schedule."""
    from probekit.engines.engine import Entry
    from probekit.engines.export import Export, profile_of

    speedup, interval = (None, None) if choice is None else (choice.speedup, choice.interval)
    entries, at = [Entry(1, drafting.draft_length, speedup, interval)], None
    if batch_costs is not None and drafts is not None and drafting.speculates:
        entries, at = _entries(trace, drafts, *batch_costs, device, dtype)
    profile = None
    if drafts is not None and drafting.speculates:
        longest = max(drafting.draft_length, *(each.draft_length for each in entries))
        profile = profile_of(trace, engine, longest, drafts)
    return Export(
        engine, drafting, pretrained_of(trace), trace.manifest.model.name, sentence, choice, profile, tuple(entries),
        at, trace.manifest.settings.dtype,
    )  # fmt: skip


def write(trace: Trace, exported: Export, output: Path, checkpoint: tuple[Path | None] | None = (None,)) -> Path:
    """Write the folder, with the draft checkpoint where the engine wants one. checkpoint: (a GGUF file to cut, or
    None); None: no checkpoint."""
    from probekit.engines.export import write_export
    from probekit.presentation.export_card import write_export_card

    maker, exit_layer = None, exported.drafting.exit_layer
    if checkpoint is not None and exit_layer is not None and exported.engine.checkpoint is not None:
        maker = _maker(trace, exported.engine, exit_layer, checkpoint[0])
    folder = write_export(exported, output, maker)
    write_export_card(folder, exported, trace.manifest)
    return folder


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


def _check_gguf(engine: Engine, gguf: Path | None) -> None:
    if gguf is None:
        return
    if engine.checkpoint != "gguf":
        raise InputError(f"--gguf is a file for llama.cpp; the engine is {engine.name}.", "Leave it out.")
    if not gguf.is_file():
        raise InputError(f"there is no file {gguf}.")


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


def _of_study(trace: Trace, entry: dict) -> tuple[Drafter | None, Drafting]:
    """What the study chose."""
    from probekit.drafting.drafters import traced_drafters
    from probekit.engines.engine import Drafting

    chosen = entry["choice"]
    if not chosen["speculate"]:
        return None, Drafting(sampling=trace.sampling)
    known = traced_drafters(trace, draft_model=trace.manifest.drafter is not None, draft_rows=chosen["draft_rows"])
    drafts = next(each for each in known if each.key.names(chosen["exit_layer"]))
    return drafts, Drafting.with_drafter(drafts, chosen["draft_length"], trace.sampling)


def _chosen(
    trace: Trace, costs: str, context: int | None, device: str | None, dtype: str | None, silent: bool
) -> Choice:
    from probekit.choice.choose import choose
    from probekit.drafting.policies import FIXED
    from probekit.prediction.predict import predict

    profile, lengths = profile_named(costs), range(1, 9)
    if profile is not None:
        lengths = range(1, min(8, profile.longest_draft) + 1)
        prediction = predict(trace, draft_lengths=lengths, first_round=convention_of(trace, profile.engine))
        return choose(prediction, profile.costs(trace.depth, context=context))
    prediction = predict(trace, draft_lengths=lengths)
    with progress_bars(silent) as bars:
        timed = costs_of(trace, costs, context_of(costs, context), lengths, None, FIXED, device, dtype, bars)
    return choose(prediction, timed)


def _entries(
    trace: Trace, drafts: Drafter, batches: list[int], costs: str | EngineProfile, context: int | None,
    device: str | None, dtype: str | None,
) -> tuple[list[Entry], int]:  # fmt: skip
    """The best length of this drafter at each batch, or none."""
    from probekit.choice.schedule import schedule
    from probekit.drafting.policies import FIXED
    from probekit.engines.export import entries_of
    from probekit.prediction.predict import predict

    profile = profile_named(costs) if isinstance(costs, str) else costs
    if costs == "measured":
        raise InputError(
            "--rows needs the costs of a batch; this device is measured at one row.",
            "Give --costs roofline, or the profile of an engine.",
        )
    if profile is not None:
        at = profile.contexts[0] if context is None else context
    else:
        at = context_of(str(costs), context)

    def costs_at(count: int, place: int) -> Costs:
        if profile is not None:
            return profile.costs(trace.depth, rows=count, context=place)
        return costs_of(trace, costs, place, range(1, 9), drafts.key.rows, FIXED, device, dtype, None, rows=count)

    longest, whose = (8, None) if profile is None else (min(8, profile.longest_draft), profile.engine)
    prediction = predict(
        trace, draft_lengths=range(1, longest + 1), drafters=[drafts], first_round=convention_of(trace, whose)
    )
    plan: Schedule = schedule(prediction, costs_at, batches, [at])
    return entries_of(plan)


def _maker(trace: Trace, engine: Engine, exit_layer: int, gguf: Path | None) -> Callable[[Path], Path]:
    """What writes the draft checkpoint: the first layers of the run's model, held against the lens."""

    def safetensors(target: Path) -> Path:
        from probekit.models.cut import cut_checkpoint
        from probekit.validation.draft_checkpoint import check_draft_checkpoint

        loaded, _ = models_of(trace, None, None)
        made = cut_checkpoint(loaded, exit_layer, target)
        first = trace.prompts[0]
        ids = [*trace.prompt_ids(first).tolist(), *trace.outputs(first).tolist()]
        check_draft_checkpoint(loaded, exit_layer, made, ids)
        return made

    def gguf_file(target: Path) -> Path:
        from probekit.models.cut_gguf import cut_gguf
        from probekit.models.write_gguf import write_gguf

        source = gguf or Path(trace.manifest.model.reference)
        if source.suffix == ".gguf":
            return cut_gguf(source, exit_layer, target)
        return write_gguf(models_of(trace, None, None)[0], target, exit_layer)

    return gguf_file if engine.checkpoint == "gguf" else safetensors
