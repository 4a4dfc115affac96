"""A choice as a folder for one engine: what it is told, when to draft at which batch, and what it will then report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from probekit.checksums import SUMS, read_sums, write_sums
from probekit.choice.choose import Choice
from probekit.choice.schedule import Schedule
from probekit.drafting.drafters import Drafter
from probekit.engines.acceptance import AcceptanceProfile, simulated
from probekit.engines.engine import Drafting, Engine, Entry, Pretrained, check_drafting
from probekit.engines.known import ENGINES
from probekit.errors import InputError
from probekit.files import atomic_text, check_folder_target, entries, make_folder, sha256_of
from probekit.prediction.predict import predict
from probekit.prediction.rounds import CONVENTIONS
from probekit.settings import Sampling
from probekit.traces.trace import Trace

SCHEDULE_SCHEMA = "probekit/engine-schedule/1"
CHECKPOINT = "drafter"
"""Where a draft checkpoint lies in an exported folder; `drafter.gguf` for llama.cpp."""
CARD, FIGURE = "MODEL_CARD.md", "acceptance.png"
UNKNOWN = Pretrained()
MARK = ("choice.json", "schedule.json")  # either of them: an exported folder, which may be written again


@dataclass(frozen=True, eq=False)
class Export:
    """What is written for one engine.

    sentence: what is exported, in words. choice: as it was chosen; None where the pair was named.
    profile: None where nobody drafts. entries: by rows in the batch, at least one. context: of its costs, or None.
    dtype: that the trace computed in.
    """

    engine: Engine
    drafting: Drafting
    pretrained: Pretrained
    model: str
    sentence: str
    choice: Choice | None
    profile: AcceptanceProfile | None
    entries: tuple[Entry, ...]
    context: int | None = None
    dtype: str | None = None


def check_export(folder: str | Path, several: bool = False) -> Path:
    """The folder that a choice can be exported to (`several`: a folder for each); InputError where it holds others."""
    folder = check_folder_target(folder)
    if several and folder.is_dir():
        for each in entries(folder):
            check_export(each)
        return folder
    if folder.is_dir() and entries(folder) and not any((folder / name).is_file() for name in MARK):
        raise InputError(f"{folder} holds other files and no exported choice.", "Name a new or an empty folder.")
    return folder


def check_gguf(engine: Engine, gguf: str | Path | None, called: str = "gguf") -> None:
    """Raises InputError for a file that is not there, and for an engine that reads none."""
    if gguf is None:
        return
    if engine.checkpoint != "gguf":
        raise InputError(f"{called} is a file for llama.cpp; the engine is {engine.name}.", "Leave it out.")
    if not Path(gguf).is_file():
        raise InputError(f"there is no file {gguf}.")


def export_choice(choice: Choice, folder: str | Path, pretrained: Pretrained = UNKNOWN) -> Path:
    """Write a choice for use in transformers: `choice.json`, `settings.json` and a README that shows how.

    `SHA256SUMS` lists them, for `probekit verify` and `sha256sum -c`.

    `export` writes more, and for other engines. Raises InputError for a path that is a file, or a folder that holds
    something else. A folder that was exported before is written again.
    """
    engine, drafting = ENGINES["transformers"], Drafting.of(choice)
    told = Export(engine, drafting, pretrained, choice.model, choice.sentence(), choice, None, ())
    folder = check_export(folder)
    make_folder(folder)
    for name, content in (
        ("choice.json", json.dumps(choice.to_json(), indent=1) + "\n"),  # first: it says whose folder this is
        ("settings.json", json.dumps(engine.settings(drafting, pretrained, ()), indent=1) + "\n"),
        ("README.md", readme(told)),
    ):
        atomic_text(folder / name, content)
    write_sums(folder)
    return folder


def profile_of(trace: Trace, engine: Engine, draft_length: int, drafter: Drafter) -> AcceptanceProfile:
    """Acceptance by the engine's convention. Where it drafts past the budget the texts are taken a little shorter, so
    that what it accepts there is known."""
    budget = trace.manifest.settings.max_new_tokens
    past = CONVENTIONS[engine.first_round].past_budget and budget > 2 * draft_length
    prediction = predict(
        trace, draft_lengths=[draft_length], drafters=[drafter], first_round=convention(trace, engine),
        budget=budget - draft_length if past else None,
    )  # fmt: skip
    return AcceptanceProfile.of(prediction, prediction.cells[0])


def convention(trace: Trace, engine: Engine) -> str:
    """llama.cpp's differs from ours in how an end is counted, which is known of greedy text only."""
    greedy = trace.manifest.settings.text == "greedy"
    return engine.first_round if greedy or not CONVENTIONS[engine.first_round].ends_as_bonus else "prefill"


