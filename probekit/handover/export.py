"""Hand a choice to the engine that will serve it: `probekit.export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from probekit.choice.choose import Choice
from probekit.choice.schedule import Schedule
from probekit.drafting.drafters import Drafter
from probekit.drafting.named import drafters_named
from probekit.engines.engine import Drafting, Engine, Entry, check_drafting
from probekit.engines.export import Export, check_export, check_gguf, entries_of, profile_of, write_export
from probekit.engines.known import engine_named
from probekit.engines.pretrained import pretrained_of
from probekit.errors import InputError
from probekit.models.cut import cut_checkpoint
from probekit.models.cut_gguf import cut_gguf
from probekit.models.loaded import Loaded
from probekit.models.write_gguf import write_gguf
from probekit.presentation.export_card import write_export_card
from probekit.traces.trace import Trace
from probekit.tracing.traced_models import models_of
from probekit.validation.draft_checkpoint import check_draft_checkpoint


def export(
    trace: Trace,
    folder: str | Path,
    engine: str = "transformers",
    choice: Choice | None = None,
    *,
    drafter: Drafter | int | None = None,
    draft_length: int | None = None,
    schedule: Schedule | None = None,
    model: Loaded | None = None,
    gguf: str | Path | None = None,
    checkpoint: bool = True,
    sentence: str | None = None,
) -> Export:
    """Write what an engine needs to draft as it was chosen; what `probekit export` writes.

    README.md, settings.json, schedule.json, acceptance.json, a section of a model card with its figure, SHA256SUMS, and
    where the engine knows draft models the exit layer as a checkpoint of its own, held against the lens.

    Parameters
    ----------
    trace: of the model; its texts give the acceptance profile.
    folder: new, empty, or exported before.
    engine: transformers, vllm, llama.cpp, sglang or tensorrt-llm.
    choice: as `probekit.choose` made it, of this trace.
    drafter, draft_length: instead of it: who drafts (an exit layer by its number), and how many tokens; a length of 0
        alone: nobody drafts.
    schedule: the best draft length of this drafter by rows in the batch (`probekit.choice.schedule`).
    model: the trace's; None: loaded from the reference in its manifest, where a checkpoint is cut.
    gguf: for llama.cpp, the file that it serves, which is cut instead of the model.
    checkpoint: False leaves it out. sentence: what is exported, in words; None: made here.

    Returns what was written, as a value.

    Raises
    ------
    InputError: for an engine that is unknown or cannot hold what drafts; for neither or both of a choice and a drafter;
        for a folder that holds something else; for a model or a schedule that is not the trace's.

    Examples
    --------
    >>> import tempfile
    >>> import probekit
    >>> trace = probekit.trace("tales-layerskip", ["Once upon a time"], max_new_tokens=16)
    >>> probekit.export(trace, tempfile.mkdtemp(), "vllm", drafter=3, draft_length=2).sentence
    'tales-layerskip: draft with layer 3, 2 tokens at a time.'
    """
    told, folder = engine_named(engine), check_export(folder)
    check_gguf(told, gguf)
    drafts, drafting, words = _drafting(trace, choice, drafter, draft_length)
    check_drafting(told, drafting)
    _check_model(trace, model)
    speedup, interval = (None, None) if choice is None else (choice.speedup, choice.interval)
    entries, context = [Entry(1, drafting.draft_length, speedup, interval)], None
    if schedule is not None and drafts is not None:
        entries, context = entries_of(_checked(schedule, trace, drafts))
    profile = None
    if drafts is not None:
        longest = max(drafting.draft_length, *(each.draft_length for each in entries))
        profile = profile_of(trace, told, longest, drafts)
    exported = Export(
        told, drafting, pretrained_of(trace), trace.manifest.model.name, sentence or words, choice, profile,
        tuple(entries), context, trace.manifest.settings.dtype,
    )  # fmt: skip
    maker = None
    if checkpoint and drafting.exit_layer is not None and told.checkpoint is not None:
        maker = _maker(trace, told, drafting.exit_layer, model, None if gguf is None else Path(gguf))
    write_export(exported, folder, maker)
    write_export_card(folder, exported, trace.manifest)
    return exported


def _drafting(
    trace: Trace, choice: Choice | None, drafter: Drafter | int | None, draft_length: int | None
) -> tuple[Drafter | None, Drafting, str]:
    """Who drafts (None: nobody), what the engine is told of it, and the same in words."""
    name, nobody = trace.manifest.model.name, drafter is None and draft_length == 0
    if choice is not None and drafter is None and draft_length is None:
        if choice.model != name:
            raise InputError(f"the choice is of {choice.model}, the trace of {name}.", "Give the trace it was made of.")
        return choice.best.drafts if choice.speculate else None, Drafting.of(choice), choice.sentence()
    if choice is None and nobody:
        return None, Drafting(sampling=trace.sampling), f"{name}: decode without drafts."
    if choice is not None or drafter is None or draft_length is None:
        raise InputError(
            "an export is of a choice, or of a drafter with its draft length.",
            "Give choice=probekit.choose(..), or drafter=3, draft_length=2.",
        )
    drafts = drafters_named("exit", trace, [drafter])[0] if isinstance(drafter, int) else drafter
    drafting = Drafting.with_drafter(drafts, draft_length, trace.sampling)
    return drafts, drafting, f"{name}: draft with {drafting.label}, {draft_length} tokens at a time."


def _check_model(trace: Trace, model: Loaded | None) -> None:
    known = trace.manifest.model.weights_hash
    if model is not None and known not in (None, model.weights_hash):
        raise InputError(f"{model.name} holds other weights than the traced {trace.manifest.model.name}.")


def _checked(schedule: Schedule, trace: Trace, drafts: Drafter) -> Schedule:
    """A schedule that is of this model, and of this drafter or nobody."""
    others = {each.best.label for each in schedule.choices.values() if each.speculate} - {drafts.key.label}
    if schedule.model != trace.manifest.model.name or others:
        raise InputError(
            f"the schedule is of {schedule.model}, drafts from {', '.join(sorted(others)) or drafts.key.label}; this "
            f"export is of {trace.manifest.model.name}, drafts from {drafts.key.label}.",
            "Make it of a prediction for this drafter alone: predict(trace, drafters=[..]).",
        )
    return schedule


def _maker(
    trace: Trace, engine: Engine, exit_layer: int, model: Loaded | None, gguf: Path | None
) -> Callable[[Path], Path]:
    """What writes the draft checkpoint: the first layers of the model, held against the lens."""

    def loaded() -> Loaded:
        return models_of(trace)[0] if model is None else model

    def safetensors(target: Path) -> Path:
        whole = loaded()
        made = cut_checkpoint(whole, exit_layer, target)
        first = trace.prompts[0]
        ids = [*trace.prompt_ids(first).tolist(), *trace.outputs(first).tolist()]
        check_draft_checkpoint(whole, exit_layer, made, ids)
        return made

    def gguf_file(target: Path) -> Path:
        source = gguf or Path(trace.manifest.model.reference)
        if source.suffix == ".gguf":
            return cut_gguf(source, exit_layer, target)
        return write_gguf(loaded(), target, exit_layer)

    return gguf_file if engine.checkpoint == "gguf" else safetensors
