"""The tools beside the tests stay in step with the code."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent / "tools"


def test_every_mistake_that_only_a_gpu_would_show_is_there_once():
    found = runpy.run_path(str(TOOLS / "break_lines.py"))["rows"](TOOLS / "breaks_gpu.csv")
    assert {row["what it breaks"].partition(":")[0] for row in found} == {f"defect {n}" for n in range(1, 11)}
    tests = {test.partition("[")[0] for row in found for test in row["tests"].split()}
    for path, _, function in (test.partition("::") for test in tests):
        assert f"def {function}(" in (TOOLS.parent.parent / path).read_text(encoding="utf-8")


def test_every_line_to_break_is_there_once():
    rows = runpy.run_path(str(TOOLS / "break_lines.py"))["rows"]()
    assert len(rows) >= 40
    assert len({row["file"].split("/")[1] for row in rows}) >= 12, "from all rooms"
    for row in rows:
        assert row["old"] != row["new"] and row["what it breaks"]
        assert all((TOOLS.parent.parent / path).exists() for path in row["tests"].split())


def test_other_versions_are_those_that_the_package_allows():
    """The oldest pair is the floor of pyproject.toml; pytest's last line is read as it stands."""
    tool = runpy.run_path(str(TOOLS / "on_other_versions.py"))
    project = tomllib.loads((TOOLS.parent.parent / "pyproject.toml").read_text())["project"]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", each).groups() for each in project["dependencies"])
    for library, version in tool["PAIRS"]["oldest"].items():
        assert version == floors[library] or version.startswith(f"{floors[library]}.")
    line = "==== 3 failed, 1310 passed, 41 skipped, 577 deselected, 1 error in 567.25s (0:09:27) ===="
    assert tool["counts"](line) == {"passed": 1310, "failed": 3, "skipped": 41, "errors": 1}
    why = ["SKIPPED [7] tests/models/held_states.py:30: could not import 'peft'", "SKIPPED [1] tests/a.py: no GPU"]
    assert tool["skips"]([*why, why[0], line]) == {"could not import 'peft'": 14, "no GPU": 1}
    for words, status in ((["--help"], 0), (["odlest"], 2)):  # neither makes an environment
        with pytest.raises(SystemExit) as ended:
            tool["main"](words)
        assert ended.value.code == status
    assert tool["counts"]("no tests ran in 0.01s") == {"passed": 0, "failed": 0, "skipped": 0, "errors": 0}
