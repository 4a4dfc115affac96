"""The engines that a choice can be exported to. Another is a file with an `Engine`, and `register` or its name here."""

from __future__ import annotations

from probekit.engines.engine import Engine
from probekit.engines.llama_cpp import LLAMA_CPP
from probekit.engines.sglang import SGLANG
from probekit.engines.tensorrt_llm import TENSORRT_LLM
from probekit.engines.transformers import TRANSFORMERS
from probekit.engines.vllm import VLLM
from probekit.errors import InputError

ENGINES: dict[str, Engine] = {each.name: each for each in (TRANSFORMERS, VLLM, LLAMA_CPP, SGLANG, TENSORRT_LLM)}


def engine_named(name: str) -> Engine:
    """Raises InputError with the names that there are."""
    found = ENGINES.get(name)
    if found is None:
        raise InputError(f"there is no export to {name!r}; there are {', '.join(ENGINES)}.")
    return found


def register(engine: Engine) -> None:
    """Offer an engine of your own to exports from now on. Raises InputError for a name that is taken."""
    if engine.name in ENGINES:
        raise InputError(f"there is an engine {engine.name!r} already.", "Choose another name.")
    ENGINES[engine.name] = engine
