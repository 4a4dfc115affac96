"""Pooled shares, their draws and paired differences, on answers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from probekit.errors import InputError
from probekit.prediction.intervals import Share, difference, draws, estimate, holm, spread


def share(numerators, denominators):
    return Share(np.array(numerators, float), np.array(denominators, float), tuple(range(np.shape(denominators)[-1])))


def test_pooled_not_averaged():
    one = share([1, 3], [2, 10])
    assert one.values == pytest.approx(4 / 12)  # not (1/2 + 3/10) / 2
    assert np.isnan(share([0, 0], [0, 0]).values)


def test_redrawn_takes_a_prompt_as_often_as_it_was_drawn():
    drawn = share([1, 3], [2, 10]).redrawn(np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    assert drawn == pytest.approx([1 / 2, 3 / 10, 4 / 12])
    empty = share([0, 3], [0, 10]).redrawn(np.array([[2.0, 0.0]]))
    assert empty == pytest.approx([3 / 10])  # a draw in which nothing was counted stands at the share itself


def test_draws_are_of_all_prompts_and_repeat():
    times = draws(5, 100)
    assert times.shape == (100, 5)
    assert (times.sum(axis=1) == 5).all()
    assert (times == draws(5, 100)).all()
    assert not (times == draws(5, 100, seed=1)).all()


def test_a_paired_difference_loses_what_prompts_have_in_common():
    easy = np.array([0.0, 2, 4, 6, 8, 10])
    one, other = share(easy + 1, np.full(6, 20)), share(easy, np.full(6, 20))
    paired, unpaired = difference(one, other), difference(one, other, paired=False)
    assert paired.values == pytest.approx(1 / 20)
    assert (paired.low, paired.high) == (pytest.approx(1 / 20), pytest.approx(1 / 20))
    assert paired.clear
    assert unpaired.low < 0 < unpaired.high
    assert not unpaired.clear


def test_paired_needs_the_same_prompts():
    with pytest.raises(InputError, match="same prompts"):
        difference(share([1, 2], [2, 2]), share([1, 2, 3], [2, 2, 3]))
    apart = difference(share([1, 2], [2, 2]), share([1, 2, 3], [2, 2, 3]), paired=False)
    assert apart.values == pytest.approx(3 / 4 - 6 / 7)


def test_one_prompt_has_no_interval():
    assert np.isnan(difference(share([1], [2]), share([2], [2])).low)
    assert np.isnan(estimate(share([[1], [2]], [2]), lambda curve: curve.max(axis=0)).low)


def test_estimate_of_a_statistic():
    found = estimate(share([[1, 1, 1], [2, 2, 2]], [4, 4, 4]), lambda curve: curve[1] - curve[0])
    assert found == (pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0.25))


def test_holm_by_hand():
    """.01 x 3, .02 x 2, .04 x 1, never less than the one before; what is not known does not count."""
    assert holm(np.array([0.04, 0.01, np.nan, 0.03])) == pytest.approx([0.06, 0.03, np.nan, 0.06], nan_ok=True)
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


def test_a_difference_of_nothing_is_not_clear():
    same = difference(share([1, 2], [4, 4]), share([1, 2], [4, 4]))
    assert (same.p, same.clear) == (1, False)
    assert difference(share([2, 3], [4, 4]), share([1, 2], [4, 4])).p == 0  # the same difference on each prompt


def test_p_is_as_often_small_as_it_says():
    """Of 300 differences between two samples of one kind, about 5 % have p < .05."""
    random = np.random.default_rng(4)
    shares = [share(random.binomial(40, random.beta(4, 2, (300, 12))), np.full((300, 12), 40)) for _ in range(2)]
    assert 0.02 <= (difference(*shares).p < 0.05).mean() <= 0.08
    assert 0.02 <= (difference(*shares, paired=False).p < 0.05).mean() <= 0.08


def test_spread_is_wider_for_few_prompts():
    drawn = np.random.default_rng(0).normal(size=(1, 100_000))
    (plain,), (few,) = spread(drawn)[1], spread(drawn, 8)[1]
    assert (plain, few) == (pytest.approx(1.96, abs=0.03), pytest.approx(2.365 * np.sqrt(8 / 7), abs=0.06))


def test_spread_leaves_undefined_draws_out():
    low, high = spread(np.array([[0.0, 1.0, np.nan], [np.nan, np.nan, np.nan]]))
    assert (low[0], high[0]) == (pytest.approx(0.025), pytest.approx(0.975))
    assert np.isnan(low[1])


def test_a_share_ends_in_its_prompts():
    with pytest.raises(InputError, match="3 prompts"):
        Share(np.ones((2, 2)), np.ones(2), (0, 1, 2))
    assert share([1, 2, 3], [4, 4, 4]).of([2, 0]).numerators.tolist() == [3, 1]
