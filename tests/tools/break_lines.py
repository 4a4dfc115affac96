"""Break chosen lines of probekit one at a time, and see whether the fast tests notice.

    python tests/tools/break_lines.py [-o FILE.json] [--only WORD] [--table FILE.csv]

Each row of `breaks.csv` names a line, what it becomes, what that breaks, and the tests of the rooms that should see it.
Their fast part is run first, and all fast tests where it sees nothing. The tree is copied; the checkout is never
touched. A row whose text is not in its file exactly once is an error: the table is to follow the code.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TABLE = Path(__file__).parent / "breaks.csv"
MOST_MISSED = 2
SECONDS = 900  # a break that loops for ever counts as noticed


def rows(path: Path = TABLE) -> list[dict[str, str]]:
    """The table, each row checked against the tree."""
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        found = (ROOT / row["file"]).read_text(encoding="utf-8").count(row["old"])
        if found != 1:
            raise SystemExit(f"{row['file']} holds {row['old']!r} {found} times; expected once.")
    return table


def noticed(copy: Path, tests: list[str], marks: tuple[str, ...] = ()) -> str:
    """How these tests notice a break in the copy: "a failed test", "no import", "no end"; empty: they do not."""
    environment = os.environ | {"PYTHONPATH": f"{copy}:{copy / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *marks, *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode == 0:
        return ""
    if "failed" in done.stdout.splitlines()[-1] or "FAILED" in done.stdout:
        return "a failed test"
    if "error" in done.stdout.lower():
        return "no import"
    raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("-o", "--output", type=Path)
    options.add_argument("--only", default="", help="rows whose file holds this word")
    options.add_argument(
        "--table", type=Path, default=TABLE, help="breaks_gpu.csv: mistakes that only a GPU would show"
    )
    given = options.parse_args()
    marks = () if given.table == TABLE else ("-m", "not long")  # kernels and device rounds are of the second part
    found = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "probekit"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache"))
        table = [row for row in rows(given.table) if given.only in row["file"]]
        for tests in dict.fromkeys(row["tests"] for row in table):
            if how := noticed(copy, tests.split(), marks):
                raise SystemExit(f"{tests} do not pass before anything is broken: {how}.")
        for row in table:
            path, began = copy / row["file"], time.perf_counter()
            whole = path.read_text(encoding="utf-8")
            path.write_text(whole.replace(row["old"], row["new"]), encoding="utf-8")
            try:
                near = noticed(copy, row["tests"].split(), marks)
                how = near or noticed(copy, [])
            finally:
                path.write_text(whole, encoding="utf-8")
            seconds = round(time.perf_counter() - began, 1)
            where = "the tests of its rooms" if near else "other fast tests" if how else "nobody"
            verdict = f"caught ({how})" if how else "MISSED"
            print(f"{verdict} by {where}, {seconds} s: {row['file']}: {row['what it breaks']}", flush=True)
            kept = {key: row[key] for key in ("file", "old", "new", "what it breaks")}
            found.append(kept | {"noticed_by": where, "how": how})
    caught = sum(bool(each["how"]) for each in found)
    print(f"{caught} of {len(found)} caught")
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": "probekit/break-lines/1", "caught": caught, "of": len(found), "lines": found}
        given.output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(len(found) - caught > MOST_MISSED)


if __name__ == "__main__":
    sys.exit(main())
