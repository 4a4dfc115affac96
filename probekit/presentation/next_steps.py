"""What a reader of a study would do with its answer: commands to type, settings to paste, and what nobody measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probekit.drafting.text_drafters import PromptLookup, lookup_named
from probekit.engines.engine import Drafting
from probekit.engines.transformers import lines
from probekit.settings import Sampling
from probekit.traces.manifest import RunSettings

GREEDY = Sampling()
MARGIN = 1.01  # another way is advised where it is so much faster than the best pair


def next_steps(entry: Mapping[str, Any], run: Path, sampling: Sampling = GREEDY) -> dict[str, Any]:
    """{"words", "commands", "snippet"} for one model.

    entry: what the study's summary says of the model. run: the folder of its trace. sampling: how its text was chosen.
    """
    steps = _steps(entry, run, sampling)
    measured = _measured(entry)
    if measured is not None and measured <= 1:
        steps["words"] = (
            f"Measured, it gained nothing ({measured:.2f}x): study again while the machine does nothing else, before "
            f"you draft so. {steps['words']}"
        )
    return steps


def _measured(entry: Mapping[str, Any]) -> float | None:
    """The speedup of what is advised, where the decoder ran it; None where nothing is, or nothing was run."""
    choice, ways = entry.get("choice") or {}, (entry.get("ways") or {}).get("validated") or []
    if _is_faster(choice):
        return ways[0]["speedup_measured"] if ways else None
    return (entry.get("chosen_validation") or {}).get("speedup_measured") if choice.get("speculate") else None


def _is_faster(choice: Mapping[str, Any]) -> bool:
    """Whether another way of drafting is advised in place of the best pair."""
    way = choice.get("way")
    return (
        way is not None and way["policy"] != "none" and way["speedup"] > (choice.get("speedup") or 1.0) * MARGIN
    )  # fmt: skip


def _steps(entry: Mapping[str, Any], run: Path, sampling: Sampling) -> dict[str, Any]:
    choice, name = entry.get("choice") or {}, str(entry["name"])
    reference = str(entry.get("reference") or name)
    if _is_faster(choice):
        return _by_another_way(choice, choice["way"], run, sampling)
    if not choice.get("speculate"):
        study = ["probekit", "study", reference]
        learned = ["--fit-heads", "--draft-rows", "2048", "-o", f"{name}-heads"]
        return {
            "words": "Decode without drafts. What may still pay: drafts through fitted heads and fewer rows of the "
            "head, or a smaller model that drafts.",
            "commands": [
                shlex.join([*study, *learned]),
                f"{shlex.join(study)} --draft-model SMALLER -o {shlex.quote(f'{name}-two')}",
            ],
            "snippet": "",
        }
    words = "Take the choice to your own code, or hold the decoder against the prediction on every text."
    if choice.get("few_prompts"):
        words = f"The choice rests on {choice.get('prompts')} texts: trace more before you rely on it. {words}"
    exits = [] if choice["exit_layer"] is None else ["--exit-layers", str(choice["exit_layer"])]
    return {
        "words": words,
        "commands": [
            shlex.join(["probekit", "choose", str(run), "--export", f"{name}-choice"]),
            shlex.join(["probekit", "validate", str(run), *exits, "--draft-lengths", str(choice["draft_length"])]),
        ],
        "snippet": _snippet(choice, sampling),
    }


def _by_another_way(
    choice: Mapping[str, Any], way: Mapping[str, Any], run: Path, sampling: Sampling
) -> dict[str, Any]:  # fmt: skip
    """Where something faster than every pair was found: a lookup, a policy, a tree."""
    lookup = lookup_named(str(way["drafter"])) if way["policy"] == "fixed" else None
    ways = shlex.join(["probekit", "validate", str(run), "--ways"])
    if not isinstance(lookup, PromptLookup):
        words = (
            "The fastest way is one of probekit's own decoder, `probekit.decode(model, prompt, ranking)`; run it and "
            "the next best on every text."
        )
        if not choice.get("speculate"):
            return {"words": f"{words} Engines know no way that pays here.", "commands": [ways], "snippet": ""}
        best = shlex.join(["probekit", "choose", str(run), "--export", f"{run.name}-choice"])
        return {
            "words": f"{words} Engines take the best pair.",
            "commands": [ways, best],
            "snippet": _snippet(choice, sampling),
        }
    length = ["--drafter", str(way["drafter"]), "--draft-lengths", str(way["draft_length"])]
    known = lookup.rule == "transformers"
    export = ["probekit", "export", str(run), "--drafter", str(way["drafter"]), "--draft-length",
              str(way["draft_length"]), "--engine", lookup.rule, "-o", f"{run.name}-choice"]  # fmt: skip
    return {
        "words": "Draft by prompt lookup: it needs no drafter, and engines have it built in.",
        "commands": [shlex.join(export), shlex.join(["probekit", "validate", str(run), *length])],
        "snippet": "\n".join(lines(Drafting.with_drafter(lookup, way["draft_length"], sampling))) if known else "",
    }


def _snippet(choice: Mapping[str, Any], sampling: Sampling) -> str:
    """Settings for transformers."""
    exit_layer, drafter = choice["exit_layer"], None if choice["exit_layer"] is not None else str(choice["drafter"])
    drafting = Drafting(choice["draft_length"], exit_layer, drafter, sampling=sampling)
    return "\n".join(lines(drafting))


def not_measured(settings: RunSettings, entries: Sequence[Mapping[str, Any]]) -> str:
    """The limits of every figure of a study, in a sentence."""
    choices = [entry.get("choice") or {} for entry in entries]
    contexts = sorted({costs["context"] for choice in choices if (costs := choice.get("costs"))})
    reached = f", and contexts other than {contexts[0]} tokens" if contexts else ""
    said = (
        "other engines (transformers accepts the same drafts, at a speed of its own), several texts at once, devices "
        f"and number types other than {settings.dtype} on {settings.device}{reached}."
    )
    if any(choice.get(name) for choice in choices for name in ("exit_heads", "draft_rows")):
        said += " transformers knows neither exit heads nor heads of fewer rows: it accepts other drafts."
    return said
