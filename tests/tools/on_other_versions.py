"""The fast tests on the oldest and the newest torch and transformers that the package says it runs on.

    python tests/tools/on_other_versions.py                     # both, each in an environment of its own
    python tests/tools/on_other_versions.py oldest -- tests/hooks tests/tracing

Environments are made under build/versions, once, and kept. What follows `--` goes to pytest. At the end it prints, and
writes to docs/results/tests/versions.json, for each pair how many tests passed, failed and were skipped.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "versions"
RECORD = ROOT / "docs" / "results" / "tests" / "versions.json"
PAIRS = {
    "oldest": {"torch": "2.11.0", "transformers": "5.17.0"},
    "newest": {"torch": "2.13.0", "transformers": "5.23.0"},
}


def environment(name: str) -> Path:
    """The interpreter of an environment with these versions, made where there is none."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    pins = [f"{library}=={version}" for library, version in PAIRS[name].items()]
    marker = folder / ".made-with"
    if not (marker.is_file() and marker.read_text() == " ".join(pins)):
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *pins, "--editable", f"{ROOT}[test]"]
        subprocess.run(install, check=True)
        marker.write_text(" ".join(pins))
    return python


def tested(name: str, words: list[str]) -> dict[str, object]:
    """What became of the tests on one pair: its versions as they are there, and how many tests passed."""
    python = environment(name)
    lines = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    found = subprocess.run([str(python), "-c", lines], capture_output=True, text=True, check=True).stdout.split()
    ran = subprocess.run(
        [str(python), "-m", "pytest", "-q", *words], cwd=ROOT, text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines_said = ran.stdout.strip().splitlines()
    failed = sorted(line.split()[1] for line in lines_said if line.startswith(("FAILED ", "ERROR ")))
    return {
        "pair": name, "torch": found[-2], "transformers": found[-1], "status": ran.returncode,
        **counts(lines_said[-1] if lines_said else ""), "failures": failed,
    }  # fmt: skip


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
    asked, _, rest = " ".join(words).partition("--")
    names = asked.split() or list(PAIRS)
    results = []
    for name in names:
        results.append(tested(name, rest.split()))
        made = {key: value for key, value in results[-1].items() if key != "failures"}
        print(json.dumps(made), flush=True)
        for failure in results[-1]["failures"]:
            print(f"  {failure}", flush=True)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    tests = rest.split() or ["all fast ones"]
    results = [*_others(tests, names), *results]
    document = {
        "question": "Do these fast tests pass on the oldest and newest torch and transformers?",
        "tests": tests, "pairs": results,
        "machine": {"system": platform.platform(), "python": platform.python_version()},
    }  # fmt: skip
    RECORD.write_text(json.dumps(document, indent=1) + "\n")
    passed = sum(not result["status"] for result in results)
    print(f"versions passed: {passed} of {len(results)}")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
