"""Probes on scikit-learn's conventions that read what they are fitted on block by block: it need not fit into memory.

`fit`, `predict_proba`, `predict` and `score` take an array, a tensor, or the residuals of a trace. With the same
regularisation they are scikit-learn's estimators behind a StandardScaler, to the solver's tolerance; any estimator of
scikit-learn itself goes wherever one of these goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional

from probekit.errors import InputError
from probekit.settings import whole_number
from probekit.traces.residuals import BLOCK_ROWS, Residuals

HELD_BYTES = 512 * 2**20
"""Rows up to so many bytes are held in memory, standardised; others are read again in every pass."""


class Rows:
    """What a probe is fitted on: blocks of rows, standardised. x: an array, (rows, width), or Residuals."""

    def __init__(self, x: np.ndarray | Residuals, standardize: bool, dtype: torch.dtype = torch.float64) -> None:
        self.x, self.dtype = x, dtype
        self.count, self.width = x.shape
        self.mean, self.scale = torch.zeros(self.width, dtype=dtype), torch.ones(self.width, dtype=dtype)
        if standardize:
            self.mean, self.scale = self._moments()
        self._held: list[Tensor] | None = None
        if self.count * self.width * dtype.itemsize <= HELD_BYTES:
            self._held = list(self._read())

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for block in self._read() if self._held is None else self._held:
            yield slice(start, start + len(block)), block
            start += len(block)

    def _read(self) -> Iterator[Tensor]:
        for block in blocks_of(self.x):
            yield (torch.from_numpy(block).to(self.dtype) - self.mean) / self.scale

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in two passes; a constant column is only centred, as StandardScaler does."""
        mean = sum(block.astype(np.float64).sum(axis=0) for block in blocks_of(self.x)) / self.count
        square = sum(((block - mean) ** 2).sum(axis=0) for block in blocks_of(self.x)) / self.count
        scale = np.sqrt(square)
        constant = scale <= 10 * np.finfo(np.float64).eps * np.maximum(np.abs(mean), 1e-300)
        return (torch.tensor(each, dtype=self.dtype) for each in (mean, np.where(constant, 1.0, scale)))  # type: ignore

    def unscaled(self, weights: Tensor, offset: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """A map of standardised rows as one of the rows themselves. weights: (outputs, width), offset: (outputs,)."""
        own = weights / self.scale
        return own.numpy(), (offset - own @ self.mean).numpy()


def blocks_of(x: Any) -> Iterator[np.ndarray]:
    """(rows, width) each, at most BLOCK_ROWS rows at a time."""
    if isinstance(x, Residuals):
        yield from x.blocks(BLOCK_ROWS)
        return
    for start in range(0, len(x), BLOCK_ROWS):
        yield np.array(x[start : start + BLOCK_ROWS])


def _checked(probe: Any, x: Any, y: Any = None, *, numeric: bool = False) -> tuple[Any, Any]:
    """x, and y where it is given, as scikit-learn checks them; residuals stay where they are."""
    if isinstance(x, Tensor):
        x = x.detach().cpu().float().numpy()
    if not isinstance(x, Residuals):
        options = {"reset": y is not None, "dtype": [np.float64, np.float32]}
        if y is None:
            return validate_data(probe, x, **options), None
        return validate_data(probe, x, y, y_numeric=numeric, multi_output=numeric, **options)
    if y is None:
        if x.width != probe.n_features_in_:
            raise InputError(f"the residuals are {x.width} wide, and the probe was fitted on {probe.n_features_in_}.")
        return x, None
    y = np.asarray(y)
    if len(y) != len(x) or not len(x):
        raise InputError(f"{len(y)} labels were given for {len(x)} residuals.", "Give one for each row.")
    probe.n_features_in_ = x.width
    return x, y


def _linear(x: Any, weights: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(rows, outputs)."""
    pieces = [block @ weights.T + offset for block in blocks_of(x)]
    return np.concatenate(pieces) if pieces else np.empty((0, len(weights)))


class _Classes(ClassifierMixin, BaseEstimator):
    """What classifying probes share: classes, and answers from `_logits`."""

    classes_: np.ndarray

    def _begin(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        """Returns x, and y as places in `classes_`."""
        X, y = _checked(self, X, y)
        check_classification_targets(y)
        self.classes_, places = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"a probe tells classes apart, and there is one class only: {self.classes_.tolist()}.")
        return X, places

    def _logits(self, X: Any) -> np.ndarray:
        raise NotImplementedError

    def decision_function(self, X: Any) -> np.ndarray:
        """(rows,) of two classes, the log-odds of the second; (rows, classes) of more."""
        check_is_fitted(self)
        logits = self._logits(_checked(self, X)[0])
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """(rows, classes), in the order of `classes_`."""
        check_is_fitted(self)
        logits = self._logits(_checked(self, X)[0])
        if logits.shape[1] == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        logits = logits - logits.max(axis=1, keepdims=True)
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """(rows,): the most probable class."""
        shares = self.predict_proba(X)
        return self.classes_[shares.argmax(axis=1)]


class LogisticProbe(_Classes):
    """Logistic regression: scikit-learn's `LogisticRegression(C=C)` behind a `StandardScaler`, block by block.

    Minimises C times the sum of log losses plus half the squared norm of the weights (of standardised columns, not of
    the offset) by L-BFGS, in float64.

    Parameters
    ----------
    C: > 0, the inverse of the regularisation. standardize: columns to mean 0 and variance 1 before.
    max_iter, tol: of the solver; tol is the greatest gradient of the mean loss.

    After `fit`: `coef_`, (1 or classes, width), and `intercept_`, of the rows as they are given; `classes_`.

    Examples
    --------
    >>> import numpy as np
    >>> from probekit.probing.probes import LogisticProbe
    >>> x = np.random.default_rng(0).normal(size=(200, 5))
    >>> LogisticProbe(C=1.0).fit(x, x[:, 2] > 0).score(x, x[:, 2] > 0) > 0.95
    True
    """

    def __init__(self, C: float = 1.0, *, standardize: bool = True, max_iter: int = 500, tol: float = 1e-6) -> None:
        self.C, self.standardize, self.max_iter, self.tol = C, standardize, max_iter, tol

    def fit(self, X: Any, y: Any) -> LogisticProbe:
        """X: (rows, width). y: (rows,), the class of each. Raises InputError for a single class."""
        if not self.C > 0:
            raise InputError(f"C must be above 0, not {self.C}.")
        X, places = self._begin(X, y)
        rows = Rows(X, self.standardize)
        outputs = 1 if len(self.classes_) == 2 else len(self.classes_)
        truth = torch.from_numpy(places)
        found = minimize(
            _logistic_loss(rows, truth, outputs, self.C), np.zeros(outputs * (rows.width + 1)), jac=True,
            method="L-BFGS-B", options={"maxiter": self.max_iter, "gtol": self.tol, "ftol": 1e-14, "maxcor": 20},
        )  # fmt: skip
        weights = torch.from_numpy(found.x).view(outputs, rows.width + 1)
        self.coef_, self.intercept_ = rows.unscaled(weights[:, :-1], weights[:, -1])
        self.n_iter_ = np.array([found.nit])
        return self

    def _logits(self, X: Any) -> np.ndarray:
        return _linear(X, self.coef_, self.intercept_)


def _logistic_loss(
    rows: Rows, truth: Tensor, outputs: int, C: float
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The mean of the losses and their gradient; of two classes one logit, of more a softmax."""
    wanted = truth.double()[:, None] if outputs == 1 else functional.one_hot(truth, outputs).double()

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(outputs, rows.width + 1)
        gradient = torch.zeros_like(weights)
        total = 0.0
        for here, block in rows:
            logits = torch.addmm(weights[:, -1], block, weights[:, :-1].T)
            if outputs == 1:
                total += float(functional.softplus(logits).sum() - (logits * wanted[here]).sum())
                left = logits.sigmoid() - wanted[here]
            else:
                total += float(logits.logsumexp(1).sum() - (logits * wanted[here]).sum())
                left = logits.softmax(1) - wanted[here]
            gradient[:, :-1] += left.T @ block
            gradient[:, -1] += left.sum(0)
        gradient[:, :-1] += weights[:, :-1] / C
        total += float(weights[:, :-1].square().sum()) / (2 * C)
        return total / rows.count, gradient.view(-1).numpy() / rows.count

    return loss


class RidgeProbe(RegressorMixin, BaseEstimator):
    """Ridge regression of numbers: scikit-learn's `Ridge(alpha=alpha)` behind a `StandardScaler`, in one pass.

    Of truth values it is the linear probability model: `predict_proba` is the estimate, cut to [0, 1].

    Parameters
    ----------
    alpha: >= 0, the weight of the squared norm of the weights.

    After `fit`: `coef_`, (width,) or (outputs, width), and `intercept_`, of the rows as they are given.
    """

    coef_: np.ndarray
    intercept_: np.ndarray | float
    classes_: np.ndarray

    def __init__(self, alpha: float = 1.0, *, standardize: bool = True) -> None:
        self.alpha, self.standardize = alpha, standardize

    def fit(self, X: Any, y: Any) -> RidgeProbe:
        """X: (rows, width). y: (rows,) or (rows, outputs), numbers or truth values."""
        if not self.alpha >= 0:
            raise InputError(f"alpha must be 0 or more, not {self.alpha}.")
        if y is None:
            raise ValueError("RidgeProbe requires y to be passed, but the target y is None.")
        truths = np.asarray(y).dtype == bool
        X, y = _checked(self, X, np.asarray(y, dtype=np.float64) if truths else y, numeric=True)
        flat = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
        wanted, middle = torch.from_numpy(flat - flat.mean(axis=0)), torch.from_numpy(flat.mean(axis=0))
        rows = Rows(X, self.standardize)
        gram = torch.zeros(rows.width, rows.width, dtype=torch.float64)
        cross = torch.zeros(rows.width, flat.shape[1], dtype=torch.float64)
        mean = sum((block.sum(0) for _, block in rows), torch.zeros(rows.width, dtype=torch.float64)) / rows.count
        for here, block in rows:
            centred = block - mean
            gram += centred.T @ centred
            cross += centred.T @ wanted[here]
        gram.diagonal().add_(self.alpha)
        if self.alpha:
            weights = torch.linalg.solve(gram, cross).T
        else:  # columns may depend on each other: the shortest solution
            weights = torch.linalg.lstsq(gram, cross, driver="gelsd").solution.T
        coef, offset = rows.unscaled(weights, middle - weights @ mean)
        self.coef_, self.intercept_ = (coef[0], offset[0]) if np.ndim(y) == 1 else (coef, offset)
        if hasattr(self, "classes_"):
            del self.classes_
        if truths:
            self.classes_ = np.array([False, True])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(rows,) or (rows, outputs)."""
        check_is_fitted(self)
        found = _linear(_checked(self, X)[0], np.atleast_2d(self.coef_), np.atleast_1d(self.intercept_))
        return found[:, 0] if np.ndim(self.coef_) == 1 else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _tells_classes(self) -> bool:
        if hasattr(self, "coef_") and not hasattr(self, "classes_"):
            raise AttributeError("this ridge probe was fitted on numbers, which have no probability; fit truth values.")
        return True

    @available_if(_tells_classes)
    def predict_proba(self, X: Any) -> np.ndarray:
        """(rows, 2): of a probe of truth values. One of numbers has no such method."""
        found = self.predict(X).clip(0, 1)
        return np.stack([1 - found, found], axis=1)


class MLPProbe(_Classes):
    """One hidden layer of ReLUs, by AdamW on small batches: what a probe that is not linear finds beyond one that is.

    Parameters
    ----------
    hidden: its width. weight_decay, learning_rate: AdamW's. epochs: passes over the rows. batch_rows: of a step.
    seed: of the first weights and of the order of the rows; no other random numbers are touched.
    """

    def __init__(
        self, hidden: int = 64, *, weight_decay: float = 0.1, epochs: int = 20, learning_rate: float = 1e-3,
        batch_rows: int = 128, seed: int = 0, standardize: bool = True,
    ) -> None:  # fmt: skip
        self.hidden, self.weight_decay, self.epochs = hidden, weight_decay, epochs
        self.learning_rate, self.batch_rows, self.seed, self.standardize = learning_rate, batch_rows, seed, standardize

    def fit(self, X: Any, y: Any) -> MLPProbe:
        """X: (rows, width). y: (rows,), the class of each. Raises InputError for a single class."""
        for what in ("hidden", "epochs", "batch_rows"):
            whole_number(f"{what} must be", getattr(self, what))
        X, places = self._begin(X, y)
        rows = Rows(X, self.standardize, torch.float32)
        truth = torch.from_numpy(places)
        order = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False), torch.enable_grad():
            weights = [
                (torch.rand(shape, generator=order) * 2 - 1) / shape[0] ** 0.5
                for shape in ((rows.width, self.hidden), (self.hidden, len(self.classes_)))
            ]
            weights = [weights[0], torch.zeros(self.hidden), weights[1], torch.zeros(len(self.classes_))]
            for each in weights:
                each.requires_grad_()
            optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=self.weight_decay)
            for _ in range(self.epochs):
                for here, block in rows:
                    shuffled = torch.randperm(len(block), generator=order)
                    for some in shuffled.split(self.batch_rows):
                        optimizer.zero_grad()
                        functional.cross_entropy(_hidden(block[some].clone(), weights), truth[here][some]).backward()
                        optimizer.step()
        first, offset = rows.unscaled(weights[0].detach().T, weights[1].detach())
        self.coefs_ = [first.T, weights[2].detach().numpy()]
        self.intercepts_ = [offset, weights[3].detach().numpy()]
        return self

    def _logits(self, X: Any) -> np.ndarray:
        inner = _linear(X, self.coefs_[0].T, self.intercepts_[0])
        return np.maximum(inner, 0) @ self.coefs_[1] + self.intercepts_[1]


def _hidden(block: Tensor, weights: list[Tensor]) -> Tensor:
    return torch.addmm(weights[3], torch.addmm(weights[1], block, weights[0]).relu(), weights[2])
