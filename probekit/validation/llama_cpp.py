"""Rounds inside llama.cpp's server, as it logs and counts them itself."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from probekit.errors import InputError, ResourceError
from probekit.validation.engine_rounds import EngineRounds, EngineRun, Turn

# One sequence, and nothing rounded that need not be: caches and arithmetic in float32.
PLAIN = (
    "-np", "1", "-t", "1", "-td", "1", "--no-warmup", "--no-webui", "-fa", "off", "-ctk", "f32", "-ctv", "f32",
    "-ctkd", "f32", "-ctvd", "f32", "-c", "1024",
)  # fmt: skip
_ROUND = re.compile(r"accepted\s+(\d+)/\s*(\d+) draft tokens")
_STARTS_S, _ANSWERS_S = 120.0, 600.0


class LlamaCppSession:
    """A llama-server that runs and answers, one question after the other."""

    def __init__(self, url: str, log: Path, process: subprocess.Popen) -> None:
        self.url, self.log, self.process = url, log, process
        self.totals = {"draft_n": 0, "draft_n_accepted": 0, "predicted_n": 0}

    def __call__(
        self, prompt_ids: Sequence[int], max_new_tokens: int, *, rows: int = 1, ignore_eos: bool = False
    ) -> Turn:
        if rows != 1:
            raise InputError(f"llama-server is asked for one row at a time, not {rows}.", "Leave --rows out.")
        read, processor, begin = self.log.stat().st_size, _processor_seconds(self.process.pid), time.perf_counter()
        answer = _asked(self.url, prompt_ids, max_new_tokens, ignore_eos)
        seconds, processor = time.perf_counter() - begin, _processor_seconds(self.process.pid) - processor
        timings = answer["timings"]
        for name in self.totals:
            self.totals[name] += int(timings.get(name, 0))
        text = EngineRounds(answer["tokens"], *_logged(self.log, read, timings.get("draft_n_accepted", 0)))
        plain = len(text.tokens) - sum(count + 1 for count in text.accepted)
        return Turn(text, plain, seconds, processor, timings["predicted_ms"] / 1000)


def _processor_seconds(pid: int) -> float:
    """Of all threads of a process, to the nanosecond where the system says so (Linux)."""
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except OSError:
        tasks = []
    if tasks:
        return sum(int(task.split()[0]) for task in tasks) / 1e9
    return sum(psutil.Process(pid).cpu_times()[:2])


@contextmanager
def llama_cpp_session(
    server: str | Path, model: str | Path, drafting: Sequence[str] = (), *, options: Sequence[str] = PLAIN
) -> Iterator[LlamaCppSession]:
    """llama.cpp's server with this model, greedy; it ends with the context.

    Parameters
    ----------
    server: the `llama-server` binary. model: a GGUF file.
    drafting: arguments that switch drafts on, as an export writes them. options: more arguments.

    Raises ResourceError where the server does not start or answer, with what it said last.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(server, model, [*options, *drafting], Path(folder)) as (url, log, process),
    ):
        yield LlamaCppSession(url, log, process)


def llama_cpp_rounds(
    server: str | Path,
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    drafting: Sequence[str] = (),
    *,
    options: Sequence[str] = PLAIN,
) -> EngineRun:
    """Decode prompts greedily in llama.cpp's server, one at a time, and return the rounds that it logged.

    prompts: token ids; the rest as in `llama_cpp_session`, errors too.
    """
    with llama_cpp_session(server, model, drafting, options=options) as decode:
        turns = [decode(ids, max_new_tokens) for ids in prompts]
    return EngineRun(
        [turn.text for turn in turns], decode.totals, [turn.decoding_s for turn in turns],
        {"llama.cpp": llama_cpp_version(server)},
    )  # fmt: skip


@contextmanager
def serving(
    server: str | Path, model: str | Path, arguments: Sequence[str], folder: Path
) -> Iterator[tuple[str, Path, subprocess.Popen]]:
    """(address, log file, process) of a server that answers; it is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [str(server), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, env={**os.environ, "LLAMA_TRACE": "1"}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield url, log, process
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + _STARTS_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:  # nosec B310 - our own server
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise ResourceError(f"llama-server did not start: {said[-1] if said else 'it said nothing'}")


def _asked(url: str, ids: Sequence[int], max_new_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    asked = {
        "prompt": list(ids), "n_predict": max_new_tokens, "temperature": 0, "return_tokens": True,
        "cache_prompt": False, "ignore_eos": ignore_eos,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_ANSWERS_S) as answer:  # nosec B310 - our own server
        return json.loads(answer.read())


def _logged(log: Path, begin: int, accepted: int) -> tuple[list[int], list[int]]:
    """Drafted and accepted tokens of each round that was logged since; all of them, by the server's own total."""
    end = time.monotonic() + 10.0
    while True:
        with log.open("rb") as stream:
            stream.seek(begin)
            found = _ROUND.findall(stream.read().decode(errors="replace"))
        if sum(int(taken) for taken, _ in found) >= accepted or time.monotonic() > end:
            return [int(drafted) for _, drafted in found], [int(taken) for taken, _ in found]
        time.sleep(0.02)


def llama_cpp_version(server: str | Path) -> str:
    said = subprocess.run([str(server), "--version"], capture_output=True, text=True)
    found = re.search(r"version: (\S+)(?: \((\w+)\))?", said.stdout + said.stderr)
    return " ".join(part for part in found.groups() if part) if found else "unknown"
