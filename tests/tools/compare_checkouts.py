"""Run the same commands in two checkouts and hold what they print and write against each other, byte for byte.

    python tests/tools/compare_checkouts.py OLD NEW

For a change that must not change behaviour: JSON documents, traces and tables of fixed-seed runs. What may differ is
named in `MAY_DIFFER` (times, dates, versions) and in `RENAMED`; a row is printed for each document, and the exit
status is 1 where one differs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

MAY_DIFFER = re.compile(
    r"(^|_)(seconds|s|timings|created|versions|path|reference|machine|interval_seconds|speedup_measured.*|"
    r"speedup_predicted|near_ties_s|run|prompts_source)$"
)
RENAMED: dict[str, str] = {}

RUNS = {
    "greedy": ["tales-layerskip", "--max-new-tokens", "24", "--draft-model", "tales-draft"],
    "tied": ["tales-tied", "--max-new-tokens", "24"],
    "sampled": ["tales-tied", "--max-new-tokens", "24", "--temperature", "0.7", "--top-p", "0.9", "--seed", "3"],
    "agreement": ["tales-untied", "--max-new-tokens", "24", "--statistics", "agreement"],
    "vocabulary": ["tales-layerskip", "--max-new-tokens", "24", "--draft-vocabulary", "RUN/greedy"],
    "heads": ["tales-layerskip", "--max-new-tokens", "24", "--exit-heads", "RUN/heads.safetensors",
              "--keep-residuals", "2,12"],
}  # fmt: skip
BEFORE = {"heads": ["fit-heads", "RUN/greedy", "-o", "RUN/heads.safetensors", "--json"]}
COMMANDS = {
    "models": ["models"],
    "inspect": ["inspect", "tales-tied"],
    "lens": ["lens", "tales-layerskip", "Once upon a time there lived a king", "--max-new-tokens", "6"],
    "decode": ["decode", "tales-layerskip", "Once upon a time", "--method", "self-speculative", "--exit-layer", "3",
               "--draft-length", "3", "--max-new-tokens", "32"],
    "decode sampled": ["decode", "tales-tied", "Once upon a time", "--temperature", "0.8", "--seed", "2",
                       "--max-new-tokens", "32"],
    "decode two models": ["decode", "tales-layerskip", "Once upon a time", "--method", "speculative",
                          "--draft-model", "tales-draft", "--draft-length", "3", "--max-new-tokens", "32"],
    "decode heads": ["decode", "tales-layerskip", "Once upon a time", "--method", "self-speculative", "--exit-layer",
                     "3", "--draft-length", "3", "--max-new-tokens", "32", "--exit-heads", "RUN/heads.safetensors"],
    "decode rows": ["decode", "tales-layerskip", "Once upon a time", "--method", "self-speculative", "--exit-layer",
                    "3", "--draft-length", "3", "--max-new-tokens", "32", "--draft-vocabulary", "RUN/greedy",
                    "--draft-rows", "512"],
    "early exit": ["decode", "tales-layerskip", "Once upon a time", "--method", "early-exit", "--exit-layer", "3",
                   "--max-new-tokens", "32"],
    **{f"predict {run}": ["predict", f"RUN/{run}", "--rounds"] for run in RUNS},
    "predict draft": ["predict", "RUN/greedy", "--rounds", "--first-round", "draft"],
    "predict rows": ["predict", "RUN/vocabulary", "--draft-rows", "512"],
    "choose greedy": ["choose", "RUN/greedy", "--costs", "roofline", "--device", "h100", "--context", "512"],
    "choose sampled": ["choose", "RUN/sampled", "--costs", "roofline", "--device", "h200"],
    "choose heads": ["choose", "RUN/heads", "--costs", "roofline", "--device", "a100"],
    "choose rows": ["choose", "RUN/vocabulary", "--costs", "roofline", "--device", "h100", "--draft-rows", "512"],
    "validate": ["validate", "RUN/greedy", "--exit-layers", "2,6", "--draft-lengths", "2,4", "--limit", "3"],
    "validate all": ["validate", "RUN/greedy", "--limit", "1", "--draft-lengths", "3"],
    "validate heads": ["validate", "RUN/heads", "--exit-layers", "3", "--draft-lengths", "3", "--limit", "2"],
    "validate rows": ["validate", "RUN/vocabulary", "--exit-layers", "3", "--draft-lengths", "3", "--limit", "2",
                      "--draft-rows", "512"],
    "compare": ["compare", "RUN/tied", "RUN/greedy"],
    "bad exit": ["predict", "RUN/greedy", "--exit-layers", "99"],
    "bad model": ["inspect", "no-such-model"],
}  # fmt: skip


def run(checkout: Path, folder: Path, words: list[str]) -> tuple[int, str, str]:
    """Status, standard output and standard error of one command line."""
    code = "import sys; from probekit.cli import main; main(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [word.replace("RUN", str(folder)) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, cwd=folder
    )
    return done.returncode, done.stdout.replace(str(folder), "RUN"), done.stderr.replace(str(folder), "RUN")


def everything(checkout: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, content) of every document of one checkout."""
    for name, words in RUNS.items():
        if name in BEFORE:
            yield name + " before", _parsed(run(checkout, folder, BEFORE[name]))
        yield f"trace {name}", _parsed(run(checkout, folder, ["trace", *words, "-o", f"RUN/{name}", "--json"]))
        for path in sorted((folder / name).iterdir()):
            if path.suffix == ".parquet":
                yield f"{name}/{path.name}", pd.read_parquet(path)
            elif path.suffix == ".safetensors":
                yield f"{name}/{path.name}", path.read_bytes()
            else:
                text = path.read_text(encoding="utf-8").replace(str(folder), "RUN")
                yield f"{name}/{path.name}", _without(json.loads(text))
    for name, words in COMMANDS.items():
        yield name, _parsed(run(checkout, folder, [*words, "--json"]))
        status, out, err = run(checkout, folder, [*words, "--quiet"])
        if not name.startswith(("decode", "early", "validate", "inspect", "models")):  # those print times and paths
            yield f"{name}, as text", (status, out, err)


def _parsed(done: tuple[int, str, str]) -> tuple[int, Any, str]:
    status, out, err = done
    return status, _without(json.loads(out)), err


def _without(value: Any) -> Any:
    """A document without what may differ."""
    if isinstance(value, dict):
        return {RENAMED.get(key, key): _without(part) for key, part in value.items() if not MAY_DIFFER.search(key)}
    return [_without(part) for part in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    if isinstance(one, pd.DataFrame):
        return isinstance(other, pd.DataFrame) and one.equals(other) and (one.dtypes == other.dtypes).all()
    return json.dumps(one) == json.dumps(other) if not isinstance(one, bytes) else one == other


def main(old: str, new: str) -> int:
    differing = 0
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        pairs = zip(
            everything(Path(old).resolve(), Path(before)), everything(Path(new).resolve(), Path(after)), strict=True
        )
        for (name, one), (other_name, other) in pairs:
            equal = name == other_name and same(one, other)
            differing += not equal
            print("equal    " if equal else "DIFFERENT", name, flush=True)
            if not equal and not isinstance(one, bytes):
                print("   old:", str(one)[:1500], "\n   new:", str(other)[:1500])
    print(f"{differing} differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
