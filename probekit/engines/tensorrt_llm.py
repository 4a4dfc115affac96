"""TensorRT-LLM: a draft checkpoint or draft model as `speculative_config` of its LLM API."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from probekit.engines.acceptance import AcceptanceProfile
from probekit.engines.engine import Drafting, Engine, Entry, Pretrained, ranges


def speculative_config(drafting: Drafting, places: Pretrained, entries: Sequence[Entry] = ()) -> dict[str, Any] | None:
    """As `DraftTargetDecodingConfig` takes it; None where nobody drafts."""
    if not drafting.speculates:
        return None
    config = {
        "decoding_type": "Draft_Target",
        "max_draft_len": max([drafting.draft_length, *(each.draft_length for each in entries)]),
        "speculative_model": places.drafter_path,
    }
    plan = schedule(drafting, entries)
    return config if plan is None else config | {"draft_len_schedule": plan}


def schedule(drafting: Drafting, entries: Sequence[Entry]) -> dict[int, int] | None:
    """`draft_len_schedule`: {largest batch: K}; beyond the last it does not draft.

    Earlier versions took the smallest batch of each range instead: {1: 4, 8: 2, 32: 0} where this is {7: 4, 31: 2}.
    """
    if len(entries) < 2:
        return None
    plan = {last: length for _, last, length in ranges(entries)}
    while plan and plan[max(plan)] == 0:
        del plan[max(plan)]
    return plan


def settings(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> dict[str, Any]:
    how = drafting.sampling
    return {
        "speculative_config": speculative_config(drafting, places, entries),
        "sampling_params": {"temperature": how.temperature, "top_k": how.top_k or None, "top_p": how.top_p},
    }


def shown(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> str:
    config = speculative_config(drafting, places, entries)
    command = ["trtllm-serve", places.path, "--config", "config.yaml"]
    if config is None:
        return f"```bash\n{shlex.join(command[:2])}\n```\n"
    document = yaml.safe_dump({"speculative_config": config}, sort_keys=False)
    return f"`config.yaml`:\n\n```yaml\n{document}```\n\n```bash\n{shlex.join(command)}\n```\n\n" + (
        "A key of `draft_len_schedule` is the largest batch of its range; earlier versions took the smallest.\n"
        if "draft_len_schedule" in config
        else ""
    )


def words(profile: AcceptanceProfile) -> Mapping[str, Any]:
    return {
        "avg_decoded_tokens_per_iter": profile.mean_acceptance_length,
        "acceptance rate": profile.acceptance_rate,
    }


TENSORRT_LLM = Engine(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    checked="its source of September 2026",
    proved=False,
    first_round="prefill",
    checkpoint="safetensors",
    rules=(),
    settings=settings,
    shown=shown,
    words=words,
    schedules=schedule,
)
