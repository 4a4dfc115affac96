"""Several processes share the cells of a validation: the counts, rounds and ties of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tracing.jobs import TEXTS, job

import probekit
from probekit.decoding.sampling import Sampling
from probekit.errors import InputError
from probekit.models.synthetic import synthetic
from probekit.ranks import Ranks
from probekit.traces.trace import Trace
from probekit.validation.run import validate

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
    for rank in range(size):
        assert json.loads(folder.with_suffix(f".cells-{rank}").read_text()) == alone


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
