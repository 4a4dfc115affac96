"""Small versions of what is counted at length: kills, two writers, full disks, exceptions at random points.

The counted ones are commands: `python tests/tools/kills.py`, `python tests/tools/interrupts.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tracing.jobs import ran

TOOLS = Path(__file__).parent / "tools"


def counted(*words: object) -> dict:
    """What a command writes; it must end with status 0."""
    script, *given = words
    program = f"import runpy, sys; sys.argv[0] = {str(script)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    assert ran(program, *given) == 0
    return json.loads(Path(words[-1]).read_text())


@pytest.mark.second
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_kills_two_writers_and_full_disks(tmp_path):
    found = counted(
        TOOLS / "kills.py", "--traces", "3", "--studies", "0", "--pairs", "1", "-o", tmp_path / "kills.json"
    )
    assert (found["traces"]["kills"], found["two_writers"]["pairs"], found["faults"]) == (3, 1, 0)
    assert set(found["full_disk"]["exit_statuses"]) == {"trace", "study", "export", "fit-heads", "lens --html"}


@pytest.mark.second
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_kills_of_a_study(tmp_path):
    found = counted(
        TOOLS / "kills.py",
        "--traces",
        "0",
        "--studies",
        "2",
        "--pairs",
        "0",
        "--no-disk",
        "-o",
        tmp_path / "kills.json",
    )
    assert (found["studies"]["kills"], found["faults"]) == (2, 0)


def test_exceptions_at_random_points(tmp_path):
    found = counted(TOOLS / "interrupts.py", "--exceptions", "12", "-o", tmp_path / "interrupts.json")
    assert (found["exceptions"], found["faults"]) == (12, [])
