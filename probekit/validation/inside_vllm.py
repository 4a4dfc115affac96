"""Run by vLLM's own Python, which knows nothing of probekit: decode some prompts and write down every round.

    python inside_vllm.py JOB.json RESULT.json

JOB: {"llm": arguments of vllm.LLM, "prompts": [[token ids]], "max_new_tokens", "repeats"}.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    speculates = job["llm"].get("speculative_config") is not None
    if speculates:
        job["llm"]["per_request_spec_decode_metrics"] = "detailed"
    llm = LLM(**job["llm"])
    greedy = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"])
    llm.generate([{"prompt_token_ids": job["prompts"][0]}], greedy, use_tqdm=False)  # the first pass is slow
    before = counters(llm)
    texts = []
    for ids in job["prompts"]:
        seconds = []
        for _ in range(job["repeats"]):
            begin = time.perf_counter()
            [answer] = llm.generate([{"prompt_token_ids": ids}], greedy, use_tqdm=False)
            whole, stats = time.perf_counter() - begin, answer.metrics
            seconds.append({"total": whole, "decoding": stats.last_token_ts - stats.first_token_ts})
        said = answer.outputs[0]
        rounds = said.spec_decode_metrics
        texts.append(
            {
                "tokens": list(said.token_ids),
                "drafted": rounds.per_step_drafted if rounds else [],
                "accepted": rounds.per_step_accepted if rounds else [],
                "seconds": seconds,
            }
        )
    after = counters(llm)
    result = {
        "texts": texts,
        "counters": {name: minus(value, before.get(name)) for name, value in after.items()},
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.processor() or platform.machine(),
        },
    }
    Path(result_path).write_text(json.dumps(result))


def counters(llm):
    """vLLM's own, by its own names."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            found[metric.name] = getattr(metric, "values", None) or getattr(metric, "value", None)
    return found


def minus(after, before):
    if isinstance(after, list):
        return [one - (before[place] if before else 0) for place, one in enumerate(after)]
    return after - (before or 0)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(*sys.argv[1:])
