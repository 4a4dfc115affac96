"""The tools beside the tests stay in step with the code."""

from __future__ import annotations

import runpy
from pathlib import Path

TOOLS = Path(__file__).parent / "tools"


def test_every_mistake_that_only_a_gpu_would_show_is_there_once():
    found = runpy.run_path(str(TOOLS / "break_lines.py"))["rows"](TOOLS / "breaks_gpu.csv")
    assert {row["what it breaks"].partition(":")[0] for row in found} == {f"defect {n}" for n in range(1, 9)}
    assert all((TOOLS.parent.parent / path).exists() for row in found for path in row["tests"].split())


def test_every_line_to_break_is_there_once():
    rows = runpy.run_path(str(TOOLS / "break_lines.py"))["rows"]()
    assert len(rows) >= 40
    assert len({row["file"].split("/")[1] for row in rows}) >= 12, "from all rooms"
    for row in rows:
        assert row["old"] != row["new"] and row["what it breaks"]
        assert all((TOOLS.parent.parent / path).exists() for path in row["tests"].split())
