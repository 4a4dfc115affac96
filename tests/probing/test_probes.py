"""Probes against scikit-learn's estimators on the same rows, its conventions, and rows that do not fit into memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from probekit.errors import InputError
from probekit.probing import probes
from probekit.probing.probes import LogisticProbe, MLPProbe, RidgeProbe
from probekit.traces.residuals import ResidualPart, Residuals

ROWS, WIDTH = 300, 12


@pytest.fixture(scope="module")
def rows():
    """(rows, width) of unlike scales with a constant column, two labels, three labels, a number."""
    random = np.random.default_rng(1)
    x = random.normal(size=(ROWS, WIDTH)) * 10.0 ** random.integers(-2, 3, WIDTH) + random.normal(size=WIDTH) * 50
    x[:, 3] = 7.0
    z = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 1e-9, x.std(axis=0), 1)
    signal = z[:, 0] - z[:, 1] + random.normal(size=ROWS)
    three = np.array(["a", "b", "c"])[np.digitize(signal, [-1, 1])]
    return x, signal > 0.3, three, signal


@pytest.mark.parametrize("C", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("label", [1, 2])
def test_logistic_is_scikit_learns(rows, C, label):
    x, y = rows[0], rows[label]
    mine = LogisticProbe(C=C).fit(x[:200], y[:200])
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-8, max_iter=2000)).fit(x[:200], y[:200])
    np.testing.assert_allclose(mine.predict_proba(x[200:]), theirs.predict_proba(x[200:]), atol=2e-4)
    assert mine.score(x[200:], y[200:]) == theirs.score(x[200:], y[200:])
    assert mine.classes_.tolist() == theirs.classes_.tolist()


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e3])
def test_ridge_is_scikit_learns(rows, alpha):
    x, y = rows[0], np.stack([rows[3], rows[3] ** 2], axis=1)
    for wanted in (y[:, 0], y):
        mine = RidgeProbe(alpha=alpha).fit(x[:200], wanted[:200])
        theirs = make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(x[:200], wanted[:200])
        np.testing.assert_allclose(mine.predict(x[200:]), theirs.predict(x[200:]), atol=1e-8)
        assert np.isclose(mine.score(x[200:], wanted[200:]), theirs.score(x[200:], wanted[200:]))


def test_ridge_of_truth_values_has_probabilities(rows):
    probe = RidgeProbe(10.0).fit(rows[0], rows[1])
    shares = probe.predict_proba(rows[0])
    assert shares.shape == (ROWS, 2) and np.allclose(shares.sum(axis=1), 1) and ((shares >= 0) & (shares <= 1)).all()
    with pytest.raises(AttributeError, match="no attribute 'predict_proba'") as error:
        RidgeProbe().fit(rows[0], rows[3]).predict_proba(rows[0])
    assert "numbers" in str(error.value.__cause__)


def test_unregularised_ridge_with_columns_that_depend_on_each_other(rows):
    x = np.concatenate([rows[0], rows[0][:, :2]], axis=1)
    found = RidgeProbe(alpha=0).fit(x, rows[3]).predict(x)
    np.testing.assert_allclose(found, RidgeProbe(alpha=1e-6).fit(x, rows[3]).predict(x), atol=1e-5)


def test_the_mlp_finds_what_is_not_linear():
    x = np.random.default_rng(0).normal(size=(600, 6))
    y = (x[:, 0] * x[:, 1]) > 0
    before = torch.random.get_rng_state()
    probe = MLPProbe(epochs=60).fit(x[:400], y[:400])
    assert torch.equal(before, torch.random.get_rng_state())
    assert probe.score(x[400:], y[400:]) > 0.85 > 0.65 > LogisticProbe().fit(x[:400], y[:400]).score(x[400:], y[400:])
    again = MLPProbe(epochs=60).fit(x[:400], y[:400])
    assert np.array_equal(probe.predict_proba(x), again.predict_proba(x))
    with torch.inference_mode():  # where a tracer would call it
        MLPProbe(epochs=1).fit(x, y)


@pytest.mark.parametrize("make", [LogisticProbe, RidgeProbe, MLPProbe])
def test_residuals_in_blocks_are_the_array(rows, make, tmp_path, monkeypatch):
    """Parts of a run on disk, read again in every pass, give what the same rows in memory give."""
    x, y = rows[0].astype(np.float32), rows[1]
    mapped = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=x.shape)
    mapped[:] = x
    frame = pd.DataFrame({"prompt": np.arange(ROWS) // 10, "position": np.arange(ROWS) % 10})
    parts = (ResidualPart(np.arange(130), mapped), ResidualPart(np.arange(130, ROWS), mapped))
    residuals = Residuals(3, frame, parts)
    monkeypatch.setattr(probes, "BLOCK_ROWS", 64)
    if make is not MLPProbe:  # its steps follow the blocks
        expected = make().fit(x, y).predict_proba(x)
    monkeypatch.setattr(probes, "HELD_BYTES", 0)
    found = make().fit(residuals, y).predict_proba(residuals)
    if make is MLPProbe:
        assert ((found[:, 1] > 0.5) == y).mean() > 0.6
    else:
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert make().fit(residuals, y).predict_proba(x).shape == (ROWS, 2)
    with pytest.raises(InputError, match="1 labels"):
        make().fit(residuals, [True])


@pytest.mark.parametrize("probe", [LogisticProbe(C=0.5), RidgeProbe(alpha=3), MLPProbe(hidden=8, epochs=2)])
def test_they_are_estimators_of_scikit_learn(rows, probe):
    copy = clone(probe)
    assert copy is not probe and copy.get_params() == probe.get_params()
    name = {"LogisticProbe": "C", "RidgeProbe": "alpha", "MLPProbe": "hidden"}[type(probe).__name__]
    assert copy.set_params(**{name: 2}).get_params()[name] == 2
    groups = np.arange(ROWS) // 10
    search = GridSearchCV(probe, {name: [2, 4]}, cv=GroupKFold(3)).fit(rows[0], rows[1], groups=groups)
    assert search.best_params_[name] in (2, 4)
    with pytest.raises(Exception, match="not fitted"):
        clone(probe).predict(rows[0])
    assert torch.is_tensor(torch.zeros(1)) and len(probe.fit(torch.from_numpy(rows[0]), rows[1]).predict(rows[0]))


@pytest.mark.parametrize("probe", [LogisticProbe(), RidgeProbe()])
def test_scikit_learns_own_checks(probe):
    """All of its checks of an estimator, but for those of messages that we say in our own words."""
    ours = {"check_classifiers_one_label", "check_fit2d_1sample"}
    for estimator, check in estimator_checks_generator(probe):
        name = getattr(check, "func", check).__name__
        if name not in ours and "array_api" not in name:
            check(estimator)


def test_what_cannot_be_fitted(rows):
    with pytest.raises(InputError, match="one class only"):
        LogisticProbe().fit(rows[0], np.ones(ROWS, bool))
    with pytest.raises(InputError, match="C must be above 0"):
        LogisticProbe(C=0).fit(rows[0], rows[1])
    with pytest.raises(InputError, match="alpha"):
        RidgeProbe(alpha=-1).fit(rows[0], rows[3])
    with pytest.raises(InputError, match="hidden must be"):
        MLPProbe(hidden=0).fit(rows[0], rows[1])
