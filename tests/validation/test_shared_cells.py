"""Several processes share the cells of a validation: the counts, rounds and ties of one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tracing.jobs import TEXTS, job
from tracing.test_ranks import torchrun

import probekit
from probekit.choice.rank import rank
from probekit.costs.roofline import roofline_costs
from probekit.decoding.sampling import Sampling
from probekit.errors import InputError
from probekit.models.synthetic import synthetic
from probekit.ranks import Ranks
from probekit.traces.trace import Trace
from probekit.validation import ways as room
from probekit.validation.run import validate
from probekit.validation.ways import validate_ways

TIMED = ("speedup_predicted", "speedup_measured", "speedup_measured_quantiles", "speedup_measured_end_to_end")
CELLS = {"exit_layers": [1, 3, 4], "draft_lengths": [1, 3]}


def counts(ranks: Ranks, folder: Path, settings: dict[str, Any]) -> None:
    """What each process gets, without its times, as a file beside the run."""
    found = validate(synthetic("tiny", seed=1), folder, ranks=ranks, **settings).to_json()
    kept = [{name: value for name, value in cell.items() if name not in TIMED} for cell in found["cells"]]
    folder.with_suffix(f".cells-{ranks.rank}").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("size", "sampling"),
    [(2, Sampling()), pytest.param(4, Sampling(0.8, seed=3), marks=pytest.mark.second)],
    ids=["greedy", "sampled"],
)
def test_shared_cells_are_those_of_one_process(size, sampling, tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    probekit.trace(tiny, TEXTS[:3], folder, max_new_tokens=8, sampling=sampling)
    counts(Ranks(), folder, CELLS)
    alone = json.loads(folder.with_suffix(".cells-0").read_text())
    assert len(alone) == 6
    assert job(size, folder, CELLS, work=counts) == [0] * size
    for each in range(size):
        assert json.loads(folder.with_suffix(f".cells-{each}").read_text()) == alone


def ways(ranks: Ranks, folder: Path, settings: dict[str, Any]) -> None:
    """The same of ways of drafting, trees and policies among them."""
    loaded, trace = synthetic("tiny", seed=1), Trace.open(folder)
    costs = roofline_costs(trace, device="h100", dtype="bfloat16")
    run = [each.way for each in rank(trace, costs, [1, 3], [1, 3]).to_run() if each.way is not None]
    if settings.get("dies") == ranks.rank:  # when it has begun to decode
        room.decode_all = lambda *given, **more: os.kill(os.getpid(), signal.SIGKILL)
    found = validate_ways(loaded, trace, run, costs=costs, ranks=ranks)
    kept = [{name: value for name, value in each.to_json().items() if name not in TIMED[1:]} for each in found.ways]
    folder.with_suffix(f".cells-{ranks.rank}").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "sizes", [pytest.param((2,), id="two"), pytest.param((3, 4), id="three and four", marks=pytest.mark.second)]
)
def test_shared_ways_are_those_of_one_process(sizes, tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    probekit.trace(tiny, TEXTS[:4], folder, max_new_tokens=8)
    ways(Ranks(), folder, {})
    alone = json.loads(folder.with_suffix(".cells-0").read_text())
    assert len(alone) == 10
    assert {each["policy"] for each in alone} > {"fixed"}
    for size in sizes:
        assert job(size, folder, {}, work=ways) == [0] * size
        for each in range(size):
            assert json.loads(folder.with_suffix(f".cells-{each}").read_text()) == alone


@pytest.mark.second
def test_when_one_is_killed_the_others_say_so_and_the_run_is_as_it_was(tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    probekit.trace(tiny, TEXTS[:4], folder, max_new_tokens=8)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert job(2, folder, {"dies": 1}, work=ways) == [1, -9]
    said = folder.with_suffix(".said-0").read_text()
    assert "another process of this job ended before its work was done" in said and "Run the same command again" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert job(3, folder, {}, work=ways) == [0, 0, 0]


@pytest.mark.long
@pytest.mark.second
def test_commands_share_what_is_run_and_print_it_once(tmp_path) -> None:
    """Rankings by costs of this machine, which differ from run to run: who ran what does not show."""
    probekit.trace("tales-layerskip", TEXTS[:2], tmp_path / "run", max_new_tokens=8)
    few = ["--exit-layers", "2,3", "--draft-lengths", "1,3", "--device", "cpu", "--json"]
    for size, words, name in (
        (3, ["rank", str(tmp_path / "run"), "--costs", "roofline", "--validate", "3", *few], "validated"),
        (2, ["rank", str(tmp_path / "run"), "--costs", "roofline", *few], None),
        (2, ["validate", str(tmp_path / "run"), "--ways", *few], "ways"),
    ):
        ran = torchrun(size, *words)
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout)  # one document, not one a process
        if name is None:
            assert found["ways"] and "validated" not in found
            continue
        assert len(found[name]) >= 3
        assert all(each["rounds_equal"] and each["speedup_predicted"] > 0 for each in found[name])


@pytest.mark.second
def test_more_processes_than_cells_and_a_cell_that_is_not_there(tiny, tmp_path) -> None:
    folder = tmp_path / "run"
    probekit.trace(tiny, TEXTS[:2], folder, max_new_tokens=6)
    assert job(3, folder, {"cells": [(2, 2)]}, work=counts) == [0, 0, 0]
    assert len(json.loads(folder.with_suffix(".cells-2").read_text())) == 1
    assert job(2, folder, {"cells": [(9, 2)]}, work=counts) == [2, 2]
    assert folder.with_suffix(".said-0").read_text().startswith("InputError")
    assert folder.with_suffix(".said-1").read_text().startswith("ElsewhereError")
    with pytest.raises(InputError):
        validate(tiny, Trace.open(folder), [(9, 2)])
