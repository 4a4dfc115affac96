"""SIGKILL at random moments, two writers at once, a full disk: `python tests/tools/kills.py`.

Commands run in forks of this process, so that each is a process of its own and starts in no time. A killed `trace` or
`study` is killed again with some chance, and then resumed to its end; what it leaves is held against an undisturbed
run, file by file: equal bytes, and an equal manifest but for `timings` (and `savings`: work spared, which a run learns
to spare anew in each process).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from probekit.cli.app import run  # noqa: E402

UNLIKE = ("timings", "savings")  # of a manifest: what a kill may change
TRACES: dict[str, list[str]] = {
    "greedy": [],
    "agreement": ["--statistics", "agreement"],
    "sampled": ["--temperature", "1", "--seed", "3"],
    "residuals and draft model": ["--keep-residuals", "1,2", "--draft-model", "MODEL"],
}


# ------------------------------------------------------------------------------------------------------- processes
def start(words: list[str], before: Callable[[], Any] = lambda: None) -> int:
    """A process that runs a command line, and its id; what it says goes nowhere."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        before()
        status = run(words)
    finally:
        os._exit(status)


def end(child: int) -> int:
    """The exit status of a process; below 0, the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(words: list[str], seconds: float) -> bool:
    """Run a command line for so long, then kill it. Whether it was still running."""
    child = start(words)
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return end(child) == -signal.SIGKILL


# -------------------------------------------------------------------------------------------------------- contents
def contents(folder: Path) -> dict[str, Any]:
    """{file: what of it must be equal}."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if path.name == "manifest.json":
            document = json.loads(path.read_text())
            found[name] = {key: value for key, value in document.items() if key not in UNLIKE}
            found[f"{name} tokens"] = document["timings"]["tokens"]
        else:
            found[name] = path.read_bytes()
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


