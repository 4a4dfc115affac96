"""Rounds inside vLLM, counted by vLLM itself, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probekit.errors import ResourceError
from probekit.validation.engine_rounds import EngineRounds, EngineRun, Turn

# vLLM on a CPU, in this process and no other
ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


class VLLMSession:
    """A vLLM that runs in a process of its own and answers, one question after the other."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    def __call__(
        self, prompt_ids: Sequence[int], max_new_tokens: int, *, rows: int = 1, ignore_eos: bool = False
    ) -> Turn:
        found = self._asked(
            {"prompt": list(prompt_ids), "max_new_tokens": max_new_tokens, "rows": rows, "ignore_eos": ignore_eos}
        )
        text = EngineRounds(found["tokens"], found["drafted"], found["accepted"])
        plain = found["passes"] - len(text.drafted)
        return Turn(text, plain, found["seconds"], found["processor_s"], found["decoding_s"])

    def about(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Its own counters until now, and versions."""
        found = self._asked({})
        return found["counters"], found["versions"]

    def _asked(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline() if self.process.stdout is not None else ""
        except OSError:  # it ended before it was asked
            answer = ""
        if not answer:
            said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            raise ResourceError(f"vLLM did not run: {said[-1] if said else f'exit status {self.process.wait()}'}")
        return json.loads(answer)


@contextmanager
def vllm_session(
    python: str | Path,
    model: str | Path,
    speculative_config: Mapping[str, Any] | None,
    *,
    dtype: str = "float32",
    max_model_len: int = 512,
    rows: int = 1,
    environment: Mapping[str, str] = ON_A_CPU,
    **options: Any,
) -> Iterator[VLLMSession]:
    """vLLM with this model, greedy; the process ends with the context.

    Parameters
    ----------
    python: the interpreter of an environment that has vLLM 0.32 or later (`per_request_spec_decode_metrics`).
    model: a checkpoint folder. speculative_config: as vLLM takes it; None: no drafts. rows: the largest batch.
    options: more arguments of `vllm.LLM`.

    Asking it raises ResourceError where vLLM does not run, with what it said last.
    """
    arguments = {
        "model": str(model), "dtype": dtype, "max_model_len": max_model_len, "enforce_eager": True,
        "max_num_seqs": rows, "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0,
        **({} if speculative_config is None else {"speculative_config": dict(speculative_config)}), **options,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked, log = Path(folder) / "arguments.json", Path(folder) / "vllm.log"
        asked.write_text(json.dumps(arguments))
        script = Path(__file__).with_name("inside_vllm.py")
        with log.open("w") as written:
            process = subprocess.Popen(
                [str(python), "-I", str(script), str(asked)],  # isolated: beside it lies a vllm.py
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
            with process:
                try:
                    yield VLLMSession(process, log)
                finally:
                    process.terminate()


def vllm_rounds(
    python: str | Path,
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    speculative_config: Mapping[str, Any] | None,
    **settings: Any,
) -> EngineRun:
    """Decode prompts greedily in vLLM, one at a time, and return the rounds that it counted.

    prompts: token ids. settings: of `vllm_session`. Raises ResourceError where vLLM does not run.
    """
    with vllm_session(python, model, speculative_config, **settings) as decode:
        decode(prompts[0], max_new_tokens)  # the first pass is slow
        before, _ = decode.about()
        turns = [decode(ids, max_new_tokens) for ids in prompts]
        after, versions = decode.about()
    since = {name: _minus(value, before.get(name)) for name, value in after.items()}
    return EngineRun([turn.text for turn in turns], since, [turn.decoding_s for turn in turns], versions)


def _minus(after: Any, before: Any) -> Any:
    if isinstance(after, list):
        return [one - (before[place] if before else 0) for place, one in enumerate(after)]
    return after - (before or 0)
