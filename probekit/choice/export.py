"""A choice as settings for transformers' own early exit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probekit.checksums import write_sums
from probekit.choice.choose import Choice
from probekit.errors import InputError
from probekit.files import atomic_text, check_folder_target, entries, make_folder
from probekit.settings import Sampling


@dataclass(frozen=True)
class Pretrained:
    """Where transformers finds the models of a choice: arguments of `from_pretrained`, as Python source.

    probekit cannot know them for a model that was in memory. adapter, drafter_adapter: what is put into them, or None.
    """

    model: str = '"..."'
    drafter: str = '"..."'
    adapter: str | None = None
    drafter_adapter: str | None = None


def export_choice(choice: Choice, folder: str | Path, pretrained: Pretrained = Pretrained()) -> Path:
    """Write a folder with `choice.json`, `settings.json` and a README that shows how to use them in transformers.

    `SHA256SUMS` lists them, for `probekit verify` and `sha256sum -c`.

    Raises InputError for a path that is a file, or a folder that holds something else. A folder that was exported
    before is written again.
    """
    folder = check_export(folder)
    make_folder(folder)
    for name, content in (
        ("choice.json", json.dumps(choice.to_json(), indent=1) + "\n"),  # first: it says whose folder this is
        ("settings.json", json.dumps(transformers_settings(choice), indent=1) + "\n"),
        ("README.md", _readme(choice, pretrained)),
    ):
        atomic_text(folder / name, content)
    write_sums(folder, lambda name: str(name) in ("choice.json", "settings.json", "README.md"))
    return folder


def check_export(folder: str | Path, several: bool = False) -> Path:
    """The folder that a choice can be exported to (`several`: a folder for each); InputError where it holds others."""
    folder = check_folder_target(folder)
    if several and folder.is_dir():
        for each in entries(folder):
            check_export(each)
        return folder
    if folder.is_dir() and entries(folder) and not (folder / "choice.json").is_file():
        raise InputError(f"{folder} holds other files and no exported choice.", "Name a new or an empty folder.")
    return folder


def transformers_settings(choice: Choice) -> dict[str, dict[str, Any]]:
    """{"generate": arguments of the call, "generation_config": attributes to set before it}.

    The draft settings go on the generation_config of the model that drafts: passed to `generate` together with
    `assistant_early_exit`, transformers ignores them and drafts 20 tokens at a confidence of 0.4.
    """
    sampling = {} if choice.sampling.greedy else sampling_arguments(choice.sampling)
    if not choice.speculate:
        return {"generate": sampling, "generation_config": {}}
    drafts = {
        "num_assistant_tokens": choice.draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    call = {} if choice.drafter is not None else {"assistant_early_exit": choice.exit_layer}
    return {"generate": call | sampling, "generation_config": drafts}


def sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """As `generate` takes them; each is named, for a checkpoint's own generation_config may say otherwise."""
    return {
        "do_sample": True,
        "temperature": float(sampling.temperature),
        "top_k": sampling.top_k,
        "top_p": float(sampling.top_p),
    }


def _in_transformers(choice: Choice) -> str:
    """What carries over to transformers' own decoding, and what does not."""
    same = _same_drafts(choice)
    if choice.sampling.greedy:
        return same
    return (
        f"The text was sampled ({_spoken(choice.sampling)}): tokens per round are expectations, which transformers "
        f"meets over many texts and in no single one, since its random numbers are others. {same}"
    )


def _spoken(sampling: Sampling) -> str:
    kept = f", top-k {sampling.top_k}" if sampling.top_k else ""
    return f"temperature {sampling.temperature:g}{kept}" + (f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else "")


def _same_drafts(choice: Choice) -> str:
    if choice.drafter is not None or (choice.draft_rows is None and choice.exit_heads is None):
        what = "The accepted drafts are" if choice.sampling.greedy else "The acceptance rate is"
        return f"{what} the same in transformers, whose speed was not measured:"
    if choice.exit_heads is not None:
        return "transformers knows no exit heads, so it accepts fewer drafts there, and may decode slower than alone:"
    return "transformers drafts with the whole head, so it accepts more drafts there, each of which costs more:"


def _readme(choice: Choice, pretrained: Pretrained) -> str:
    if not choice.speculate:
        return f"# {choice.model}\n\n{choice.sentence()}\n\nGenerate without an assistant.\n"
    two_models = choice.drafter is not None
    holder = "assistant" if two_models else "model"
    settings = transformers_settings(choice)
    lines = [f"{holder}.generation_config.{name} = {value!r}" for name, value in settings["generation_config"].items()]
    argument = "assistant_model=assistant" if two_models else f"assistant_early_exit={choice.exit_layer}"
    load = "" if pretrained.adapter is None else f"model.load_adapter({pretrained.adapter})\n"
    if two_models:
        load += f"assistant = AutoModelForCausalLM.from_pretrained({pretrained.drafter})  # {choice.drafter}\n"
        added = pretrained.drafter_adapter
        load += "" if added is None else f"assistant.load_adapter({added})\n"
    sampling = {"do_sample": False} if choice.sampling.greedy else sampling_arguments(choice.sampling)
    arguments = ", ".join(f"{name}={value!r}" for name, value in sampling.items())
    return (
        f"# {choice.model}\n\n{choice.sentence()}\n\n"
        f"That speed is of probekit's own decoder. {_in_transformers(choice)}\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({pretrained.model})  # {choice.model}\n"
        f"{load}tokenizer = AutoTokenizer.from_pretrained({pretrained.model})\n" + "\n".join(lines) + "\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        f"output = model.generate(**inputs, {argument}, max_new_tokens=96, {arguments})\n"
        "```\n\n"
        f"The settings stand on `{holder}.generation_config` because `generate` reads them from there; "
        "as arguments of `generate` they would be ignored.\n"
    )