def entries_of(plan: Schedule) -> tuple[list[Entry], int]:
    """A schedule by rows, at the shortest of its contexts; and that context."""
    context = min(at for _, at in plan.choices)
    found = [
        Entry(rows, each.draft_length or 0, each.speedup, each.interval)
        for (rows, at), each in sorted(plan.choices.items(), key=lambda pair: pair[0])
        if at == context
    ]
    return found, context


def write_export(told: Export, folder: str | Path, drafter: Callable[[Path], Path] | None = None) -> Path:
    """Write `README.md`, `settings.json`, `schedule.json`, `acceptance.json`, the draft checkpoint, and the checksums.

    drafter: writes the checkpoint at a path that it is given, and returns where it lies; None: the engine wants none,
        or has one.

    Raises InputError where the engine cannot hold what drafts, before anything is written; and for a folder that holds
    something else.
    """
    check_drafting(told.engine, told.drafting)
    folder = check_export(folder)
    make_folder(folder)
    before: dict[str, str] = {}
    if (folder / SUMS).is_file():
        with suppress(InputError):  # a damaged list, which is written anew
            before = read_sums(folder)
    atomic_text(folder / MARK[1], _text(schedule_document(told)))  # first: it says whose folder this is
    checkpoint = f"{CHECKPOINT}.gguf" if told.engine.checkpoint == "gguf" else CHECKPOINT
    if drafter is not None:
        made = drafter(folder / checkpoint)
        told = replace(told, pretrained=replace(told.pretrained, drafter_path=str(made.absolute())))
    documents: dict[str, Any] = {
        "settings.json": told.engine.settings(told.drafting, told.pretrained, told.entries),
    }
    if told.profile is not None:
        names = told.engine.words(told.profile)
        documents["acceptance.json"] = told.profile.to_json(told.engine.name, names, simulated(told.profile))
    if told.choice is not None:
        documents["choice.json"] = told.choice.to_json()
    for name, document in documents.items():
        atomic_text(folder / name, _text(document))
    atomic_text(folder / "README.md", readme(told))
    kept = {*documents, *([checkpoint] if told.drafting.exit_layer is not None else [])}
    stale = {CHECKPOINT, f"{CHECKPOINT}.gguf", "acceptance.json", MARK[0], CARD, FIGURE} - kept
    _remove(folder, {name: digest for name, digest in before.items() if name.split("/")[0] in stale})
    write_sums(folder)
    return folder


def _remove(folder: Path, listed: Mapping[str, str]) -> None:
    """Files that an earlier export wrote, and nobody changed since: another engine's checkpoint, another's profile."""
    for name, digest in listed.items():
        path = folder / name
        here = path.resolve() == folder.resolve() / name  # and through no link
        if here and path.is_file() and sha256_of(path) == digest:
            path.unlink()
            with suppress(OSError):  # the last one of its folder takes it along
                path.parent.rmdir()


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


def schedule_document(told: Export) -> dict[str, Any]:
    """`schedule.json`: the draft length by rows in the batch, and the same in the engine's own form."""
    return {
        "schema": SCHEDULE_SCHEMA,
        "engine": told.engine.name,
        "model": told.model,
        "drafter": told.drafting.label if told.drafting.speculates else None,
        "exit_layer": told.drafting.exit_layer,
        "context": told.context,
        "entries": [each.to_json() for each in told.entries],
        "setting": told.engine.schedules(told.drafting, told.entries),
    }