# ----------------------------------------------------------------------------------------------------------- kills
def kill_traces(model: Path, folder: Path, kills: int, random: Random) -> dict[str, Any]:
    """Kills of `trace`, one variant after the other, until there are so many."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{word}\n" for word in ("abc", "de", "fgh", "ij", "klm", "no", "pqr", "st")))
    done, faults, reached = Counter[str](), list[str](), Counter[str]()
    whole: dict[str, tuple[dict[str, Any], float]] = {}
    while sum(done.values()) < kills:
        name = list(TRACES)[len(reached) % len(TRACES)] if not done else random.choice(list(TRACES))
        more = [str(model) if word == "MODEL" else word for word in TRACES[name]]
        words = [
            "trace",
            str(model),
            "--prompts",
            str(prompts),
            "--max-new-tokens",
            "12",
            "--batch-size",
            "1",
            *more,
            "-o",
        ]
        if name not in whole:
            began = time.monotonic()
            status = end(start([*words, str(folder / name)]))
            whole[name] = contents(folder / name), time.monotonic() - began
            assert status == 0, status
        run_folder = folder / "killed"
        resume: list[str] = []
        while True:
            if not killed([*words, str(run_folder), *resume], random.random() * whole[name][1] * 1.1):
                break  # it was done before
            done[name] += 1
            parts = len(list(run_folder.glob("layers-*.parquet")))
            there = (run_folder / "manifest.json").exists()
            reached["before the first part" if not there else f"with {parts} of 8 parts"] += 1
            resume = ["--resume"] if there else []
            if random.random() < 0.5 or sum(done.values()) >= kills:
                break
        status = end(start([*words, str(run_folder), "--resume"])) if resume or not run_folder.exists() else 0
        if not (run_folder / "manifest.json").exists():
            status = end(start([*words, str(run_folder)]))
        unlike = differences(contents(run_folder), whole[name][0]) if status == 0 else [f"exit status {status}"]
        if unlike:
            faults.append(f"{name}: {unlike}")
        shutil.rmtree(run_folder)
    return {
        "kills": sum(done.values()),
        "by_kind": dict(done),
        "reached": dict(sorted(reached.items())),
        "faults": faults,
    }


TIMED = ("timings", "threads", "costs", "validation")  # phases whose seconds are measured


def kill_studies(model: Path, folder: Path, kills: int, random: Random) -> dict[str, Any]:
    """Kills of `study`. Its traces and learned heads are equal; what is measured in seconds is another each time."""
    prompts = folder / "few.txt"
    prompts.write_text("abc\nde\nfgh\nij\n")
    words = ["study", str(model), "--prompts", str(prompts), "--max-new-tokens", "6", "--exit-layers", "1",
    "--fit-heads",
             "--draft-lengths", "1", "--context", "8", "-o"]  # fmt: skip
    began = time.monotonic()
    assert end(start([*words, str(folder / "study")])) == 0
    seconds, whole = time.monotonic() - began, _of_study(folder / "study")
    done, faults, reached = 0, list[str](), Counter[str]()
    while done < kills:
        run_folder = folder / "killed study"
        while killed([*words, str(run_folder)], random.random() * seconds):
            done += 1
            reached[_reached(run_folder)] += 1
            if random.random() < 0.5 or done >= kills:
                break
        status = end(start([*words, str(run_folder)]))
        unlike = differences(_of_study(run_folder), whole) if status == 0 else [f"exit status {status}"]
        if not unlike and (broken := end(start(["verify", str(run_folder)]))):
            unlike = [f"verify ends with {broken}"]
        if unlike:
            faults.append(str(unlike))
        shutil.rmtree(run_folder)
    return {"kills": done, "reached": dict(sorted(reached.items())), "faults": faults}


def _of_study(folder: Path) -> dict[str, Any]:
    """What of a study does not hang on the clock: settings, traces, learned heads, the tables that hold no speedup."""
    found = {name: value for name, value in contents(folder).items()
             if name.startswith(("traces/", "exit_heads/", "study.json", "tables/layers",
             "tables/run_lengths"))}  # fmt: skip
    return found | {f"{name} is there": True for name in contents(folder) if not name.endswith(" tokens")}


def _reached(folder: Path) -> str:
    if not (folder / "study.json").exists():
        return "nothing"
    phases = sorted(path.stem for path in folder.glob("phases/*/*.json"))
    return "tables" if (folder / "tables").exists() else f"{len(phases)} phases" if phases else "settings"


# ------------------------------------------------------------------------------------------------------ two writers
def two_writers(model: Path, folder: Path, pairs: int, random: Random) -> dict[str, Any]:
    """Two `trace` of other seeds on one new folder: one makes the run, whole, and the other is refused."""
    prompts = folder / "two.txt"
    prompts.write_text("abc\nde\nfgh\nij\n")
    words = ["trace", str(model), "--prompts", str(prompts), "--max-new-tokens", "8", "--batch-size", "1",
             "--temperature", "1"]  # fmt: skip
    alone = {}
    for seed in ("1", "2"):
        assert end(start([*words, "--seed", seed, "-o", str(folder / f"seed {seed}")])) == 0
        alone[seed] = contents(folder / f"seed {seed}")
    faults, ends = list[str](), Counter[str]()
    for pair in range(pairs):
        run_folder = folder / "pair"
        first = start([*words, "--seed", "1", "-o", str(run_folder)])
        time.sleep(random.random() * (0.3 if pair % 2 else 0.02))
        second = start([*words, "--seed", "2", "-o", str(run_folder)])
        statuses = end(first), end(second)
        ends[str(statuses)] += 1
        seed = "1" if statuses[0] == 0 else "2"
        if sorted(statuses) != [0, 2]:
            faults.append(f"exit statuses {statuses}")
        elif unlike := differences(contents(run_folder), alone[seed]):
            faults.append(f"seed {seed} won: {unlike}")
        shutil.rmtree(run_folder, ignore_errors=True)
    return {"pairs": pairs, "exit_statuses": dict(ends), "faults": faults}


# --------------------------------------------------------------------------------------------------------- the disk
@contextmanager
def small_disk(folder: Path, size: int) -> Any:
    """A disk of so many bytes, where this process may mount one; else None."""
    import ctypes

    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()) == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            libc.umount2(str(folder).encode(), 2)


def full_disk(model: Path, folder: Path) -> dict[str, Any]:
    """Each command on a disk without room ends with one line and status 1, leaves nothing that blocks, and goes on.

    On a small disk where one can be mounted, else under a limit on the size of files.
    """
    prompts, run_folder = folder / "disk.txt", folder / "for export"
    prompts.write_text("abc\nde\nfgh\nij\n")
    common = ["--prompts", str(prompts), "--max-new-tokens", "8"]
    assert end(start(["trace", str(model), *common, "-o", str(run_folder)])) == 0
    commands: dict[str, list[str]] = {
        "trace": ["trace", str(model), *common, "--batch-size", "1", "-o", "PLACE/run"],
        "study": ["study", str(model), *common, "--exit-layers", "1", "--draft-lengths", "1", "--context", "8", "-o",
        "PLACE/s"],
        "export": ["choose", str(run_folder), "--costs", "roofline", "--device", "h100", "--export", "PLACE/e"],
        "fit-heads": ["fit-heads", str(run_folder), "-o", "PLACE/heads.safetensors"],
        "lens --html": ["lens", str(model), "abc", "--max-new-tokens", "2", "--html", "PLACE/page.html"],
    }  # fmt: skip
    found, faults, how = dict[str, Any](), list[str](), ""
    for name, words in commands.items():
        place = folder / f"disk of {name}"
        with small_disk(place, 16 * 2**20) as disk:
            how = "a small disk" if disk else "a limit on the size of files"
            at = [word.replace("PLACE", str(place)) for word in words]
            statuses = []
            for room in (0, 2_000, 20_000) if name != "study" else (0, 20_000, 400_000):
                if disk:
                    filler = place / "filler"
                    free = shutil.disk_usage(place).free
                    filler.write_bytes(b"\0" * max(0, free - room))
                    again = [*at, "--resume"] if name == "trace" and (place / "run" / "manifest.json").exists() else at
                    statuses.append(end(start(again)))
                    filler.unlink()
                else:
                    again = [*at, "--resume"] if name == "trace" and (place / "run" / "manifest.json").exists() else at
                    limit = room + 100
                    statuses.append(
                        end(start(again, lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
                    )
                left = [path for path in place.rglob("*") if path.is_file() and path.stat().st_size == 0]
                if left:
                    faults.append(f"{name}: {left[0].name} is there, and empty")
            again = [*at, "--resume"] if name == "trace" and (place / "run" / "manifest.json").exists() else at
            statuses.append(end(start(again)))
            found[name] = statuses
            if statuses[0] != 1 or statuses[-1] != 0 or not set(statuses) <= {0, 1}:
                faults.append(f"{name}: exit statuses {statuses}")
    return {"by": how, "exit_statuses": found, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=50, help="kills of trace")
    parser.add_argument("--studies", type=int, default=20, help="kills of study")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of writers")
    parser.add_argument("--no-disk", action="store_true", help="leave the full disk out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    asked = parser.parse_args()
    random = Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="probekit-kills-") as name:
        folder = Path(name)
        model = make_model(folder)
        results: dict[str, Any] = {}
        for part, wanted, work in (
            ("traces", asked.traces, lambda: kill_traces(model, folder, asked.traces, random)),
            ("studies", asked.studies, lambda: kill_studies(model, folder, asked.studies, random)),
            ("two_writers", asked.pairs, lambda: two_writers(model, folder, asked.pairs, random)),
            ("full_disk", not asked.no_disk, lambda: full_disk(model, folder)),
        ):
            if wanted:
                results[part] = work()
                print(part, json.dumps(results[part]), flush=True)
    faults = sum(len(result["faults"]) for result in results.values())
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps({
            "schema": "probekit/kills/1", "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": asked.seed,
            "machine": {"system": platform.system(), "processor": platform.machine(),
            "python": platform.python_version()},
            "versions": {name: version(name) for name in ("probekit", "torch", "transformers", "pyarrow", "filelock")},
            "faults": faults, **results,
        }, indent=1) + "\n")  # fmt: skip
    sys.exit(1 if faults else 0)


def make_model(folder: Path) -> Path:
    """A tiny model with a tokenizer, as a checkpoint; loading it here spares each command the imports."""
    from probekit.models.loaded import load
    from probekit.models.synthetic import synthetic

    made = synthetic("tiny-draft", seed=3, ends=False)
    for each in (made.model, made.tokenizer):
        each.save_pretrained(folder / "model")
    load(folder / "model", device="cpu")
    import probekit.choice.choose
    import probekit.choice.rank
    import probekit.cli.study
    import probekit.costs.measure
    import probekit.presentation.report
    import probekit.study.run
    import probekit.tracing.tracer  # noqa: F401

    return folder / "model"


if __name__ == "__main__":
    main()
