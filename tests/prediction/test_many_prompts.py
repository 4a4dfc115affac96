"""Predictions of more prompts than are read at once: piece by piece, the same table."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from traces.fabricate import fabricate

import probekit
from probekit.prediction import intervals
from probekit.prediction import predict as room
from probekit.prediction.intervals import bootstrap_ratio, draws, draws_in_blocks
from probekit.traces.storage import writing_run
from probekit.traces.trace import Trace


@pytest.mark.parametrize("text", ["greedy", "sampled", "given"])
def test_pieces_give_the_table_of_the_whole(text, tmp_path, monkeypatch) -> None:
    trace = fabricate(depth=5, prompts=13, tokens=18, text=text, drafter=True)
    batches = ((12, 0, 5), (1, 2), (3, 4, 6, 7), (8,), (11, 10, 9))
    trace = Trace.from_frames(
        trace.manifest.but(batches=batches), trace.texts, trace.tokens, trace.layers, drafter=trace.drafter
    )
    expected = probekit.predict(trace, draft_lengths=[1, 2, 5], drafter=True, with_rounds=True)
    folder = tmp_path / "run"
    trace.save(folder)
    pieces = Trace.pieces
    monkeypatch.setattr(Trace, "pieces", lambda self: pieces(self, most_cells=500))
    stored = Trace.open(folder)
    assert len(list(stored.pieces())) > 2
    found = probekit.predict(stored, draft_lengths=[1, 2, 5], drafter=True, with_rounds=True)
    assert close(found.to_json(), expected.to_json())
    monkeypatch.setattr(room, "_MANY", 2)  # in small types
    small = probekit.predict(stored, draft_lengths=[1, 2, 5], drafter=True, with_rounds=True)
    assert close(small.to_json(), expected.to_json())
    if text == "greedy":
        assert small.cells[0].rounds_by_drafted.dtype == np.int8
    assert stored.near_tie_count() == trace.near_tie_count()


def written(folder: Path, prompts: int, part: int = 200) -> Trace:
    """A run of so many prompts, a few texts again and again, in parts."""
    some = fabricate(depth=4, prompts=part, tokens=12)
    batches = tuple(tuple(range(first, first + part)) for first in range(0, prompts, part))
    with writing_run(folder, some.manifest.but(batches=batches)) as writer:
        for number in range(len(batches)):
            frames = {name: getattr(some, name) for name in ("texts", "tokens", "layers")}
            writer.write(
                number, {name: frame.assign(prompt=frame["prompt"] + number * part) for name, frame in frames.items()}
            )
    return Trace.open(folder)


@pytest.mark.second
def test_what_a_prompt_costs_is_bounded(tmp_path, monkeypatch) -> None:
    """More prompts take no more memory than their counts: in each cell a byte for each number of drafts and each place
    of a draft, and twelve for sums; and 200 beside them."""
    pieces = Trace.pieces
    monkeypatch.setattr(Trace, "pieces", lambda self: pieces(self, most_cells=60_000))
    for name, value in (("_CHUNK", 200_000), ("_MANY", 100)):  # so that what is held for a moment does not hide it
        monkeypatch.setattr(room, name, value)
    monkeypatch.setattr(intervals, "_BLOCK", 2**17)
    peaks, longest = [], 8
    for prompts in (2_000, 6_000):
        trace = written(tmp_path / str(prompts), prompts)
        tracemalloc.start()
        table = probekit.predict(trace)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(table.prompts) == prompts and table.cells[0].rounds_by_drafted.dtype == np.int8
    cells = len(table.cells)
    assert cells == 3 * longest
    assert peaks[1] - peaks[0] < 4_000 * (cells * (2 * longest + 2 + 12) + 200), peaks
    documents = [cell.to_json() for cell in table.cells]  # sums of small types are whole numbers, and right
    assert all(type(each["rounds"]) is int and each["tokens"] >= each["rounds"] for each in documents)


def close(one, other) -> bool:
    """The same documents, but for the last digits of sums in another order."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    return one == (pytest.approx(other, rel=1e-12) if isinstance(one, float) else other)


def test_draws_in_blocks_are_the_draws(monkeypatch) -> None:
    above, below = np.random.default_rng(2).integers(1, 9, size=(2, 3, 40))
    whole, interval = draws(40, 300, seed=5), bootstrap_ratio(above, below)
    monkeypatch.setattr(intervals, "_BLOCK", 777)
    assert len(list(draws_in_blocks(40, 300, seed=5))) == 16
    assert (np.concatenate(list(draws_in_blocks(40, 300, seed=5))) == whole).all()
    np.testing.assert_allclose(bootstrap_ratio(above, below), interval, rtol=1e-12)
