"""A choice as settings for transformers' own early exit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from probekit.choice.choose import Choice
from probekit.errors import InputError


def export_choice(choice: Choice, folder: str | Path) -> Path:
    """Write a folder with `choice.json`, `settings.json` and a README that shows how to use them in transformers.

    Raises InputError for a path that is a file, or a folder that holds something else. A folder that was exported
    before is written again.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; a choice is exported to a folder.", "Name another one.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "choice.json").is_file():
        raise InputError(f"{folder} holds other files and no exported choice.", "Name a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("settings.json", json.dumps(transformers_settings(choice), indent=1) + "\n"),
        ("README.md", _readme(choice)),
        ("choice.json", json.dumps(choice.to_json(), indent=1) + "\n"),
    ):
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def transformers_settings(choice: Choice) -> dict[str, dict[str, Any]]:
    """{"generate": arguments of the call, "generation_config": attributes to set before it}.

    The draft settings go on the generation_config of the model that drafts: passed to `generate` together with
    `assistant_early_exit`, transformers ignores them and drafts 20 tokens at a confidence of 0.4.
    """
    if not choice.speculate:
        return {"generate": {}, "generation_config": {}}
    drafts = {
        "num_assistant_tokens": choice.draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    call = {} if choice.drafter is not None else {"assistant_early_exit": choice.exit_layer}
    return {"generate": call, "generation_config": drafts}


def _in_transformers(choice: Choice) -> str:
    if choice.drafter is not None or (choice.draft_rows is None and choice.exit_heads is None):
        return "The accepted drafts are the same in transformers:"
    if choice.exit_heads is not None:
        return "transformers knows no exit heads, so it accepts fewer drafts there, and may decode slower than alone:"
    return "transformers drafts with the whole head, so it accepts more drafts there, each of which costs more:"


def _readme(choice: Choice) -> str:
    if not choice.speculate:
        return f"# {choice.model}\n\n{choice.sentence()}\n\nGenerate without an assistant.\n"
    two_models = choice.drafter is not None
    holder = "assistant" if two_models else "model"
    settings = transformers_settings(choice)
    lines = [f"{holder}.generation_config.{name} = {value!r}" for name, value in settings["generation_config"].items()]
    argument = "assistant_model=assistant" if two_models else f"assistant_early_exit={choice.exit_layer}"
    load = f'assistant = AutoModelForCausalLM.from_pretrained("...")  # {choice.drafter}\n' if two_models else ""
    return (
        f"# {choice.model}\n\n{choice.sentence()}\n\n"
        f"That speed is of probekit's own decoder. {_in_transformers(choice)}\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("...")  # {choice.model}\n'
        f'{load}tokenizer = AutoTokenizer.from_pretrained("...")\n' + "\n".join(lines) + "\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        f"output = model.generate(**inputs, {argument}, max_new_tokens=96, do_sample=False)\n"
        "```\n\n"
        f"The settings stand on `{holder}.generation_config` because `generate` reads them from there; "
        "as arguments of `generate` they would be ignored.\n"
    )
