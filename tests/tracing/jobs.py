"""Jobs of several processes on one machine, as a launcher starts them; one of them can be killed in the middle."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TEXTS = ["abcabc", "hello there", "z", "the cat sat on the mat", "one two three", "a man and a dog"]
PATIENCE = 120  # seconds for a job
MANY = multiprocessing.get_context("forkserver")  # clean of the threads and locks that a test process may have
MANY.set_forkserver_preload(
    ["torch", "torch.distributed", "probekit.models.synthetic", "probekit.tracing.tracer", "probekit.validation.run"]
)


def job(
    size: int,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    victim: tuple[int, int] | None = None,
    work: Callable[..., None] | None = None,
    **special: Any,
) -> list[int]:
    """Exit statuses of `size` processes that trace TEXTS together: 0, that of an error, or -9 where one was killed.

    victim: (rank, the file of its share at which it is killed). special: {"rank_N": settings of that rank alone}.
    work: what they do instead of tracing; called with the ranks, the folder and the settings.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        own = {**settings, **special.get(f"rank_{rank}", {})}
        dies = victim[1] if victim is not None and victim[0] == rank else None
        processes.append(MANY.Process(target=_work, args=(rank, size, port, str(folder), own, dies, work)))
        processes[-1].start()
    for process in processes:
        process.join(PATIENCE)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {size} processes did not end"
    return [process.exitcode or 0 for process in processes]


def ran(code: str, *words: object) -> int:
    """The exit status of Python code as a program of its own with these arguments; below 0 after a signal."""
    process = MANY.Process(target=_run, args=(code, ["-c", *map(str, words)]))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode or 0


def _run(code: str, words: list[str]) -> None:
    sys.argv = words
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


def _work(rank: int, size: int, port: int, folder: str, settings: dict[str, Any], dies: int | None, work: Any) -> None:
    import torch

    from probekit.errors import ProbekitError
    from probekit.models.synthetic import synthetic
    from probekit.ranks import Ranks
    from probekit.tracing.tracer import trace

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    if dies is not None:
        _die_at(dies)
    if work is None:
        settings = {"prompts": TEXTS, **settings}
    if settings.pop("drafter", False):
        settings["draft_model"] = synthetic("tiny-draft", seed=3)
    try:
        if work is not None:
            return work(Ranks.of_environment(), Path(folder), settings)
        trace(synthetic("tiny", seed=1), folder=folder, ranks=Ranks.of_environment(), **settings)
    except ProbekitError as error:
        Path(folder).with_suffix(f".said-{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(error.exit_status)


def _die_at(count: int) -> None:
    """Let this process be killed when it is about to put its count-th file of a part into its place."""
    replace, seen = os.replace, 0

    def replace_or_die(source: Any, target: Any) -> None:
        nonlocal seen
        if str(target).endswith((".parquet", ".safetensors")):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


def bits(folder: Path) -> dict[str, bytes]:
    """Every file of a run: its parts as they are, its manifest without what a run measures of itself."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".parquet", ".safetensors")}
    manifest = json.loads((folder / "manifest.json").read_text())
    for measured in ("timings", "savings"):
        del manifest[measured]
    return {**found, "manifest.json": json.dumps(manifest).encode()}


def unlike(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> Sequence[str]:
    """Names of files that are not the same in both."""
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
