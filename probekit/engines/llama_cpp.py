"""llama.cpp: a draft checkpoint in GGUF, a draft model, or `ngram-simple`, as arguments of its server."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from probekit.engines.acceptance import AcceptanceProfile
from probekit.engines.engine import Drafting, Engine, Entry, Pretrained


def arguments(drafting: Drafting, places: Pretrained) -> list[str]:
    """What `llama-server` is told of drafts. Its own defaults stop a draft at a low probability: p-min 0 never does."""
    if not drafting.speculates:
        return []
    if drafting.lookup is not None:
        return [
            "--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", str(drafting.lookup.ngram),
            "--spec-ngram-simple-size-m", str(drafting.lookup.copied),
        ]  # fmt: skip
    told = [
        "--spec-type", "draft-simple", "--spec-draft-model", places.drafter_path,
        "--spec-draft-n-max", str(drafting.draft_length), "--spec-draft-n-min", "0", "--spec-draft-p-min", "0",
    ]  # fmt: skip
    return told if drafting.sampling.greedy else [*told, "--spec-draft-sampling", "probabilistic"]


def settings(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> dict[str, Any]:
    return {"arguments": arguments(drafting, places), "sampling": sampling(drafting)}


def sampling(drafting: Drafting) -> dict[str, Any]:
    """Of a request: nothing else than what the text was traced with."""
    how = drafting.sampling
    if how.greedy:
        return {"temperature": 0}
    return {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "min_p": 0}


def shown(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> str:
    served = places.path if places.path.endswith(".gguf") else "MODEL.gguf"
    command = ["llama-server", "-m", served, *arguments(drafting, places)]
    making = (
        ""
        if served == places.path
        else f"`MODEL.gguf` is {places.path} as llama.cpp reads it: its `convert_hf_to_gguf.py FOLDER --outtype f32 "
        "--outfile MODEL.gguf` makes one.\n\n"
    )
    quantised = (
        "With quantised weights llama.cpp rounds activations, too: its text, and so its rounds, may leave those of "
        "the trace, which multiplied the same weights in full precision. Float32 weights give the traced rounds.\n"
    )
    return f"```bash\n{shlex.join(command)}\n```\n\n{making}{quantised if drafting.lookup is None else ''}"


def words(profile: AcceptanceProfile) -> Mapping[str, Any]:
    return {
        "draft acceptance": profile.acceptance_rate,
        "mean len": profile.mean_acceptance_length,
        "acceptance rate per position": profile.unconditional,
        "draft_n": profile.drafted,
        "draft_n_accepted": profile.accepted,
    }


LLAMA_CPP = Engine(
    name="llama.cpp",
    title="llama.cpp",
    checked="b11434",
    proved=True,
    first_round="llama.cpp",
    checkpoint="gguf",
    rules=("llama.cpp",),
    settings=settings,
    shown=shown,
    words=words,
)
