"""The tools beside the tests stay in step with the code."""

from __future__ import annotations

import runpy
from pathlib import Path

TOOLS = Path(__file__).parent / "tools"


def test_every_line_to_break_is_there_once():
    rows = runpy.run_path(str(TOOLS / "break_lines.py"))["rows"]()
    assert len(rows) >= 40
    assert len({row["file"].split("/")[1] for row in rows}) >= 12, "from all rooms"
    for row in rows:
        assert row["old"] != row["new"] and row["what it breaks"]
        assert all((TOOLS.parent.parent / path).exists() for path in row["tests"].split())
