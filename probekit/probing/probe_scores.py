"""How good a probe's answers are: AUROC, Brier score, calibration, R2, each with an interval over prompts. No torch.

Answers of different folds come from different probes: AUROC compares pairs within a fold only, so that an uninformed
probe has 1/2 in expectation (pooled folds would have less: where a class is frequent in one, it is rare in the rest).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from probekit.prediction.intervals import bootstrap_ratio, draws, spread

BINS = 10


class Pairs(NamedTuple):
    """Of every two prompts, (prompts, prompts): pairs of a positive of one and a negative of the other in one fold.

    won: those in which the positive has the higher score, ties counting half. of: all.
    """

    won: np.ndarray
    of: np.ndarray

    @property
    def auroc(self) -> float:
        """The share of pairs that are won; NaN without any."""
        return float(self.won.sum() / self.of.sum()) if self.of.sum() else np.nan

    def redrawn(self, times: np.ndarray) -> np.ndarray:
        """(resamples,): the same where prompts are drawn `times`, (resamples, prompts)."""
        won, of = ((times @ matrix * times).sum(axis=1) for matrix in (self.won, self.of))
        return np.where(of > 0, won / np.where(of > 0, of, 1.0), np.nan)


def pairs_of(truth: np.ndarray, score: np.ndarray, prompt: np.ndarray, fold: np.ndarray) -> Pairs:
    """truth: (rows,) bool. score: (rows,), higher for positives. prompt: (rows,) 0, 1, ..; fold: (rows,)."""
    count = int(prompt.max()) + 1
    won, of = np.zeros((count, count)), np.zeros((count, count))
    for one in np.unique(fold):
        here = fold == one
        positive, negative = here & truth, here & ~truth
        owner = prompt[positive]
        for other in np.unique(prompt[negative]):
            against = np.sort(score[negative & (prompt == other)])
            below = np.searchsorted(against, score[positive], side="left")
            upto = np.searchsorted(against, score[positive], side="right")
            won[:, other] += np.bincount(owner, weights=(below + upto) / 2, minlength=count)
            of[:, other] += np.bincount(owner, minlength=count) * len(against)
    return Pairs(won, of)


class Auroc(NamedTuple):
    """value; low, high: 95 %; drawn: (resamples,) of the bootstrap over prompts, paired where prompts are the same."""

    value: float
    low: float
    high: float
    drawn: np.ndarray


def auroc(
    truth: np.ndarray, score: np.ndarray, prompt: np.ndarray, fold: np.ndarray, classes: Sequence[object] | None = None
) -> Auroc:
    """Of two classes (truth: bool, score: (rows,)), or of several: each against the rest, their mean.

    classes: of several, those that the columns of score, (rows, classes), are of.
    """
    if classes is None:
        every = [pairs_of(truth, score, prompt, fold)]
    else:
        every = [pairs_of(truth == each, score[:, place], prompt, fold) for place, each in enumerate(classes)]
    every = [each for each in every if each.of.sum()]
    if not every:
        return Auroc(np.nan, np.nan, np.nan, np.array([np.nan]))
    drawn = np.stack([each.redrawn(draws(len(each.of))) for each in every])
    counted = np.isfinite(drawn)
    mean = np.where(counted, drawn, 0.0).sum(axis=0) / np.maximum(1, counted.sum(axis=0))
    mean = np.where(counted.any(axis=0), mean, np.nan)
    low, high = spread(mean)
    return Auroc(float(np.mean([each.auroc for each in every])), float(low), float(high), mean)


class Reliability(NamedTuple):
    """A bin of predicted probabilities: its bounds, their mean, the share that was true, and how many there were."""

    low: float
    high: float
    predicted: float
    observed: float
    positions: int


def reliability(truth: np.ndarray, probability: np.ndarray, bins: int = BINS) -> list[Reliability]:
    """The reliability curve: bins of equal width over [0, 1], empty ones left out."""
    place = np.minimum((probability * bins).astype(int), bins - 1)
    found = []
    for each in np.unique(place).tolist():
        here = place == each
        observed, predicted = float(truth[here].mean()), float(probability[here].mean())
        found.append(Reliability(each / bins, (each + 1) / bins, predicted, observed, int(here.sum())))
    return found


def calibration_error(curve: Sequence[Reliability]) -> float:
    """The expected calibration error: |predicted - observed|, weighed by positions (Naeini et al., 2015)."""
    total = sum(each.positions for each in curve)
    return sum(abs(each.predicted - each.observed) * each.positions for each in curve) / total if total else np.nan


def brier(hit: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """(rows,): of two classes (p - y)^2; of several, (rows, classes) each, the sum over classes."""
    squares = (probability - hit) ** 2
    return squares if squares.ndim == 1 else squares.sum(axis=1)


class Explained(NamedTuple):
    """R2 with its 95 % interval."""

    value: float
    low: float
    high: float


def explained(truth: np.ndarray, answer: np.ndarray, prompt: np.ndarray) -> Explained:
    """1 - squared errors / squared distances from the mean, both summed over prompts."""
    count = int(prompt.max()) + 1
    error, spreads = (
        np.bincount(prompt, weights=(truth - other) ** 2, minlength=count) for other in (answer, truth.mean())
    )
    if not spreads.sum():
        return Explained(np.nan, np.nan, np.nan)
    low, high = bootstrap_ratio(error, spreads)
    return Explained(float(1 - error.sum() / spreads.sum()), float(1 - high), float(1 - low))