def readme(told: Export) -> str:
    """How to use the folder, what the engine will report, and what was not measured."""
    drafting, engine = told.drafting, told.engine
    if not drafting.speculates:
        plain = "" if engine.name == "transformers" else f"\n{engine.shown(drafting, told.pretrained, ())}"
        return f"# {told.model}\n\n{told.sentence}\n\nGenerate without an assistant.\n{plain}"
    parts = [
        f"# {told.model}",
        told.sentence,
        _carries_over(told),
        engine.shown(drafting, told.pretrained, told.entries),
    ]
    if told.entries[1:]:
        parts.append(_schedule_table(told))
    if told.profile is not None:
        parts.append(_acceptance_table(told.profile, engine))
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _carries_over(told: Export) -> str:
    """What of the prediction holds in the engine, and what does not."""
    source = None if told.choice is None else told.choice.costs.source
    speed = "That speed is of probekit's own decoder. " if source in ("measured", "roofline") else ""
    if told.engine.name == "transformers":
        return f"{speed}{_in_transformers(told.drafting)}"
    proof = (
        f"Rounds counted inside {told.engine.title} {told.engine.checked} were those that a trace predicts."
        if told.engine.proved
        else f"The names are those of {told.engine.checked}; nothing was run in {told.engine.title}."
    )
    kind = (
        ""
        if told.dtype is None
        else f" The trace computed in {told.dtype}: in another number type some near-ties fall the other way."
    )
    return f"{speed}{proof}{kind} {_sampled(told.drafting.sampling, told.engine.title)}".strip()


def _in_transformers(drafting: Drafting) -> str:
    """What carries over to transformers' own decoding, and what does not."""
    same = _same_drafts(drafting)
    return f"{_sampled(drafting.sampling, 'transformers')} {same}".strip()


def _sampled(sampling: Sampling, engine: str) -> str:
    if sampling.greedy:
        return ""
    return (
        f"The text was sampled ({_spoken(sampling)}): tokens per round are expectations, which {engine} "
        "meets over many texts and in no single one, since its random numbers are others."
    )


def _spoken(sampling: Sampling) -> str:
    kept = f", top-k {sampling.top_k}" if sampling.top_k else ""
    return f"temperature {sampling.temperature:g}{kept}" + (f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else "")


def _same_drafts(drafting: Drafting) -> str:
    if drafting.exit_heads is not None:
        return "transformers knows no exit heads, so it accepts fewer drafts there, and may decode slower than alone:"
    if drafting.draft_rows is not None:
        return "transformers drafts with the whole head, so it accepts more drafts there, each of which costs more:"
    what = "The accepted drafts are" if drafting.sampling.greedy else "The acceptance rate is"
    return f"{what} the same in transformers, whose speed was not measured:"


def _schedule_table(told: Export) -> str:
    rows = [
        f"| {each.rows} | {each.draft_length or 'off'} | {_figure(each.speedup)} |"
        for each in sorted(told.entries, key=lambda entry: entry.rows)
    ]
    about = "" if told.context is None else f", at {told.context} tokens in the cache"
    return "\n".join(
        [f"## By rows in the batch{about}", "", "| rows | drafts | speedup, predicted |", "|---|---|---|", *rows]
    )


def _acceptance_table(profile: AcceptanceProfile, engine: Engine) -> str:
    head = (
        "## What it will report\n\n"
        f"On {profile.prompts} texts like those of the trace ({profile.text}), {engine.title} counts "
        f"{profile.rounds:,.6g} rounds, {profile.drafted:,.6g} drafts and {profile.accepted:,.6g} acceptances:\n\n"
    )
    words = [f"| {name} | {_listed(value)} |" for name, value in engine.words(profile).items()]
    own = [
        f"| {name} | {_listed(value)} |"
        for name, value in (
            ("acceptance rate", profile.acceptance_rate), ("tokens per round", profile.tokens_per_round),
            ("alpha", profile.alpha), ("accepted, given all before", profile.conditional),
        )
    ]  # fmt: skip
    return head + "\n".join(
        [f"| {engine.title} calls it | |", "|---|---|", *words, "| **probekit calls it** | |", *own]
    )


def _listed(value: Any) -> str:
    values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join("–" if each is None else f"{each:.4g}" for each in values)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"
