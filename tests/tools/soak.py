"""Memory and bits over a long time: `python tests/tools/soak.py -o docs/results/trust/soak.json`.

- decodes: 1,000 of every method on one bundled model; traces: 200, of all settings. What the process holds after the
  first tenth is held against what it holds at the end: memory, open files, threads, hooks on the model.
- tokens: one million of given text, traced by one command into one run.
- prompts: a run of 10^5 prompts, opened, predicted and verified by commands of their own.
- study: the same one twice; and once more with the first one's costs, where everything but times is to be equal.

Each part is a process of its own. A part that leaks, differs or fails is at fault, and the status is 1.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parents[1].resolve()
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import pandas as pd  # noqa: E402
import psutil  # noqa: E402

import probekit  # noqa: E402

MODEL = "tales-layerskip"
LEAK = 48 * 2**20  # bytes that may be held more at the end than after the first tenth: allocators round and keep
WORDS = "once upon a time there was king who had three sons and the youngest went into the forest".split()  # noqa: SIM905


def held() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def open_things() -> dict[str, int]:
    process = psutil.Process()
    return {"files": process.num_fds(), "threads": process.num_threads()}


def hooks_of(model: Any) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(part, name)) + ("forward" in vars(part)) for part in model.modules() for name in names)


def soaked(number: int, work: Callable[[int], None], model: Any) -> dict[str, Any]:
    """Do `work` so many times; what the process holds at the tenth and at the end."""
    after_a_tenth, things, hooks = 0, {}, hooks_of(model)
    for turn in range(number):
        work(turn)
        if turn + 1 == max(1, number // 10):
            after_a_tenth, things = held(), open_things()
    found = {"done": number, "grown_bytes": held() - after_a_tenth, "before": things, "after": open_things()}
    more = found["after"]["files"] > things["files"] or found["after"]["threads"] > things["threads"]
    return found | {"holds": found["grown_bytes"] < LEAK and not more and hooks_of(model) == hooks}


def decodes(number: int, folder: Path) -> dict[str, Any]:
    loaded, second = probekit.load(MODEL, device="cpu"), probekit.load("tales-draft", device="cpu")
    methods: list[dict[str, Any]] = [
        {}, {"exit_layer": 3, "draft_length": 3}, {"draft_model": second, "draft_length": 2},
        {"drafter": "ngram:2", "draft_length": 4}, {"drafter": "tree:2x1", "exit_layer": 2, "draft_length": 2},
        {"method": "early-exit", "exit_layer": 6},
    ]  # fmt: skip

    def one(turn: int) -> None:
        how = probekit.Sampling(temperature=0.8 if turn % 2 else 0.0, seed=turn)
        settings = methods[turn % len(methods)]
        if "tree" in str(settings.get("drafter")):
            how = probekit.Sampling()
        probekit.decode(loaded, " ".join(WORDS[turn % 9 : turn % 9 + 5]), max_new_tokens=16, sampling=how, **settings)

    return soaked(number, one, loaded.model)


def traces(number: int, folder: Path) -> dict[str, Any]:
    loaded, second = probekit.load(MODEL, device="cpu"), probekit.load("tales-draft", device="cpu")
    kinds: list[dict[str, Any]] = [
        {}, {"statistics": "agreement"}, {"sampling": probekit.Sampling(temperature=1.0, seed=3)},
        {"keep_residuals": [3, 6]}, {"draft_model": second},
    ]  # fmt: skip

    def one(turn: int) -> None:
        place = folder / str(turn)
        texts = [" ".join(WORDS[:5]), " ".join(WORDS[3 : 4 + turn % 9])]
        probekit.predict(probekit.trace(loaded, texts, place, max_new_tokens=8, **kinds[turn % len(kinds)]))
        shutil.rmtree(place)

    return soaked(number, one, loaded.model)


@contextmanager
def watched(process: psutil.Process, seconds: float = 0.25) -> Iterator[list[int]]:
    """The memory that a process holds, asked for again and again."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            try:
                seen.append(process.memory_info().rss)
            except psutil.Error:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def command(*words: object) -> dict[str, Any]:
    """One command, a process of its own: its status, seconds, and the memory it held, by quarters of its time."""
    line = [sys.executable, "-m", "probekit", *map(str, words), "--quiet"]
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=said, env={**os.environ, "PYTHONPATH": str(TESTS.parent)}
        )
        with watched(psutil.Process(child.pid)) as seen:
            status = child.wait()
        said.seek(0)
        error = said.read().decode(errors="replace")[-500:]
    quarter = max(1, len(seen) // 4)
    peaks = [max(seen[start : start + quarter], default=0) for start in range(0, 4 * quarter, quarter)]
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "peak_bytes": max(seen, default=0),
            "peaks_by_quarter": peaks, "error": error if status else ""}  # fmt: skip


def given_texts(path: Path, prompts: int, tokens: int) -> int:
    """Random words, as a Parquet file that is streamed; the number of tokens that are scored."""
    loaded, random = probekit.load(MODEL, device="cpu"), Random(7)
    sentences = [" ".join(random.choices(WORDS, k=tokens)) for _ in range(200)]
    lengths = [len(loaded.tokenizer(text)["input_ids"]) - 1 for text in sentences]
    chosen = [random.randrange(len(sentences)) for _ in range(prompts)]
    pd.DataFrame({"prompt": [sentences[place] for place in chosen]}).to_parquet(path, row_group_size=1000)
    return sum(lengths[place] for place in chosen)


