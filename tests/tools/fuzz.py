"""Every reader and every command line against mutated input: `python tests/tools/fuzz.py`.

Inputs are made from a seed, so that each can be made again by its number. They are read in worker processes that may
take 10 s of processor time and 1 GB of memory for each; what raises anything but ProbekitError, takes more, or ends its
process, is a fault. The inputs at fault are kept with --keep, for tests/fuzzing/test_fuzzing.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
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

from fuzzing import lines, targets  # noqa: E402

from probekit.errors import ProbekitError  # noqa: E402

MOST_SECONDS, MOST_BYTES = 10, 2**30
HANGS = 240  # seconds of the clock without a new input
CHUNK = 250
LINES = "command lines"
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
# Inputs of each target, in parts of --inputs (the first three kinds) and --folders.
SHARES = {
    "prompts.txt": 14, "prompts.jsonl": 12, "prompts.json": 2, "prompts.csv": 14, "prompts.parquet": 10,
    "prompts.arrow": 4, "manifest": 2, "parts": 1,
    "sampled parts": 0.5, "study": 0.2, "study tables": 0.2, "kept phases": 3, "costs": 2, "checksums": 6,
    "profile.json": 7, "profile.csv": 4,
    "drafter.parquet": 4, "log.json": 5, "log.jsonl": 5, "study.toml": 1,
}  # fmt: skip
FOLDERS = {"model folders": 80, "sharded folders": 20}
OTHERS = {"residuals": 500, "exit heads": 2000, "adapters": 200, "GGUF headers": 5000, "GGUF files": 100}


class TooLongError(BaseException):
    """More than MOST_SECONDS of processor time."""


def _stop(*_: Any) -> None:
    raise TooLongError


def counts(inputs: int, folders: int, command_lines: int, others: float) -> dict[str, int]:
    """{target: how many inputs}."""
    wanted = {name: -(-int(inputs * share) // int(sum(SHARES.values()))) + 1 for name, share in SHARES.items()}
    wanted |= {name: -(-folders * share // 100) for name, share in FOLDERS.items()}
    wanted |= {name: int(number * others) for name, number in OTHERS.items()}
    return {name: number for name, number in (wanted | {LINES: command_lines}).items() if number}


def one_input(name: str, number: int, seed: int, bases: dict[str, Path], place: Path) -> str:
    """Make and read one input. Returns "read" or "refused"; raises what is at fault."""
    random = Random(f"{seed}:{name}:{number}")
    if name == LINES:
        words = lines.make_line(random, lines.places(bases))
        os.chdir(place)
        return "refused" if lines.run_line(words) == 2 else "read"
    target = targets.TARGETS[name]
    base = bases[target.base] if target.base else place
    folder = targets.lay_out(target, target.change(random, base), bases, place / "input")
    try:
        target.read(folder)
    except ProbekitError:
        return "refused"
    return "read"


def work(name: str, first: int, last: int, seed: int, bases: dict[str, Path], at: Any, told: Any) -> None:
    """A worker process: inputs first..last-1. at: the input that it is at, and since when."""
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - libraries say things of their own
    signal.signal(signal.SIGPROF, _stop)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, size + MOST_BYTES))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: Counter[str] = Counter()
    faults, slowest = [], 0.0
    for number in range(first, last):
        at[0], at[1] = number, time.time()
        place = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="probekit-fuzz-"))
        (place / "input").mkdir()
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        try:
            found[one_input(name, number, seed, bases, place)] += 1
        except TooLongError:
            faults.append((number, f"took more than {MOST_SECONDS} s", "".join(traceback.format_exc()[-1500:])))
        except BaseException as error:
            faults.append((number, f"{type(error).__name__}: {str(error)[:300]}", traceback.format_exc()[-1500:]))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - began)
        os.chdir("/")
        shutil.rmtree(place, ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    told.send((dict(found), faults, slowest, grown))


def run_chunk(context: Any, name: str, first: int, last: int, seed: int, bases: dict[str, Path]) -> dict[str, Any]:
    """A chunk of inputs; a worker that dies or hangs is at fault, and the rest goes on in another."""
    made = {"read": 0, "refused": 0, "faults": [], "slowest_s": 0.0, "grown_bytes": 0}
    while first < last:
        at, (here, there) = context.Array("d", 2), context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(name, first, last, seed, bases, at, there))
        at[0], at[1] = first, time.time()
        worker.start()
        there.close()
        while worker.is_alive() and not here.poll(0.2) and time.time() - at[1] < HANGS:
            pass
        try:
            found, faults, slowest, grown = here.recv() if here.poll(1) else ({}, None, 0.0, 0)
        except EOFError:
            found, faults, slowest, grown = {}, None, 0.0, 0
        if faults is None:
            number = int(at[0])
            worker.kill()
            worker.join()
            what = f"ended its process ({worker.exitcode})" if time.time() - at[1] < HANGS else f"hung for {HANGS} s"
            faults = [(number, what, "")]
            if number > first:  # what it had read before is read again, and told this time
                again = run_chunk(context, name, first, number, seed, bases)
                for key in ("read", "refused", "faults", "grown_bytes"):
                    made[key] += again[key]
            first = number + 1
        else:
            first = last
        worker.join()
        made["read"] += found.get("read", 0)
        made["refused"] += found.get("refused", 0)
        made["faults"] += faults
        made["slowest_s"] = max(made["slowest_s"], slowest)
        made["grown_bytes"] = max(made["grown_bytes"], grown)
    return made


def keep_input(name: str, number: int, seed: int, bases: dict[str, Path], corpus: Path) -> None:
    """Put an input at fault into the corpus."""
    random = Random(f"{seed}:{name}:{number}")
    folder = corpus / name.replace(" ", "_") / f"{seed}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    if name == LINES:
        words = [word.replace(str(path), f"<{base}>") for word in lines.make_line(random, lines.places(bases))
                 for base, path in [next(((b, p) for b, p in bases.items() if word.startswith(str(p))), ("",
                 Path("/-")))]]  # fmt: skip
        (folder / "words.json").write_text(json.dumps(words))
        return
    target = targets.TARGETS[name]
    for each, content in target.change(random, bases.get(target.base or "", folder)).items():
        path = folder / each
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.with_name(f"{path.name}.{content}").write_bytes(b"")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="in text, JSON and Parquet, together")
    parser.add_argument("--lines", type=int, default=10_000, help="command lines")
    parser.add_argument("--folders", type=int, default=1_000, help="model folders")
    parser.add_argument("--others", type=float, default=1.0, help="of safetensors, GGUF, adapters: share of the usual")
    parser.add_argument("--only", help="one target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep what --output has counted with this seed")
    parser.add_argument("--keep", type=Path, help="folder that receives the inputs at fault")
    parser.add_argument("--show", type=int, help="with --only: run this one input here, with its traceback")
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    asked = parser.parse_args()
    wanted = counts(asked.inputs, asked.folders, asked.lines, asked.others)
    if asked.only and not asked.resume:
        wanted = {asked.only: wanted.get(asked.only, 0)}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="probekit-fuzz-") as folder:
        bases = targets.make_bases(Path(folder))
        bases["files"] = Path(folder) / "files"
        lines.make_files(bases["files"])
        if asked.show is not None:
            place = Path(folder) / "shown"
            (place / "input").mkdir(parents=True)
            if asked.only == LINES:
                print(lines.make_line(Random(f"{asked.seed}:{LINES}:{asked.show}"), lines.places(bases)))
            print(one_input(asked.only, asked.show, asked.seed, bases, place))
            return
        results = run_all(asked, wanted, bases)
        sys.exit(1 if report(asked, results) else 0)


def run_all(asked: Any, wanted: dict[str, int], bases: dict[str, Path]) -> dict[str, dict[str, Any]]:
    from concurrent.futures import ThreadPoolExecutor

    warm_up(bases)
    kept = counted(asked, wanted) if asked.resume else {}
    context = multiprocessing.get_context("fork")
    chunks = [
        (name, first, min(first + CHUNK, number))
        for name, number in wanted.items()
        if name not in kept and (not asked.only or name == asked.only)
        for first in range(0, number, CHUNK)
    ]
    results: dict[str, dict[str, Any]] = {
        name: kept.get(name) or {"inputs": 0, "read": 0, "refused": 0, "slowest_s": 0.0, "grown_bytes": 0, "faults": []}
        for name in wanted
    }
    with ThreadPoolExecutor(asked.workers) as pool:
        jobs = [pool.submit(run_chunk, context, *chunk, asked.seed, bases) for chunk in chunks]
        for (name, first, last), job in zip(chunks, jobs, strict=True):
            made, of = job.result(), results[name]
            of["inputs"] += last - first
            for key in ("read", "refused", "faults"):
                of[key] += made[key]
            for key in ("slowest_s", "grown_bytes"):
                of[key] = max(of[key], made[key])
            for number, what, where in made["faults"]:
                print(f"{name} {number}: {what}\n{where}", flush=True)
                if asked.keep:
                    with suppress(Exception):
                        keep_input(name, number, asked.seed, bases, asked.keep)
            if last == wanted[name]:
                print(
                    f"{name}: {of['inputs']:,} inputs, {len(of['faults'])} faults, slowest {of['slowest_s']:.2f} s",
                    flush=True,
                )
                report(asked, results)  # a run that is ended keeps what it has counted
    return results


def counted(asked: Any, wanted: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What an earlier run with this seed counted: targets without a fault; with --only, all but that one."""
    if asked.output is None or not asked.output.is_file():
        return {}
    before, kept = json.loads(asked.output.read_text()), {}
    for name, result in before["targets"].items():
        whole = before["seed"] == asked.seed and result["inputs"] >= wanted.get(name, 2**60)
        if whole and name != asked.only and (asked.only or not result["faults"]):
            said = result["first_faults"] + ["(said then)"] * (result["faults"] - len(result["first_faults"]))
            kept[name] = {**result, "faults": [(0, what, "") for what in said]}
    return kept


