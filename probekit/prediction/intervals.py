"""Intervals: pooled ratios over prompts that are drawn again, and paired differences. Needs no torch.

Prompts are what is drawn: tokens of one text depend on each other, texts of different prompts do not.

Ratios and their differences have symmetric bootstrap-t intervals (P. Hall, On symmetric bootstrap confidence intervals,
J. R. Stat. Soc. B 50, 1988): of each draw, how many of *its own* standard errors it lies from the ratio; the 95 %
quantile of that times the ratio's standard error. A percentile of the drawn ratios, as before, forgets that the spread
itself is known from a few prompts only, and held the truth in 86 % of the cases at 8 prompts. Other statistics, for
which no standard error is at hand, have percentiles that are widened as Student's t is (T. Hesterberg, What teachers
should know about the bootstrap, Am. Stat. 69, 2015, section 4.4.2). `analyses/coverage_of_intervals.py` counts how
often each kind holds the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from probekit.errors import InputError

RESAMPLES = 2000
FEW_PROMPTS = 8
"""Below this too few different draws exist for a bootstrap-t: Student's t stands in, and every result says `few`."""
LEAST_PROMPTS = 4
"""Below this no interval of a speedup is given: a few prompts that happen to agree would look like certainty."""
SHARE = (0.0, 1.0)
"""Bounds of a share of a count."""
UNBOUNDED = (-np.inf, np.inf)
_BLOCK = 2**22  # drawn prompts that are held at once
_ALIKE = 1e-7  # a standard error below this share of its ratio is rounding


