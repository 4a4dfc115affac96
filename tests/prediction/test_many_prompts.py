"""Predictions of more prompts than are read at once: piece by piece, the same table."""

from __future__ import annotations

import numpy as np
import pytest
from traces.fabricate import fabricate

import probekit
from probekit.prediction import intervals
from probekit.prediction import predict as room
from probekit.prediction.intervals import bootstrap_ratio, draws, draws_in_blocks
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
        assert small.cells[0].rounds_by_drafted.dtype == np.int16
    assert stored.near_tie_count() == trace.near_tie_count()


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
