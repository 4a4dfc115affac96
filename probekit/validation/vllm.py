"""Rounds inside vLLM, counted by vLLM itself, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probekit.errors import ResourceError
from probekit.validation.engine_rounds import EngineRounds, EngineRun

# vLLM on a CPU, in this process and no other
ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


def vllm_rounds(
    python: str | Path,
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    speculative_config: Mapping[str, Any] | None,
    *,
    dtype: str = "float32",
    max_model_len: int = 512,
    repeats: int = 1,
    environment: Mapping[str, str] = ON_A_CPU,
    **options: Any,
) -> EngineRun:
    """Decode prompts greedily in vLLM, one at a time, and return the rounds that it counted.

    Parameters
    ----------
    python: the interpreter of an environment that has vLLM 0.32 or later (`per_request_spec_decode_metrics`).
    model: a checkpoint folder. prompts: token ids. speculative_config: as vLLM takes it; None: no drafts.
    repeats: how often each prompt is decoded, for the seconds; the rounds of the last one are returned, the counters
        are of all. options: more arguments of `vllm.LLM`.

    Raises ResourceError where vLLM does not run, with what it said last.
    """
    arguments = {
        "model": str(model), "dtype": dtype, "max_model_len": max_model_len, "enforce_eager": True, "max_num_seqs": 1,
        "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0,
        **({} if speculative_config is None else {"speculative_config": dict(speculative_config)}), **options,
    }  # fmt: skip
    job = {
        "llm": arguments,
        "prompts": [list(ids) for ids in prompts],
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "job.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(job))
        script = Path(__file__).with_name("inside_vllm.py")
        ran = subprocess.run(
            [str(python), "-I", str(script), str(asked), str(answer)],  # isolated: beside it lies a vllm.py
            capture_output=True, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        if ran.returncode or not answer.is_file():
            said = [line for line in (ran.stderr or ran.stdout).splitlines() if line.strip()]
            raise ResourceError(f"vLLM did not run: {said[-1] if said else f'exit status {ran.returncode}'}")
        found = json.loads(answer.read_text())
    return EngineRun(
        [EngineRounds(each["tokens"], each["drafted"], each["accepted"]) for each in found["texts"]],
        found["counters"],
        [min(one["decoding"] for one in each["seconds"]) for each in found["texts"]],
        found["versions"],
    )
