"""The fast tests on the oldest and the newest torch and transformers that the package says it runs on, and on a GPU
machine's.

    python tests/tools/on_other_versions.py                     # all, each in an environment of its own
    python tests/tools/on_other_versions.py oldest gpu -- -n 0 tests/hooks tests/tracing

Environments are made under build/versions, once, and kept. What follows `--` goes to pytest. At the end it prints, and
writes to docs/results/tests/versions.json, for each how many tests passed, failed and were skipped, and why they were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "versions"
RECORD = ROOT / "docs" / "results" / "tests" / "versions.json"
PAIRS = {
    "oldest": {"torch": "2.11.0", "transformers": "5.17.0"},
    "newest": {"torch": "2.13.0", "transformers": "5.24.0"},
    "gpu": {"torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0"},
}
# A GPU machine's interpreter, and what is not installed there.
PYTHONS = {"gpu": "python3.12"}
WITHOUT = {"gpu": ("gguf", "nnsight")}
ALL = ["all fast ones"]


def environment(name: str) -> Path:
    """The interpreter of an environment with these versions, made where there is none."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    pins = [f"{library}=={version}" for library, version in PAIRS[name].items()]
    without = WITHOUT.get(name, ())
    made_with = " ".join([*pins, *(f"-{library}" for library in without)])
    marker = folder / ".made-with"
    if not (marker.is_file() and marker.read_text() == made_with):
        base = shutil.which(PYTHONS[name]) if name in PYTHONS else sys.executable
        if base is None or subprocess.run([base, "-c", ""], capture_output=True, check=False).returncode:
            raise SystemExit(f"{PYTHONS[name]} is not installed here.")
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *pins, "--editable", f"{ROOT}[test]"]
        subprocess.run(install, check=True)
        if without:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
        marker.write_text(made_with)
    return python


def tested(name: str, words: list[str]) -> dict[str, object]:
    """What became of the tests on one pair: its versions as they are there, and how many tests passed."""
    python = environment(name)
    lines = (
        "import platform, torch, transformers as t; print(platform.python_version(), torch.__version__, t.__version__)"
    )
    found = subprocess.run([str(python), "-c", lines], capture_output=True, text=True, check=True).stdout.split()
    ran = subprocess.run(
        [str(python), "-m", "pytest", "-q", *words], cwd=ROOT, text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines_said = ran.stdout.strip().splitlines()
    failed = sorted(line.split()[1] for line in lines_said if line.startswith(("FAILED ", "ERROR ")))
    return {
        "pair": name, "python": found[-3], "torch": found[-2], "transformers": found[-1],
        "without": list(WITHOUT.get(name, ())), "status": ran.returncode,
        **counts(lines_said[-1] if lines_said else ""), "failures": failed, "skips": skips(lines_said),
    }  # fmt: skip


def skips(lines: list[str]) -> dict[str, int]:
    """Why tests were skipped, as pytest's summary says it: {reason: how many}, most first."""
    reasons: Counter[str] = Counter()
    for line in lines:
        if found := re.match(r"SKIPPED \[(\d+)\] \S+: (.*)", line):
            reasons[found[2]] += int(found[1])
    return dict(reasons.most_common())


def counts(line: str) -> dict[str, int]:
    """How pytest's last line counts: {"passed", "failed", "skipped", "errors"}."""
    found = {word.rstrip("s"): int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", line)}
    names = {"passed": "passed", "failed": "failed", "skipped": "skipped", "error": "errors"}
    return {name: found.get(word, 0) for word, name in names.items()}


def _others(tests: list[str], names: list[str]) -> list[dict[str, object]]:
    """What the record has of the other pairs, where they went through the same tests."""
    known = json.loads(RECORD.read_text()) if RECORD.is_file() else {"tests": None}
    return [pair for pair in known["pairs"] if pair["pair"] not in names] if known["tests"] == tests else []


def main(words: list[str]) -> int:
    before = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", help=f"of {', '.join(PAIRS)}; all where none is named")
    names, given = parser.parse_args(words[:before]).pairs or list(PAIRS), words[before + 1 :]
    if unknown := [name for name in names if name not in PAIRS]:
        parser.error(f"{', '.join(unknown)}: no such pair; there are {', '.join(PAIRS)}.")
    tests = [word for word in given if (ROOT / word.split("::")[0]).exists()] or ALL
    results = []
    for name in names:
        environment(name)  # what cannot be made is said before hours of tests
    for name in names:
        results.append(tested(name, given))
        print(json.dumps({key: value for key, value in results[-1].items() if key != "failures"}), flush=True)
        for failure in results[-1]["failures"]:
            print(f"  {failure}", flush=True)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "question": "Do these fast tests pass on the oldest and newest torch and transformers, and on a GPU machine's?",
        "tests": tests,
        "pairs": sorted([*_others(tests, names), *results], key=lambda each: list(PAIRS).index(each["pair"])),
        "system": platform.platform(),
    }  # fmt: skip
    RECORD.write_text(json.dumps(document, indent=1) + "\n")
    passed = sum(not result["status"] for result in results)
    print(f"versions passed: {passed} of {len(results)}")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