def bootstrap_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] = UNBOUNDED,
) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of pooled ratios: numerators.sum() / denominators.sum() over prompts that are drawn again.

    Symmetric bootstrap-t, paired: a prompt brings its numerator and its denominator, and the same prompts are drawn for
    every ratio. Ratios of counts and times are judged on a logarithmic scale, so that an end is never below 0.

    Parameters
    ----------
    numerators, denominators: (..., prompts), broadcast against each other.
    confidence: how often the interval shall hold the truth.
    bounds: the least and the largest value that the ratio can have.

    Returns low and high, (...), float64; NaN where the ratio is not defined, and with fewer than two prompts.
    """
    above, below = np.broadcast_arrays(np.asarray(numerators), np.asarray(denominators))
    shape, prompts = above.shape[:-1], above.shape[-1]
    if prompts < 2:
        return np.full(shape, np.nan), np.full(shape, np.nan)
    above, below = above.reshape(-1, prompts), below.reshape(-1, prompts)
    low, high = np.empty(len(above)), np.empty(len(above))
    for first in range(0, len(above), step := max(1, 4_000_000 // resamples)):
        some = slice(first, first + step)
        times = draws_in_blocks(prompts, resamples, seed)
        low[some], high[some] = _ratio_interval(above[some], below[some], times, confidence)
    return np.clip(low, *bounds).reshape(shape), np.clip(high, *bounds).reshape(shape)


def _ratio_interval(
    above: np.ndarray, below: np.ndarray, times: Iterable[np.ndarray], confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """(ratios,) low and high of above, below: (ratios, prompts). times: blocks of (draws, prompts).

    Of many prompts some ratios at a time are made floats of, so that little is held beside the counts.
    """
    prompts = above.shape[1]
    step = max(1, _BLOCK // prompts)
    some = [slice(first, first + step) for first in range(0, len(above), step)]

    def ratios(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [_ratios(above[each].astype(np.float64), below[each].astype(np.float64), block) for each in some]
        values, errors = zip(*found, strict=True)
        return np.concatenate(values), np.concatenate(errors)

    [ratio], [error] = (each.T for each in ratios(np.ones((1, prompts))))
    blocks = zip(*(ratios(block) for block in times), strict=True)
    drawn, errors = (np.concatenate(each, axis=1) for each in blocks)
    positive = (above >= 0).all(axis=1) & (ratio > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = (drawn - ratio[:, None]) / errors
        logarithmic = np.log(drawn / ratio[:, None]) * drawn / errors
        half = critical_value(np.where(positive[:, None], logarithmic, plain), confidence, prompts) * error
        low = np.where(positive, ratio * np.exp(-half / ratio), ratio - half)
        high = np.where(positive, ratio * np.exp(half / ratio), ratio + half)
    return low, high


def _ratios(above: np.ndarray, below: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pooled ratios of drawn prompts and their standard errors, (ratios, draws) each; NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = 1 / (below @ times.T)
        ratio = (above @ times.T) * whole
        return ratio, standard_errors([above, below], [whole, -ratio * whole], times, np.abs(ratio))


def standard_errors(
    columns: Sequence[np.ndarray], slopes: Sequence[np.ndarray], times: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """(..., draws): standard errors of statistics that are linear in their prompts to first order.

    columns: (..., prompts) each, what was counted. slopes: (..., draws) each, the derivative by that column's sum.
    times: (draws, prompts) how often each prompt was drawn. size: of the statistic: what is much less is rounding, 0.
    """
    prompts = times.shape[1]
    total = np.zeros(np.broadcast_shapes(*(slope.shape for slope in slopes)))
    for one, (mine, my_slope) in enumerate(zip(columns, slopes, strict=True)):
        for other, (theirs, their_slope) in enumerate(zip(columns[: one + 1], slopes, strict=False)):
            total += (1 if one == other else 2) * my_slope * their_slope * ((mine * theirs) @ times.T)
    with np.errstate(invalid="ignore"):
        errors = np.sqrt(np.maximum(total, 0.0) * prompts / (prompts - 1))
        return np.where(errors > _ALIKE * size, errors, 0.0)


def critical_value(deviations: np.ndarray, confidence: float, prompts: int) -> np.ndarray:
    """(...): standard errors that an interval reaches to both sides.

    deviations: (..., draws) of the drawn statistics from the statistic, in their own standard errors; draws that are
    not finite are left out. Student's t where there are few prompts, or no draw is left.
    """
    student = float(stats.t.ppf((1 + confidence) / 2, prompts - 1))
    missing = ~np.isfinite(deviations)
    none = missing.all(axis=-1)
    if prompts < FEW_PROMPTS:
        return np.full(none.shape, student)
    found = np.where(missing, np.nan, np.abs(deviations))
    found[none] = student
    quantiles = np.nanquantile(found, confidence, axis=-1) if missing.any() else np.quantile(found, confidence, axis=-1)
    return np.asarray(quantiles)


def interval_or_none(low: float, high: float) -> tuple[float, float] | None:
    return None if np.isnan(low) else (float(low), float(high))


def interval_of(low: float, high: float, prompts: int) -> tuple[float, float] | None:
    """The interval of a figure over so many prompts; None where there is none to have."""
    return None if prompts < LEAST_PROMPTS or np.isnan(low) else (float(low), float(high))


def listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Share:
    """sum of numerators / sum of denominators, both over prompts.

    numerators, denominators: (..., prompts), the same shape, float64. prompts: their indices. bounds: the least and the
    largest value that it can have: SHARE for a count among a count.
    """

    numerators: np.ndarray
    denominators: np.ndarray
    prompts: tuple[int, ...]
    bounds: tuple[float, float] = UNBOUNDED

    def __post_init__(self) -> None:
        above, below = np.broadcast_arrays(
            np.asarray(self.numerators, np.float64), np.asarray(self.denominators, np.float64)
        )
        if above.ndim == 0 or above.shape[-1] != len(self.prompts):
            raise InputError(f"a share of shape {above.shape} does not end in its {len(self.prompts)} prompts.")
        object.__setattr__(self, "numerators", above)
        object.__setattr__(self, "denominators", below)

    @property
    def values(self) -> np.ndarray:
        """(...): the pooled ratios; NaN where nothing was counted."""
        above, below = self.numerators.sum(axis=-1), self.denominators.sum(axis=-1)
        return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), (...) each: 95 %, bootstrap-t over prompts."""
        return bootstrap_ratio(self.numerators, self.denominators, bounds=self.bounds)

    def redrawn(self, times: np.ndarray) -> np.ndarray:
        """(..., resamples): the ratios of prompts that were drawn `times`, (resamples, prompts)."""
        above, below = self.numerators @ times.T, self.denominators @ times.T
        return np.where(below > 0, above / np.where(below > 0, below, 1.0), self.values[..., None])

    def at(self, index: Any) -> Share:
        """The share at an index into the leading axes."""
        return Share(self.numerators[index], self.denominators[index], self.prompts, self.bounds)

    def of(self, prompts: list[int]) -> Share:
        """The share of some of its prompts, in that order."""
        places = [self.prompts.index(prompt) for prompt in prompts]
        return Share(self.numerators[..., places], self.denominators[..., places], tuple(prompts), self.bounds)


def drawn_indices(prompts: int, resamples: int = RESAMPLES, seed: int | np.random.Generator = 0) -> np.ndarray:
    """(resamples, prompts): indices of prompts that are drawn with replacement, as many as there are."""
    return np.random.default_rng(seed).integers(prompts, size=(resamples, prompts))


