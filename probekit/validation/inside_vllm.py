"""Run by vLLM's own Python, which knows nothing of probekit: decode what it is asked to, and say what it counted.

    python inside_vllm.py ARGUMENTS.json

ARGUMENTS: those of vllm.LLM. A line of JSON comes in on standard input for each text: {"prompt": [token ids], "rows",
"max_new_tokens", "ignore_eos"}; a line goes out: the tokens and rounds of the first row, passes of the engine, seconds.
An empty question is answered with vLLM's own counters and versions.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path


def main(arguments_path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to standard error
    arguments = json.loads(Path(arguments_path).read_text())
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    if arguments.get("speculative_config") is not None:
        arguments["per_request_spec_decode_metrics"] = "detailed"
    llm = LLM(**arguments)
    passes = counted_passes(llm)
    for line in sys.stdin:
        asked = json.loads(line)
        if not asked:
            versions = {"vllm": vllm.__version__, "torch": torch.__version__, "python": platform.python_version(),
                        "processor": platform.processor() or platform.machine()}  # fmt: skip
            print(json.dumps({"counters": counters(llm), "versions": versions}), file=answers, flush=True)
            continue
        greedy = SamplingParams(
            temperature=0.0, max_tokens=asked["max_new_tokens"], ignore_eos=asked.get("ignore_eos", False)
        )
        prompts = [{"prompt_token_ids": asked["prompt"]}] * asked.get("rows", 1)
        before, begin, begin_processor = passes[0], time.perf_counter(), time.process_time()
        answer = llm.generate(prompts, greedy, use_tqdm=False)[0]
        spent, processor = time.perf_counter() - begin, time.process_time() - begin_processor
        said, stats = answer.outputs[0], answer.metrics
        rounds = said.spec_decode_metrics
        result = {
            "tokens": list(said.token_ids),
            "drafted": rounds.per_step_drafted if rounds else [],
            "accepted": rounds.per_step_accepted if rounds else [],
            "passes": passes[0] - before,
            "seconds": spent,
            "processor_s": processor,
            "decoding_s": stats.last_token_ts - stats.first_token_ts,
        }
        print(json.dumps(result), file=answers, flush=True)


def counted_passes(llm):
    """[steps that the engine has taken], kept up to date."""
    count, step = [0], llm.llm_engine.step

    def counted():
        count[0] += 1
        return step()

    llm.llm_engine.step = counted
    return count


def counters(llm):
    """vLLM's own, by its own names."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            found[metric.name] = getattr(metric, "values", None) or getattr(metric, "value", None)
    return found


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(*sys.argv[1:])
