"""SGLang: a draft checkpoint or draft model as STANDALONE. Its n-gram drafts are trees of another rule."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from probekit.engines.acceptance import AcceptanceProfile
from probekit.engines.engine import Drafting, Engine, Entry, Pretrained


def arguments(drafting: Drafting, places: Pretrained) -> list[str]:
    """A chain of K drafts: K steps of one branch, and K + 1 tokens that are verified, the last one's own among them."""
    if not drafting.speculates:
        return []
    length = drafting.draft_length
    return [
        "--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", places.drafter_path,
        "--speculative-num-steps", str(length), "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", str(length + 1),
    ]  # fmt: skip


def schedule(drafting: Drafting, entries: Sequence[Entry]) -> dict[str, Any] | None:
    """`--speculative-adaptive-config`: it chooses among these lengths as it runs; it takes no table by batch."""
    lengths = sorted({each.draft_length for each in entries if each.draft_length})
    return {"candidate_steps": lengths} if len(lengths) > 1 else None


def settings(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> dict[str, Any]:
    how = drafting.sampling
    request = {"temperature": how.temperature, "top_k": how.top_k or -1, "top_p": how.top_p}
    return {"arguments": arguments(drafting, places), "sampling_params": request}


def shown(drafting: Drafting, places: Pretrained, entries: Sequence[Entry]) -> str:
    command = ["python", "-m", "sglang.launch_server", "--model-path", places.path, *arguments(drafting, places)]
    if places.revision is not None:
        command += ["--revision", places.revision]
    return f"```bash\n{shlex.join(command)}\n```\n"


def words(profile: AcceptanceProfile) -> Mapping[str, Any]:
    return {
        "accept len (sglang:spec_accept_length)": profile.mean_acceptance_length,
        "accept rate (sglang:spec_accept_rate)": profile.acceptance_rate,
    }


SGLANG = Engine(
    name="sglang",
    title="SGLang",
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
