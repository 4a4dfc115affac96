"""Run lengths and the geometric law: worked by hand, enumerated, and on independent agreements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces.fabricate import fabricate
from tying.toys import toy

from probekit.prediction.intervals import Estimate
from probekit.prediction.run_lengths import RunLengths, completed_runs, run_lengths


def runs_of_layer_1(texts: list[list[int]]) -> tuple[RunLengths, Estimate]:
    """texts: agreement of layer 1 at each position."""
    (found,) = run_lengths(toy([[[0] * len(text), text] for text in texts]), [1])
    return found, found.variance_ratio()


def test_run_lengths_by_hand(monkeypatch):
    trace = fabricate(depth=2, prompts=1, tokens=7)
    agrees = np.array([[0] * 7, [1, 1, 0, 0, 1, 0, 1], [1] * 7], dtype=bool)
    monkeypatch.setattr(type(trace), "agreement", lambda self, prompt: agrees)
    (found,) = run_lengths(trace)
    assert found.counts.tolist() == [1, 1, 1, 0, 0, 0, 0]  # two, none, one; the last was cut off by the end
    assert found.chance == 4 / 7


@pytest.mark.parametrize("chance", [0.3, 0.8])
def test_the_geometric_law_equals_enumeration(chance, monkeypatch):
    """Expected number of complete runs of each length, over all strings of 6 independent agreements."""
    expected = np.zeros(6)
    for bits in itertools.product([False, True], repeat=6):
        weight = np.prod([chance if bit else 1 - chance for bit in bits])
        breaks = [-1, *np.flatnonzero(~np.array(bits))]
        for before, here in itertools.pairwise(breaks):
            expected[here - before - 1] += weight
    trace = fabricate(depth=2, prompts=10, tokens=6, text="given")
    total = 60
    agreed = round(chance * total)
    bits = np.arange(total) < agreed
    monkeypatch.setattr(
        type(trace), "agreement", lambda self, prompt: np.stack([bits[prompt * 6 : prompt * 6 + 6]] * 3)
    )
    (found,) = run_lengths(trace)
    np.testing.assert_allclose(found.geometric, 10 * expected, rtol=1e-12)
    assert list(found.to_pandas().columns) == ["exit_layer", "run", "count", "geometric"]


def test_the_run_that_the_end_cuts_is_left_out():
    assert completed_runs(np.array([1, 1, 0, 0, 1, 0, 1, 1])).tolist() == [2, 0, 1]  # the last run was cut
    assert completed_runs(np.array([1, 1])).tolist() == []
    assert completed_runs(np.array([], bool)).tolist() == []


@given(st.lists(st.booleans(), max_size=40))
def test_runs_and_their_ends_make_up_the_text(agrees):
    lengths = completed_runs(np.array(agrees, bool))
    cut = len(agrees) - int(lengths.sum()) - len(lengths)
    assert len(lengths) == agrees.count(False)
    assert all(agrees[len(agrees) - cut :])


def test_runs_against_the_geometric_law():
    found, variance = runs_of_layer_1([[1, 1, 0, 0, 1, 0]] * 2)  # runs 2, 0, 1, twice
    assert found.counts.tolist() == [2, 2, 2, 0, 0, 0]
    assert found.chance == pytest.approx(1 / 2)
    # of length 0 in 6 tokens: (1 - a) (1 + 5 (1 - a)) = 7/4; then 3/4, 5/16, 1/8, 3/64, 1/64; twice
    assert found.geometric == pytest.approx([7 / 2, 3 / 2, 5 / 8, 1 / 4, 3 / 32, 1 / 32])
    law = np.array([112, 48, 20, 8, 3, 1]) / 64  # 3 runs a text, as many as disagreements are expected
    mean = law @ np.arange(6) / 3
    expected = law @ np.arange(6) ** 2 / 3 - mean**2
    assert variance.value == pytest.approx((2 / 3) / expected)  # 2/3: the variance of 0, 1, 2
    assert (variance.low, variance.high) == pytest.approx((variance.value,) * 2)  # the texts are alike


@given(st.floats(0.05, 0.95), st.integers(1, 12))
def test_the_law_expects_as_many_runs_as_disagreements(a, n):
    """Each text of n independent positions has n (1 - a) disagreements on average, and each of them ends a run."""
    runs = RunLengths(1, np.zeros((1, n)), np.array([a * n]), np.array([n]))
    assert runs.geometric.sum() == pytest.approx(n * (1 - a))


@pytest.mark.parametrize(("chance", "tokens"), [(0.7, 200), (0.9, 30)])
def test_independent_runs_are_geometric(chance, tokens):
    """Also where the ends of short texts cut most of the long runs."""
    (found,) = run_lengths(fabricate(2, prompts=120, tokens=tokens, agreement=[chance] * 2), [1])
    variance = found.variance_ratio()
    assert found.chance == pytest.approx(chance, abs=0.02)
    assert variance.value == pytest.approx(1, abs=0.15)
    assert variance.low < 1 < variance.high


def test_runs_that_come_together_vary_more():
    _, variance = runs_of_layer_1([[1] * 8 + [0] * 8] * 3)
    assert variance.value > 2


def test_no_run_where_everything_agrees():
    found, variance = runs_of_layer_1([[1, 1, 1]] * 2)
    assert found.counts.tolist() == [0, 0, 0]
    assert np.isnan(variance.value)
