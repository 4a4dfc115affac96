"""vLLM: a draft checkpoint, a draft model or n-grams, as one `speculative_config`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from probekit.engines.acceptance import AcceptanceProfile
from probekit.engines.engine import Drafting, Engine, Entry, Pretrained, ranges


def speculative_config(drafting: Drafting, places: Pretrained, entries: Sequence[Entry] = ()) -> dict[str, Any] | None:
    """As `--speculative-config` takes it; None where nobody drafts.

    vLLM drafts greedily by default also where the target samples; with sampled text its rates are then others than
    those of speculative sampling, which is what a trace predicts: `draft_sample_method` says so.
    """
    if not drafting.speculates:
        return None
    config: dict[str, Any]
    if drafting.lookup is not None:
        config = {
            "method": "ngram",
            "prompt_lookup_max": drafting.lookup.ngram,
            "prompt_lookup_min": drafting.lookup.least,
        }
    else:
        config = {"method": "draft_model", "model": places.drafter_path}
        if not drafting.sampling.greedy:
            config["draft_sample_method"] = "probabilistic"
    config["num_speculative_tokens"] = max([drafting.draft_length, *(each.draft_length for each in entries)])
    if (plan := schedule(drafting, entries)) is not None:
        config["num_speculative_tokens_per_batch_size"] = plan
    return config


def schedule(drafting: Drafting, entries: Sequence[Entry]) -> list[list[int]] | None:
    """`num_speculative_tokens_per_batch_size`: [first, last, K]; the last range reaches to the largest batch."""
    return [list(each) for each in ranges(entries)] if len(entries) > 1 else None


def settings(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> dict[str, Any]:
    how = drafting.sampling
    return {
        "speculative_config": speculative_config(drafting, places, entries),
        "sampling_params": {"temperature": how.temperature, "top_k": how.top_k or -1, "top_p": how.top_p},
    }


def shown(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> str:
    config = speculative_config(drafting, places, entries)
    command = ["vllm", "serve", places.path]
    if places.revision is not None:
        command += ["--revision", places.revision]
    if config is not None:
        command += ["--speculative-config", json.dumps(config)]
    return (
        f"```bash\n{shlex.join(command)}\n```\n\n"
        "In Python the same document is `LLM(..., speculative_config=...)`; "
        '`per_request_spec_decode_metrics="detailed"` adds the rounds of each request to its output.\n'
    )


def words(profile: AcceptanceProfile) -> Mapping[str, Any]:
    return {
        "Mean acceptance length": profile.mean_acceptance_length,
        "Avg Draft acceptance rate": profile.acceptance_rate,
        "Per-position acceptance rate": profile.unconditional,
        "vllm:spec_decode_num_drafts": profile.rounds,
        "vllm:spec_decode_num_draft_tokens": profile.drafted,
        "vllm:spec_decode_num_accepted_tokens": profile.accepted,
        "vllm:spec_decode_num_accepted_tokens_per_pos": list(profile.accepted_by_position),
    }


VLLM = Engine(
    name="vllm",
    title="vLLM",
    checked="0.32.0",
    proved=True,
    first_round="vllm",
    checkpoint="safetensors",
    rules=("vllm",),
    settings=settings,
    shown=shown,
    words=words,
    schedules=schedule,
)