def tokens(number: int, folder: Path) -> dict[str, Any]:
    total = given_texts(folder / "texts.parquet", -(-number // 180), 190)  # some 190 tokens each
    found = command("trace", MODEL, "--prompts", folder / "texts.parquet", "--given",
                    "--max-new-tokens", 480, "-o", folder / "run")  # fmt: skip
    first, last = found["peaks_by_quarter"][1], found["peaks_by_quarter"][3]
    return found | {"tokens": total, "grown_bytes": last - first,
                    "holds": found["status"] == 0 and total >= number and last - first < 8 * LEAK}  # fmt: skip


def prompts(number: int, folder: Path) -> dict[str, Any]:
    total = given_texts(folder / "texts.parquet", number, 4)
    found = {"prompts": number, "tokens": total}
    found["trace"] = command("trace", MODEL, "--prompts", folder / "texts.parquet", "--given",
                             "--max-new-tokens", 16, "--batch-size", 256, "-o", folder / "run")  # fmt: skip
    found["predict"] = command("predict", folder / "run", "--exit-layers", "2,4", "--draft-lengths", "1-4")
    found["verify"] = command("verify", folder / "run")
    return found | {"holds": all(found[name]["status"] == 0 for name in ("trace", "predict", "verify"))}


def tables_of(study: Path) -> dict[str, str]:
    """A digest of each table, without the columns that hold times."""
    timed = ("speedup", "seconds", "_s", "per_s")
    found = {}
    for path in sorted((study / "tables").glob("*.csv")):
        table = pd.read_csv(path)
        kept = [name for name in table if not any(word in name for word in timed)]
        found[path.name] = hashlib.sha256(table[kept].to_csv(index=False).encode()).hexdigest()
    return found


def shared_rounds(*studies: Path) -> tuple[int, bool]:
    """The cells that each study validated (which ones hangs on measured times), and whether all their rounds agree."""
    cell = ["model", "exit_layer", "draft_length", "drafter"]
    rounds = [pd.read_csv(study / "tables" / "rounds.csv").set_index(cell).sort_index() for study in studies]
    both = rounds[0].index.unique().intersection(rounds[1].index.unique())
    one, other = (each.loc[each.index.isin(both)].sort_values(["prompt", "round"], kind="stable") for each in rounds)
    return len(both), one.equals(other)


def study(number: int, folder: Path) -> dict[str, Any]:
    texts = folder / "prompts.txt"
    texts.write_text("".join(" ".join(WORDS[place : place + 5]) + "\n" for place in range(8)))
    words = ["study", MODEL, "--prompts", texts, "--max-new-tokens", 24, "--exit-layers", "2,3,4",
             "--draft-lengths", "1-3"]  # fmt: skip
    statuses = [command(*words, "-o", folder / name)["status"] for name in ("first", "second")]
    shutil.copytree(folder / "first", folder / "third")
    for kept in ("tables", "traces", "figures", "report.html", "summary.json", "SHA256SUMS"):
        place = folder / "third" / kept
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    for place in (folder / "third" / "phases").glob("*/*.json"):
        if place.name not in ("costs.json", "threads.json"):
            place.unlink()
    statuses.append(command(*words, "-o", folder / "third")["status"])
    first, second, third = (tables_of(folder / name) for name in ("first", "second", "third"))
    chosen = [
        json.loads((folder / name / "summary.json").read_text())["models"][0]["choice"] for name in ("first", "third")
    ]
    unlike = [
        name
        for name in first
        if first[name] != second.get(name) and name not in ("costs.csv", "validation.csv", "ways.csv", "rounds.csv")
    ]
    validated, alike = shared_rounds(folder / "first", folder / "second")
    same_costs = [name for name in first if first[name] != third.get(name) and name != "validation.csv"]
    return {
        "statuses": statuses, "tables": len(first), "unlike": unlike, "unlike_with_one_cost_profile": same_costs,
        "choice_with_one_cost_profile": "equal" if chosen[0] == chosen[1] else "unlike",
        "cells_that_both_validated": validated, "their_rounds": "equal" if alike else "unlike",
        "holds": validated > 0 and alike and not any(statuses) and not unlike and not same_costs
        and chosen[0] == chosen[1],
    }  # fmt: skip


PARTS: dict[str, tuple[Callable[[int, Path], dict[str, Any]], int]] = {
    "decodes": (decodes, 1000), "traces": (traces, 200), "tokens": (tokens, 10**6), "prompts": (prompts, 10**5),
    "study": (study, 2),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of every number")
    parser.add_argument("-o", "--output", type=Path, help="JSON; parts that are not run again are kept in it")
    asked = parser.parse_args()
    before = json.loads(asked.output.read_text()) if asked.output and asked.output.is_file() else {}
    found: dict[str, Any] = before.get("parts", {})
    for name in asked.only:
        work, number = PARTS[name]
        with tempfile.TemporaryDirectory(prefix="probekit-soak-") as folder:
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # no part's memory in another's
                began = time.monotonic()
                found[name] = pool.apply(work, (max(1, int(number * asked.share)), Path(folder)))
        found[name]["took_s"] = round(time.monotonic() - began, 1)
        print(name, "holds" if found[name]["holds"] else "DOES NOT HOLD", json.dumps(found[name]), flush=True)
        if asked.output:
            write(asked.output, found)
    sys.exit(0 if all(each["holds"] for each in found.values()) else 1)


def write(path: Path, found: dict[str, Any]) -> None:
    document = {
        "schema": "probekit/soak/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.system(), "processor": platform.machine(), "python": platform.python_version(),
                    "memory_bytes": psutil.virtual_memory().total},
        "model": MODEL, "dtype": "float32", "device": "cpu", "threads": 1,
        "versions": {name: version(name) for name in ("probekit", "torch", "transformers", "pyarrow", "pandas")},
        "parts": found,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
