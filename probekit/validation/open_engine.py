"""An installed engine, opened with one model and any way of drafting: it is told what an export says."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probekit.engines.engine import Drafting, Pretrained
from probekit.engines.known import ENGINES
from probekit.errors import InputError, ResourceError
from probekit.models.cut import cut_checkpoint
from probekit.models.cut_gguf import cut_gguf
from probekit.models.loaded import Loaded, silent
from probekit.models.write_gguf import write_gguf
from probekit.validation.engine_rounds import Session
from probekit.validation.llama_cpp import PLAIN, llama_cpp_session, llama_cpp_version
from probekit.validation.transformers import TransformersSession
from probekit.validation.vllm import ON_A_CPU, vllm_session

OPENED = ("transformers", "vllm", "llama.cpp")


@dataclass(frozen=True)
class EngineHome:
    """One engine, one model, and a folder for what it is served.

    engine: one of OPENED. folder: holds the checkpoints that are written. program: vLLM's Python, or `llama-server`.
    gguf: for llama.cpp, the file that it serves; by default the model's own, or one that is written.
    plain: llama.cpp computes in float32, its files dequantised, on one thread. options: more of the engine's own: a
    JSON object of `vllm.LLM` arguments, or a command line of `llama-server`.
    longest, rows: the longest text and the largest batch. helper: a draft model of its own.
    """

    engine: str
    loaded: Loaded
    folder: Path
    program: Path | None = None
    gguf: Path | None = None
    plain: bool = False
    options: str = ""
    longest: int = 512
    rows: int = 1
    helper: Loaded | None = None

    def __post_init__(self) -> None:
        if self.engine not in OPENED:
            raise InputError(f"there is no running {self.engine!r}; there are {', '.join(OPENED)}.")
        if self.rows > 1 and self.engine != "vllm":
            raise InputError(
                f"{ENGINES[self.engine].title} is asked for one row at a time, not {self.rows}.",
                "Measure a batch in vLLM, or type in what your own benchmark printed.",
            )
        self.arguments()

    def arguments(self) -> Any:
        """The further options, as the engine takes them. Raises InputError."""
        if self.engine == "llama.cpp":
            return shlex.split(self.options)
        try:
            found = json.loads(self.options or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"options of {self.engine} are {self.options!r}; expected a JSON object.")
        if found and self.engine == "transformers":
            raise InputError("transformers runs in this process and has no further options.", "Leave them out.")
        return found

    def open(self, drafting: Drafting) -> AbstractContextManager[Session]:
        """A session that drafts so. Raises InputError, ResourceError where the engine is not there."""
        if self.engine == "transformers":
            return nullcontext(TransformersSession(self.loaded, drafting, self._helper(drafting)))
        told = self.told(drafting)
        if self.engine == "vllm":
            on_a_cpu = self.loaded.device.type != "cuda"
            own = {"dtype": str(self.loaded.dtype).removeprefix("torch."), "max_model_len": self.longest,
                   "enforce_eager": on_a_cpu, **self.arguments()}  # fmt: skip
            return vllm_session(
                self.found(),
                self.whole(),
                told["speculative_config"],
                rows=self.rows,
                environment=ON_A_CPU if on_a_cpu else {},
                **own,
            )
        served: Sequence[str] = PLAIN if self.plain else ("-np", "1", "--no-webui", "-c", str(self.longest))
        return llama_cpp_session(
            self.found(), self.whole(), told["arguments"] if drafting.speculates else (),
            options=[*served, *self.arguments()],
        )  # fmt: skip

    def told(self, drafting: Drafting) -> dict[str, Any]:
        """The settings that an export writes, of checkpoints in the folder. Raises InputError."""
        places = Pretrained(drafter_path=self._drafter_path(drafting))
        return ENGINES[self.engine].settings(drafting, places, ())

    def found(self) -> Path:
        """The program that runs: as named, or found. Raises ResourceError."""
        if self.program is not None:
            if not self.program.is_file():
                raise InputError(f"there is no program {self.program}.")
            return self.program
        if self.engine == "vllm":
            return Path(sys.executable)
        server = shutil.which("llama-server")
        if server is None:
            raise ResourceError("there is no llama-server on the search path.", "Name it with --engine-path.")
        return Path(server)

    def versions(self) -> dict[str, str]:
        """Of the engine, as far as it can be asked without a model."""
        from importlib.metadata import version

        if self.engine == "llama.cpp":
            return {"llama.cpp": llama_cpp_version(self.found())}
        return {name: version(name) for name in ("torch", "transformers")} if self.engine == "transformers" else {}

    def whole(self) -> Path:
        """The model that is served."""
        if self.engine == "llama.cpp":
            if (served := self._served()) is not None and not self.plain:
                return served
            return self._written(None, self.folder / "whole.gguf")
        return _saved(self.loaded, self.folder / "whole")

    def _drafter_path(self, drafting: Drafting) -> str:
        if drafting.exit_layer is not None:
            return str(self.drafter(drafting.exit_layer))
        helper = self._helper(drafting)
        if helper is None:
            return ""
        if self.engine != "llama.cpp":
            return str(_saved(helper, self.folder / "helper"))
        if (own := _own_gguf(helper)) is not None and not self.plain:
            return str(own)
        target = self.folder / "helper.gguf"
        if target.is_file():
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        return str(write_gguf(helper, target) if own is None else cut_gguf(own, None, target, plain=True))

    def _helper(self, drafting: Drafting) -> Loaded | None:
        """The draft model of its own that drafts, where one does."""
        if drafting.drafter is None:
            return None
        if self.helper is None or self.helper.name != drafting.drafter:
            raise InputError(f"{self.engine} was not given the draft model {drafting.drafter}.", "Give it as `helper`.")
        return self.helper

    def drafter(self, exit_layer: int) -> Path:
        """The first layers of it, written where they are not there yet."""
        if self.engine == "llama.cpp":
            return self._written(exit_layer, self.folder / f"drafter-{exit_layer}.gguf")
        target = self.folder / f"drafter-{exit_layer}"
        return target if (target / "config.json").is_file() else cut_checkpoint(self.loaded, exit_layer, target)

    def _served(self) -> Path | None:
        """The GGUF file that there is."""
        return self.gguf or _own_gguf(self.loaded)

    def _written(self, exit_layer: int | None, target: Path) -> Path:
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        if (served := self._served()) is not None:
            return cut_gguf(served, exit_layer, target, plain=self.plain)
        return write_gguf(self.loaded, target, exit_layer)


def _own_gguf(loaded: Loaded) -> Path | None:
    return loaded.path if loaded.path is not None and loaded.path.suffix == ".gguf" else None


def _saved(loaded: Loaded, target: Path) -> Path:
    """A checkpoint of safetensors, written where it is not there yet."""
    if not (target / "config.json").is_file():
        with silent():
            loaded.model.save_pretrained(target)
            loaded.tokenizer.save_pretrained(target)
    return target
