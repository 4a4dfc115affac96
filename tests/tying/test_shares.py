"""Classes of what the lens says, depth of half agreement, the valley, the missing norm: worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces.fabricate import fabricate
from tying.toys import toy

from probekit.errors import InputError
from probekit.tying.shares import (
    CLASSES,
    class_shares,
    classes_of,
    half_agreement,
    last_rise,
    layer_means,
    norm_or_raw,
    shares_table,
    valley,
)


def test_the_first_class_that_fits():
    trace = toy(
        [[[1, 0, 0, 0], [1, 1, 0, 0]]],
        echo=[[[1, 1, 0, 0], [0, 0, 0, 0]]],
        model_rank=[[[0, 3, 49, 50], [0, 0, 0, 7]]],
    )
    found = classes_of(trace, 0)
    assert [CLASSES[index] for index in found[0]] == ["agrees", "echoes", "in top 50", "gibberish"]
    assert [CLASSES[index] for index in found[1]] == ["agrees", "agrees", "in top 50", "in top 50"]
    assert (found[2] == 0).all()


def test_shares_sum_to_one_and_pool_over_prompts():
    trace = toy([[[1, 1, 1, 0]], [[0, 0]]])
    shares = class_shares(trace)
    assert shares.values[:, 0] == pytest.approx([3 / 6, 0, 0, 3 / 6])
    table = shares_table(trace)
    assert table.groupby("layer")["share"].sum().tolist() == pytest.approx([1, 1])
    assert (table["low"] <= table["share"]).all()
    assert (table["share"] <= table["high"]).all()


def test_any_trace_is_parted_whole():
    trace = fabricate(prompts=3, vocabulary=200)
    for lens in ("final-norm", "raw"):
        assert class_shares(trace, lens).values.sum(axis=0) == pytest.approx(np.ones(7))
    assert layer_means(trace, "agrees").values == pytest.approx(class_shares(trace).values[0])


@pytest.mark.parametrize(
    ("curve", "depth"),
    [
        ([0.0, 0.2, 0.4, 0.8, 1.0], 2.25),  # between .4 and .8
        ([0.0, 0.5, 1.0], 1.0),
        ([0.6, 0.7, 1.0], 0.0),
        ([0.6, 0.0, 1.0], 1.5),  # the last rise, not the first
        ([0.0, 0.9, 0.4, 0.6], 2.5),
        ([0.0, 0.1], np.nan),
    ],
)
def test_last_rise(curve, depth):
    assert last_rise(np.array(curve)[:, None])[0] == pytest.approx(depth, nan_ok=True)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_from_the_last_rise_on_the_curve_stays_above(values):
    curve = np.array([*values, 1.0])
    depth = last_rise(curve[:, None])[0]
    assert 0 <= depth <= len(curve) - 1
    assert (curve[int(np.ceil(depth + 1e-9)) :] >= 0.5).all()


def test_half_agreement_has_an_interval():
    trace = toy([[[0, 0], [1, 0], [1, 1]], [[0, 0], [0, 0], [1, 1]]])
    found = half_agreement(trace)  # agreement 0, 1/4, 1, 1: half way at 1 + 1/3
    assert found.value == pytest.approx(4 / 3)
    assert found.low <= found.value <= found.high
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(1.5))  # only the one prompt, only the other


def test_the_valley_between_echo_and_answer():
    trace = toy(
        [[[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]],
        echo=[[[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]],
    )
    found = valley(trace)  # known: 3/4, 1/4, 1/4, 3/4, 1
    assert found.floor.value == pytest.approx(1 / 4)
    assert found.layer.value == 1
    assert found.drop.value == pytest.approx(1 / 2)
    assert found.wide.value == 2


def test_no_valley_without_an_echo():
    found = valley(toy([[[0, 0], [0, 1], [1, 1]]]))
    assert found.drop.value == 0
    assert found.layer.value == 0


def test_the_missing_norm():
    """Layers 0..3 of 4; raw gibberish 4, 4, 4, 2 of 4 positions; with the norm 4, 2, 1, 0."""
    norm = [[[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]
    raw = [[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]]
    table = norm_or_raw(toy(norm * 2, raw=raw * 2)).set_index("layers")
    assert table["missing_norm"].to_dict() == pytest.approx({"0": 0, "1": 1 / 2, "2": 3 / 4, "3": 1, "1..2": 5 / 8})
    assert table.loc["1..2", "agreement_gain"] == pytest.approx(5 / 8)
    assert table.loc["3", "agreement_raw"] == pytest.approx(1 / 2)
    ends = table[["gibberish_norm_low", "gibberish_norm", "gibberish_norm_high"]].loc["1"]
    assert ends.tolist() == pytest.approx([1 / 2] * 3)  # both prompts are alike


def test_agreement_alone_does_not_do():
    with pytest.raises(InputError, match="agreement only"):
        class_shares(fabricate(statistics="agreement"))
    with pytest.raises(InputError, match="one lens only"):
        norm_or_raw(fabricate(lenses=("final-norm",)))
