"""transformers: its own early exit, a draft model as assistant, or prompt lookup. Needs no checkpoint of an exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from probekit.choice.choose import Choice
from probekit.engines.acceptance import AcceptanceProfile
from probekit.engines.engine import Drafting, Engine, Entry, Pretrained
from probekit.settings import Sampling


def transformers_settings(choice: Choice) -> dict[str, dict[str, Any]]:
    """{"generate": arguments of the call, "generation_config": attributes to set before it}.

    The draft settings go on the generation_config of the model that drafts: passed to `generate` together with
    `assistant_early_exit`, transformers ignores them and drafts 20 tokens at a confidence of 0.4.
    """
    return settings_of(Drafting.of(choice))


def settings_of(drafting: Drafting) -> dict[str, dict[str, Any]]:
    """The same of any drafting."""
    sampling = {} if drafting.sampling.greedy else sampling_arguments(drafting.sampling)
    if not drafting.speculates:
        return {"generate": sampling, "generation_config": {}}
    if drafting.lookup is not None:
        call = {
            "prompt_lookup_num_tokens": drafting.draft_length,
            "max_matching_ngram_size": drafting.lookup.ngram,
        }
        return {"generate": call | sampling, "generation_config": {}}
    drafts = {
        "num_assistant_tokens": drafting.draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    exits: dict[str, Any] = {} if drafting.drafter is not None else {"assistant_early_exit": drafting.exit_layer}
    return {"generate": exits | sampling, "generation_config": drafts}


def sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """As `generate` takes them; each is named, for a checkpoint's own generation_config may say otherwise."""
    return {
        "do_sample": True,
        "temperature": float(sampling.temperature),
        "top_k": sampling.top_k,
        "top_p": float(sampling.top_p),
    }


def lines(drafting: Drafting, inputs: str = "inputs", **more: Any) -> list[str]:
    """Python that puts the settings where transformers reads them, and generates.

    inputs: the name of what the tokenizer made. more: further arguments of `generate`.
    """
    settings = settings_of(drafting)
    holder = "model" if drafting.drafter is None else "assistant"
    assistant = [] if drafting.drafter is None else ["assistant_model=assistant"]
    arguments = [f"{name}={value!r}" for name, value in (settings["generate"] | more).items()]
    return [
        *(f"{holder}.generation_config.{name} = {value!r}" for name, value in settings["generation_config"].items()),
        f"output = model.generate({', '.join([f'**{inputs}', *assistant, *arguments])})",
    ]


def shown(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> str:
    """A snippet that runs, and why the settings stand where they do."""
    two_models = drafting.drafter is not None
    load = "" if places.adapter is None else f"model.load_adapter({places.adapter})\n"
    if two_models:
        load += f"assistant = AutoModelForCausalLM.from_pretrained({places.drafter})  # {drafting.drafter}\n"
        load += "" if places.drafter_adapter is None else f"assistant.load_adapter({places.drafter_adapter})\n"
    more: dict[str, Any] = {"max_new_tokens": 96} | ({"do_sample": False} if drafting.sampling.greedy else {})
    made = lines(drafting, **more)
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({places.model})\n"
        f"{load}tokenizer = AutoTokenizer.from_pretrained({places.model})\n"
        + "".join(f"{line}\n" for line in made[:-1])
        + 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        f"{made[-1]}\n"
        "```\n"
    ) + (
        f"\nThe settings stand on `{'assistant' if two_models else 'model'}.generation_config` because `generate` "
        "reads them from there; as arguments of `generate` they would be ignored.\n"
        if drafting.speculates and drafting.lookup is None
        else ""
    )


def words(profile: AcceptanceProfile) -> Mapping[str, Any]:
    """It reports nothing; its heuristic schedule goes by the accepted tokens of a round."""
    return {"num_matches (mean)": profile.accepted / profile.rounds}


TRANSFORMERS = Engine(
    name="transformers",
    title="transformers",
    checked="5.23",
    proved=True,
    first_round="draft",
    checkpoint=None,
    rules=("transformers",),
    settings=lambda drafting, places, entries: settings_of(drafting),
    shown=shown,
    words=words,
)
