"""Correlations, the closed form, and what choices are worth: worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from traces.fabricate import fabricate
from tying.toys import toy

from probekit.choice.robustness import (
    Timed,
    autocorrelation,
    closed_form_error,
    learning_curve,
    timed,
    transfer,
)
from probekit.errors import InputError
from probekit.prediction.predict import predict
from probekit.tying.text_kinds import before_loops


class Steps:
    """Costs that are easy to add up: a round takes 1 + k / 4 autoregressive steps."""

    autoregressive_s = 1.0

    def rounds_seconds(self, exit_layer: int, draft_length: int) -> np.ndarray:
        return 1 + np.arange(draft_length + 1) / 4

    def rounds_seconds_of(self, drafter, draft_length: int) -> np.ndarray:
        return self.rounds_seconds(drafter.key.exit_layer, draft_length)


def test_autocorrelation():
    alternating = toy([[[1, 0, 1, 0, 1, 0, 1, 0]]] * 2)
    assert autocorrelation(alternating, 0, [1, 2]).values == pytest.approx([-1, 1])
    apart = toy([[[1] * 8], [[0] * 8]])  # an easy text and a hard one
    assert autocorrelation(apart, 0, [1]).values == pytest.approx([1])
    assert np.isnan(autocorrelation(apart, 0, [1], within=True).values).all()  # nothing is left within a text
    with pytest.raises(InputError, match="sampled text"):
        autocorrelation(fabricate(text="sampled"), 1)


def test_autocorrelation_of_one_text_by_hand():
    """1 1 0 0 less its mean: 1/2 1/2 -1/2 -1/2, products 1/4, -1/4, 1/4; variance 1/3, and 3 x 1/3 / 4 put back."""
    found = autocorrelation(toy([[[1, 1, 0, 0]]]), 0, [1], within=True)
    assert found.numerators[0, 0] == pytest.approx(1 / 4 + 1 / 4)
    assert found.denominators[0, 0] == pytest.approx(3 * 1 / 3)
    assert autocorrelation(toy([[[1, 1, 0, 0]]]), 0, [1]).values == pytest.approx([(1 / 4) / (3 * 1 / 4)])


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_short_texts_do_not_look_as_if_agreements_avoided_each_other(lag):
    """All 16 texts of 4 fair coins: the numerators add up to nothing, as they must for independent positions."""
    every = [[[int(bit) for bit in f"{number:04b}"]] for number in range(16)]
    found = autocorrelation(toy(every), 0, [lag], within=True)
    assert found.numerators.sum() == pytest.approx(0, abs=1e-12)
    assert found.denominators.sum() == pytest.approx(16 * (4 - lag) / 4)  # the variance of a fair coin


def test_the_end_of_a_text_that_was_cut_is_no_dependence():
    """Everything agrees, so rounds never fail; a text that is cut at its loop is one whose budget ended there."""
    loop = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    cut = before_loops(toy([[[1] * 24, [1] * 24]] * 2, outputs=[loop, loop]))
    table = closed_form_error(cut, [1], [2])
    # of 8 tokens, from index 1: drafts 2, emits 3; drafts 2, emits 3; drafts none, emits the last
    assert table["exact"][0] == table["independent"][0] == pytest.approx(7 / 3)
    assert table["dependence"][0] == pytest.approx(0)


def test_the_closed_form_overestimates_what_comes_in_runs():
    """One text of 13 tokens, agreement 1 everywhere but at the first and after every second: K = 2."""
    row = [0, *[1, 1, 0] * 4]
    table = closed_form_error(toy([[row, row]] * 2), [1], [2])
    # rounds begin at 1: accept 2, emit 3 (the disagreement is the bonus): 12 tokens in 4 rounds, nothing rejected
    assert table["exact"][0] == pytest.approx(3)
    assert table["alpha"][0] == pytest.approx(1)
    assert table["closed_form"][0] == pytest.approx(3)
    assert table["error"][0] == pytest.approx(0)
    assert table["acceptance"][0] == pytest.approx(8 / 13)
    assert table["dependence"][0] > 0.2


def test_closed_form_of_independent_text_is_nearly_right():
    table = closed_form_error(fabricate(2, prompts=60, tokens=200, agreement=[0.6] * 2), [1], [2, 4])
    assert table["error"].abs().max() < 0.04
    assert table["dependence"].abs().max() < 0.04
    assert (table["error_low"] <= table["error"]).all()


def test_sampled_text_has_a_closed_form_as_well():
    table = closed_form_error(fabricate(text="sampled", prompts=5), [3], [4])
    assert table["exact"].between(1, 5).all()


def table_of(seconds, tokens=10.0):
    seconds = np.array(seconds, float)
    return Timed(
        tuple(f"cell {index}" for index in range(len(seconds))),
        np.full(seconds.shape, tokens),
        seconds,
        1.0,
        tuple(range(seconds.shape[1])),
    )


def test_speedups_are_pooled_over_seconds():
    table = table_of([[10, 10], [5, 20]])
    assert table.speedups(np.array([1.0, 1.0])) == pytest.approx([1, 20 / 25])
    assert table.speedups(np.array([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(np.array([[1, 2], [1, 0.5]]))


def test_timing_a_prediction():
    """Agreement 0 1 1 0 1: from index 1, K = 2: accept 2, emit 3; then one round of k = 0 emits the last."""
    row = [0, 1, 1, 0, 1]
    table = timed(predict(toy([[row, row]]), [1], [2]), Steps())
    assert table.cells == ("none", "layer 1, 2 tokens")
    assert table.tokens[:, 0].tolist() == [4, 4]
    assert table.seconds[:, 0].tolist() == [4, 1.5 + 1]
    assert table.speedups(np.array([1.0]))[1] == pytest.approx(4 / 2.5)
    assert table.without_none().cells == ("layer 1, 2 tokens",)


def test_learning_curve_of_a_clear_choice_is_flat():
    curve = learning_curve(table_of([[10] * 6, [5] * 6, [20] * 6]), [1, 3, 6], repeats=50, outer=10)
    assert curve["probability"].tolist() == [1, 1, 1]
    assert curve["loss"].tolist() == [0, 0, 0]
    assert curve["low"].tolist() == [1, 1, 1]


def test_learning_curve_of_a_split_choice_rises():
    """Cell 1 is good on 2 prompts of 3, cell 2 on the third; all in all cell 1 is best."""
    seconds = np.array([[10] * 3, [4, 4, 12], [12, 12, 4]] * 1, float)
    curve = learning_curve(table_of(np.tile(seconds, 4)), [1, 24], repeats=300, outer=10)
    one, many = curve["probability"]
    assert one == pytest.approx(2 / 3, abs=0.1)  # the one prompt that is drawn decides
    assert many > 0.85
    assert curve["loss"][0] > curve["loss"][1] >= 0
    assert ((curve["low"] <= curve["high"]) & (curve["high"] <= 1)).all()


def test_transfer():
    one, other = table_of([[10, 10], [4, 4], [8, 8]]), table_of([[10, 10], [8, 8], [5, 5]])
    table = transfer({"one": one, "other": other}).set_index(["chosen_on", "used_on"])
    assert table["loss"].to_dict() == pytest.approx(
        {("one", "one"): 0, ("one", "other"): 1 - 1.25 / 2, ("other", "one"): 1 - 1.25 / 2.5, ("other", "other"): 0}
    )
    assert table.loc[("one", "other"), ["loss_low", "loss_high"]].tolist() == pytest.approx([0.375, 0.375])
    assert table.loc[("one", "other"), "best_cell"] == "cell 2"
    with pytest.raises(InputError, match="same cells"):
        transfer({"one": one, "other": one.without_none()})


def test_a_choice_on_some_prompts():
    assert table_of([[10, 20, 30]]).of([2, 0]).seconds.tolist() == [[30, 10]]
