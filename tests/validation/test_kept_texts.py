"""A validation that is killed goes on where it was: nothing is decoded twice, and the result is that of one."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli.processes import Command
from tracing.jobs import TEXTS, job
from validation.test_shared_cells import TIMED

import probekit
from probekit.decoding.sampling import Sampling
from probekit.errors import Remark
from probekit.files import append_line
from probekit.models.synthetic import synthetic
from probekit.ranks import Ranks
from probekit.validation import kept_texts
from probekit.validation.run import validate

CELLS = {"exit_layers": [1, 3, 4], "draft_lengths": [1, 3]}


def dying(ranks: Ranks, folder: Path, settings: dict[str, Any]) -> None:
    """A validation with a folder beside the run; the rank that `dies` names is killed after its second prompt."""
    told, dies = [], settings.pop("dies", None)
    ranks = replace(ranks, in_step=settings.get("in_step", False))

    def append(path: Path, line: str) -> None:
        append_line(path, line)
        told.append(line)
        if dies == ranks.rank and len(told) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    kept_texts.append_line = append
    loaded = synthetic("tiny", seed=1)
    found = validate(loaded, folder, **CELLS, keep=folder.with_name("kept"), ranks=ranks).to_json()["cells"]
    cells = [{name: value for name, value in cell.items() if name not in TIMED} for cell in found]
    folder.with_suffix(f".cells-{ranks.rank}").write_text(json.dumps(cells))
    folder.with_suffix(f".lines-{ranks.rank}").write_text(str(sum('"made"' in line for line in told)))


@pytest.mark.parametrize(
    ("sampling", "first", "again"),
    [(Sampling(), 1, 1), (Sampling(), 2, 1), pytest.param(Sampling(0.8, seed=3), 2, 3, marks=pytest.mark.second)],
    ids=["alone", "one of two", "sampled, one of two, then three"],
)
def test_what_was_decoded_before_a_kill_is_not_decoded_again(sampling, first, again, tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    probekit.trace(tiny, TEXTS[:4], folder, max_new_tokens=8, sampling=sampling)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert job(first, folder, {"dies": first - 1}, work=dying)[-1] == -9
    kept = [json.loads(line) for path in (tmp_path / "kept").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(kept) >= 2
    assert job(again, folder, {}, work=dying) == [0] * again
    found = json.loads(folder.with_suffix(".cells-0").read_text())
    lines = sum(int(folder.with_suffix(f".lines-{rank}").read_text()) for rank in range(again))
    assert lines < 4 * again  # prompts: some were whole
    if again == 1:
        assert lines == 4 - (2 if first == 1 else min(len(each) for each in _prompts(kept)))
    alone = validate(tiny, folder, **CELLS).to_json()["cells"]
    plain = [{name: value for name, value in cell.items() if name not in TIMED} for cell in alone]
    if sampling.greedy:
        assert found == plain
    else:
        assert [cell["predicted"] for cell in found] == [cell["predicted"] for cell in plain]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.second
def test_processes_in_step_go_on_together_and_the_first_alone_keeps(tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    probekit.trace(tiny, TEXTS[:4], folder, max_new_tokens=8)
    assert job(2, folder, {"in_step": True, "dies": 0}, work=dying)[0] == -9
    assert job(2, folder, {"in_step": True}, work=dying) == [0, 0]
    assert [folder.with_suffix(f".lines-{rank}").read_text() for rank in range(2)] == ["2", "0"]
    first, second = (folder.with_suffix(f".cells-{rank}").read_text() for rank in range(2))
    assert first == second and len(json.loads(first)) == 6


def _prompts(kept: list[dict[str, Any]]) -> list[set[int]]:
    """The prompts that are kept of each cell."""
    cells: dict[str, set[int]] = {}
    for line in kept:
        for name in line["made"]["runs"]:
            cells.setdefault(name, set()).add(line["made"]["prompt"])
    return list(cells.values()) if len(cells) == 6 else [set()]


def test_damaged_lines_and_those_of_other_settings_are_decoded_again(tiny, tmp_path) -> None:
    run = probekit.trace(tiny, TEXTS[:2], max_new_tokens=6)
    keep = tmp_path / "kept"
    whole = validate(tiny, run, [(2, 2)], keep=keep)
    [path] = keep.glob("*.jsonl")
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    other = lines[0].replace('"tokens": [', '"tokens": [7, ')
    path.write_text(f"{other}\n{lines[1][:50]}")
    with pytest.warns(Remark, match="2 lines of .* are damaged or half written"):
        again = validate(tiny, run, [(2, 2)], keep=keep)
    assert again.cells[0].measured == whole.cells[0].measured
    assert len(path.read_text().splitlines()) == 4  # the half line is ended
    validate(tiny, run, [(2, 3)], keep=keep)
    with pytest.warns(Remark, match="damaged"):
        validate(tiny, run, [(2, 3)], keep=keep, repeats=2)
    (tmp_path / "file").write_text("")
    with pytest.warns(Remark, match="nothing of this validation is kept"):
        assert validate(tiny, run, [(2, 2)], keep=tmp_path / "file").holds


@pytest.mark.parametrize(
    ("command", "settings", "found", "count"),
    [
        ("validate", ["--exit-layers", "2,3", "--draft-lengths", "2"], "cells", 2),
        pytest.param(
            "rank",
            ["--exit-layers", "2", "--draft-lengths", "2", "--validate", "2"],
            "validated",
            2,
            marks=pytest.mark.second,
        ),
    ],
)
def test_a_command_that_was_ended_goes_on_and_leaves_the_run_as_it_was(
    tmp_path, command, settings, found, count
) -> None:
    run = tmp_path / "run"
    probekit.trace("tales-layerskip", TEXTS[:4], run, max_new_tokens=8)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    words = [command, run, *settings, "--json"]
    assert Command(tmp_path, *words, before=_dying).ended()[0] == -signal.SIGKILL
    [line] = next((run / "validation").glob("*/decoded-00000.jsonl")).read_text().splitlines()
    assert probekit.verify(run).whole
    status, printed, said = Command(tmp_path, *words).ended()
    assert status == 0, said
    assert len(json.loads(printed)[found]) == count and json.loads(line)["made"]["prompt"] == 0
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def _dying() -> None:
    """The process is killed as soon as one text is kept."""
    from probekit.validation import kept_texts as room

    write = room.append_line
    room.append_line = lambda *line: (write(*line), os.kill(os.getpid(), signal.SIGKILL))
