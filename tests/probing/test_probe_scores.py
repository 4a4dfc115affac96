"""AUROC, its bootstrap and the calibration figures, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from probekit.probing.probe_scores import auroc, brier, calibration_error, explained, pairs_of, reliability


@pytest.fixture(scope="module")
def answers():
    random = np.random.default_rng(0)
    prompt = np.repeat(np.arange(12), 20)
    truth = random.random(240) < 0.4
    score = np.round(truth + random.normal(size=240), 1)  # rounded: with ties
    return truth, score, prompt


def test_auroc_is_scikit_learns(answers):
    truth, score, prompt = answers
    found = auroc(truth, score, prompt, np.zeros(240))
    assert np.isclose(found.value, roc_auc_score(truth, score)) and found.low < found.value < found.high


def test_folds_are_not_compared_with_each_other(answers):
    truth, score, prompt = answers
    fold = prompt % 3
    moved = auroc(truth, score + 100 * fold, prompt, fold)
    assert np.isclose(moved.value, auroc(truth, score, prompt, fold).value)
    mine = [roc_auc_score(truth[fold == each], score[fold == each]) for each in range(3)]
    pairs = [truth[fold == each].sum() * (~truth[fold == each]).sum() for each in range(3)]
    assert np.isclose(moved.value, np.average(mine, weights=pairs))


def test_the_bootstrap_draws_whole_prompts(answers):
    """A drawn AUROC is scikit-learn's of the rows of the drawn prompts, each as often as it was drawn."""
    truth, score, prompt = answers
    times = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=5).astype(float)
    found = pairs_of(truth, score, prompt, np.zeros(240)).redrawn(times)
    for each, value in zip(times, found, strict=True):
        rows = np.repeat(np.arange(240), each[prompt].astype(int))
        assert np.isclose(value, roc_auc_score(truth[rows], score[rows]))


def test_of_several_classes_each_against_the_rest(answers):
    random = np.random.default_rng(1)
    y = np.array(["x", "y", "z"])[random.integers(3, size=240)]
    shares = random.dirichlet(np.ones(3), size=240)
    found = auroc(y, shares, answers[2], np.zeros(240), ["x", "y", "z"])
    assert np.isclose(found.value, roc_auc_score(y, shares, multi_class="ovr"))
    assert np.isnan(auroc(np.ones(240, bool), shares[:, 0], answers[2], np.zeros(240)).value)


def test_calibration_by_hand():
    truth = np.array([True, False, True, True])
    probability = np.array([0.1, 0.12, 0.95, 1.0])
    curve = reliability(truth, probability)
    assert [(each.low, each.positions, each.observed) for each in curve] == [(0.1, 2, 0.5), (0.9, 2, 1.0)]
    assert np.isclose(calibration_error(curve), 0.5 * (0.5 - 0.11) + 0.5 * (1 - 0.975))
    assert np.isclose(brier(truth, probability).mean(), brier_score_loss(truth, probability))
    assert np.isclose(brier(np.eye(2), np.array([[0.5, 0.5], [0.0, 1.0]])).tolist(), [0.5, 0.0]).all()


def test_explained_is_r2(answers):
    from sklearn.metrics import r2_score

    truth = np.random.default_rng(2).normal(size=240)
    answer = truth + np.random.default_rng(4).normal(size=240) / 2
    found = explained(truth, answer, answers[2])
    assert np.isclose(found.value, r2_score(truth, answer)) and found.low < found.value < found.high