def draws_in_blocks(prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """The same as `draws`, some rows at a time: all of them would take 1.6 GB for 100,000 prompts."""
    random, step = np.random.default_rng(seed), max(1, _BLOCK // prompts)
    for first in range(0, resamples, step):
        yield _counted(drawn_indices(prompts, min(step, resamples - first), random))


def draws(prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(resamples, prompts) float64: how often each prompt is drawn, with replacement, as many as there are."""
    return _counted(drawn_indices(prompts, resamples, seed))


def _counted(drawn: np.ndarray) -> np.ndarray:
    """Indices that were drawn -> how often each was, (resamples, prompts) float64."""
    rows = np.arange(len(drawn))[:, None] * drawn.shape[1]
    return np.bincount((drawn + rows).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def spread(draws_of_statistic: np.ndarray, prompts: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % quantiles of draws, (..., resamples); NaN draws are left out.

    prompts: how many were drawn from: the quantiles are then as much farther out as Student's t is than the normal
    distribution, and as the bootstrap's spread is too small by: (n - 1) / n of the variance.
    """
    missing = np.isnan(draws_of_statistic).all(axis=-1)
    filled = np.where(missing[..., None], 0.0, draws_of_statistic)
    tail = 0.025
    if prompts is not None and prompts > 1:
        tail = float(stats.norm.cdf(-np.sqrt(prompts / (prompts - 1)) * stats.t.ppf(0.975, prompts - 1)))
    low, high = np.nanquantile(filled, [tail, 1 - tail], axis=-1)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def estimate(share: Share, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A function of pooled shares with its interval: widened percentiles, since it may have no standard error.

    statistic: takes the shares, (..., draws), and returns (draws,).
    """
    value = float(statistic(share.values[..., None])[0])
    prompts = len(share.prompts)
    if prompts < 2:
        return Estimate(value, np.nan, np.nan)
    low, high = spread(statistic(share.redrawn(draws(prompts))), prompts)
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True, eq=False)
class Difference:
    """values: (...), one minus other; low, high: their 95 % intervals. paired: the same prompts were drawn for both.

    p: (...) how often prompts between which there is no difference would show as large a one: to be corrected where
    several differences are judged together (`holm`).
    """

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    paired: bool
    p: np.ndarray

    @property
    def clear(self) -> np.ndarray:
        """(...) bool: the interval leaves out 0, of each difference by itself."""
        return (self.low > 0) | (self.high < 0)


def difference(one: Share, other: Share, *, paired: bool = True, resamples: int = RESAMPLES) -> Difference:
    """one - other, with its bootstrap-t interval.

    paired: each draw takes the same prompts for both, which must then have the same ones; otherwise each draws its own.
    """
    if paired and one.prompts != other.prompts:
        raise InputError("paired shares need the same prompts.", "Select them first, or compare unpaired.")
    values = one.values - other.values
    fewest = min(len(one.prompts), len(other.prompts))
    if fewest < 2:
        unknown = np.full(values.shape, np.nan)
        return Difference(values, unknown, unknown, paired, unknown)

    def judged(mine: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., draws): differences and their standard errors."""
        found, columns, slopes = [], [], []
        for share, times in ((one, mine), (other, theirs)):
            with np.errstate(invalid="ignore", divide="ignore"):
                whole = 1 / (share.denominators @ times.T)
                ratio = (share.numerators @ times.T) * whole
            found.append(ratio)
            columns.append([share.numerators, share.denominators])
            slopes.append([whole, -ratio * whole])
        size = np.abs(found[0]) + np.abs(found[1])
        if paired:
            turned = [-slope for slope in slopes[1]]
            return found[0] - found[1], standard_errors([*columns[0], *columns[1]], [*slopes[0], *turned], mine, size)
        alone = [standard_errors(*each, size) for each in zip(columns, slopes, (mine, theirs), strict=True)]
        return found[0] - found[1], np.hypot(*alone)

    _, error = judged(np.ones((1, len(one.prompts))), np.ones((1, len(other.prompts))))
    times = draws(len(one.prompts), resamples)
    drawn, errors = judged(times, times if paired else draws(len(other.prompts), resamples, seed=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        deviations = (drawn - values[..., None]) / errors
        half = critical_value(deviations, 0.95, fewest) * error[..., 0]
        p = chance_of(np.abs(values) / error[..., 0], deviations, fewest)
    p = np.where(values == 0, 1.0, p)
    return Difference(values, values - half, values + half, paired, p)


def chance_of(found: np.ndarray, deviations: np.ndarray, prompts: int) -> np.ndarray:
    """(...): how often a statistic lies `found` standard errors or more from its truth, by its draws (`deviations`,
    (..., draws)), or by Student's t where there are few prompts or no draws. NaN for NaN."""
    student = 2 * stats.t.sf(found, prompts - 1)
    finite = np.isfinite(deviations)
    with np.errstate(invalid="ignore"):
        beyond = (finite & (np.abs(deviations) >= found[..., None])).sum(axis=-1)
    drawn = (1 + beyond) / (1 + finite.sum(axis=-1))
    usable = finite.any(axis=-1) & (prompts >= FEW_PROMPTS) & ~np.isnan(found)
    return np.where(usable, drawn, student)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values of several differences that are judged together, adjusted: below 5 % is clear, all of them at once.

    S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6, 1979. NaN stays NaN, and does
    not count.
    """
    p = np.asarray(p, np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