def warm_up(bases: dict[str, Path]) -> None:
    """Import what the workers need, so that each fork has it."""
    for name, target in targets.TARGETS.items():
        with tempfile.TemporaryDirectory(dir=SCRATCH) as place, suppress(Exception):
            changed = target.change(Random(f"{name}"), bases.get(target.base or "", Path(place)))
            target.read(targets.lay_out(target, {} if target.base else changed, bases, Path(place)))
    with suppress(Exception):
        lines.run_line(["choose", str(bases["residuals"]), "--costs", "roofline", "--device", "h100"])


def report(asked: Any, results: dict[str, dict[str, Any]]) -> int:
    """Write what was found so far; the number of faults."""
    kinds: Counter[str] = Counter()
    for name, result in results.items():
        kinds[LINES if name == LINES else targets.TARGETS[name].kind] += result["inputs"]
    faults = sum(len(result["faults"]) for result in results.values())
    document = {
        "schema": "probekit/fuzz/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": asked.seed,
        "limits": {"processor_s": MOST_SECONDS, "bytes": MOST_BYTES},
        "machine": {"system": platform.system(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("probekit", "torch", "transformers", "pyarrow", "pandas",
        "pydantic")},
        "inputs": dict(kinds),
        "text_json_parquet": sum(kinds[kind] for kind in ("text", "JSON", "Parquet")),
        "faults": faults,
        "targets": {
            name: {**{key: result[key] for key in ("inputs", "read", "refused", "slowest_s", "grown_bytes")},
                   "faults": len(result["faults"]), "first_faults": [what for _, what, _ in result["faults"][:5]]}
            for name, result in results.items()
        },
    }  # fmt: skip
    print(", ".join(f"{number:,} {kind}" for kind, number in kinds.items()), f"inputs: {faults} faults", flush=True)
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(document, indent=1) + "\n")
    return faults


if __name__ == "__main__":
    main()
