"""How sure the speedups of a ranking are: other prompts, other moments of calibration, and the best of many.

A speedup varies for two reasons that have nothing to do with each other: which prompts were traced, and in which moment
the costs were measured. Both are drawn again, and their standard errors added in quadrature, on a logarithmic scale.
The fastest of many ways looks faster than it is, since it was selected for that; so the intervals are joint: at 95 %
all of them hold at once, whichever is picked (the largest deviation of any way, in its own standard errors, is what is
drawn; J. Romano and M. Wolf, Econometrica 73, 2005). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from probekit.costs.blocks import redrawn
from probekit.costs.profile import Costs
from probekit.prediction.intervals import FEW_PROMPTS, drawn_indices, draws, standard_errors
from probekit.prediction.joint import in_order, joint_rounds
from probekit.prediction.table import Cell

CALIBRATIONS = 200
REBATCHED = 400  # draws of prompts that are put into batches: each is replayed
_CONFIDENCE = 0.95
_AT_ONCE = 2**24  # steps of drawn prompts that are held


class Certainty(NamedTuple):
    """low, high: (ways,) joint 95 % intervals of the speedups; NaN with fewer than two prompts. alike: (ways,) bool,
    not clearly slower than the fastest, which is among them."""

    low: np.ndarray
    high: np.ndarray
    alike: np.ndarray


def certainty(cells: Sequence[Cell], costs: Costs) -> Certainty:
    """Of the speedups of cells, in their order, over autoregressive decoding on the same costs."""
    seconds = [costs.rounds_seconds_of(cell.drafts, cell.draft_length) for cell in cells]
    plain = np.array([cell.tokens_of_prompt * costs.autoregressive_s for cell in cells], float)
    drafting = np.array([cell.rounds_by_drafted @ each for cell, each in zip(cells, seconds, strict=True)])
    totals = [cell.rounds_by_drafted.sum(axis=0) for cell in cells]

    def total_s(again: Costs) -> list[float]:
        return [
            float(total @ again.rounds_seconds_of(cell.drafts, cell.draft_length))
            for cell, total in zip(cells, totals, strict=True)
        ]

    return joint_certainty(plain, drafting, total_s, costs)


def joint_certainty(
    plain: np.ndarray,
    drafting: np.ndarray,
    total_s: Callable[[Costs], Sequence[float]],
    costs: Costs,
    best: int | None = None,
) -> Certainty:
    """Of any ways of drafting.

    plain, drafting: (ways, prompts) seconds of autoregressive decoding, and with drafts. total_s: the seconds of each
    way's same rounds by other costs. best: the place of the way that others are compared with; by default the fastest.
    """
    ways, prompts = plain.shape
    speedups = plain.sum(axis=1) / drafting.sum(axis=1)
    best = int(speedups.argmax()) if best is None else best
    if prompts < 2:
        unknown = np.full(ways, np.nan)
        return Certainty(unknown, unknown, np.ones(ways, bool))

    calibrated = _calibration_draws(total_s, costs, ways)  # (calibrations, ways) logarithms, around 0
    times = draws(prompts)
    one = np.ones((1, prompts))
    value, error = _logarithms(plain, drafting, one)
    drawn, _ = _logarithms(plain, drafting, times)
    slower, slower_error = _behind(plain, drafting, best, one)
    drawn_behind, _ = _behind(plain, drafting, best, times)
    of_prompts = _Drawn(drawn - value, error[:, 0], slower[:, 0], drawn_behind - slower, slower_error[:, 0])
    return _joint(speedups, best, of_prompts, calibrated, prompts, costs.block_count)


class BatchSeconds(NamedTuple):
    """What batches take, whichever prompts they are made of.

    drafted: (ways) tables of (prompts, rounds) drafts, as `prediction.joint.own_rounds` makes them; steps: the same of
    autoregressive decoding. plain_s: (rows + 1,) and round_s: (ways) tables of (rows + 1, drafts + 1) seconds.
    """

    drafted: Sequence[np.ndarray]
    steps: np.ndarray
    plain_s: np.ndarray
    round_s: Sequence[np.ndarray]

    def speedups(self, batches: np.ndarray) -> np.ndarray:
        """(ways, ...) over batches of prompts, (..., batches, rows)."""
        plain = self.plain_s[joint_rounds(self.steps, batches).rows].sum(axis=(-1, -2))
        found = []
        for drafted, seconds in zip(self.drafted, self.round_s, strict=True):
            rounds = joint_rounds(drafted, batches)
            found.append(plain / seconds[rounds.rows, rounds.drafted].sum(axis=(-1, -2)))
        return np.stack(found)


def batch_certainty(seconds: BatchSeconds, again: Sequence[BatchSeconds], rows: int, blocks: int) -> Certainty:
    """Of the speedups of batches: prompts are drawn again, and put into new batches.

    again: the same by costs that were drawn again. blocks: of the calibration.
    """
    prompts = len(seconds.steps)
    order = in_order(prompts, rows)
    speedups = seconds.speedups(order)
    best = int(speedups.argmax())
    if prompts < 2:
        unknown = np.full(len(speedups), np.nan)
        return Certainty(unknown, unknown, np.ones(len(speedups), bool))
    calibrated = np.log([each.speedups(order) for each in again]).reshape(-1, len(speedups))
    calibrated = calibrated - calibrated.mean(axis=0) if len(calibrated) else calibrated
    some = np.array_split(
        drawn_indices(prompts, REBATCHED), 1 + prompts * seconds.steps.shape[1] * REBATCHED // _AT_ONCE
    )
    drawn = np.log(np.concatenate([seconds.speedups(each[:, order]) for each in some], axis=1))  # (ways, draws)
    behind = drawn - drawn[[best]]
    value = np.log(speedups)
    wider = np.sqrt(prompts / (prompts - 1))  # a bootstrap's spread is too small by that
    of_prompts = _Drawn(
        drawn - drawn.mean(axis=1, keepdims=True), wider * drawn.std(axis=1), value - value[best],
        behind - behind.mean(axis=1, keepdims=True), wider * behind.std(axis=1),
    )  # fmt: skip
    return _joint(speedups, best, of_prompts, calibrated, prompts, blocks)


class _Drawn(NamedTuple):
    """Logarithms of the speedups over drawn prompts, around their value, (ways, draws), and their standard errors,
    (ways,); how far each is behind the best one, (ways,), and the same of that."""

    deviations: np.ndarray
    errors: np.ndarray
    behind: np.ndarray
    behind_deviations: np.ndarray
    behind_errors: np.ndarray


def _joint(
    speedups: np.ndarray, best: int, drawn: _Drawn, calibrated: np.ndarray, prompts: int, blocks: int
) -> Certainty:
    """calibrated: (calibrations, ways) logarithms of the speedups by other moments of calibration, around 0."""
    ways = len(speedups)
    of_costs = calibrated.std(axis=0, ddof=1) if len(calibrated) else np.zeros(ways)
    behind = calibrated - calibrated[:, [best]]
    behind_of_costs = behind.std(axis=0, ddof=1) if len(calibrated) else np.zeros(ways)
    which = np.arange(drawn.deviations.shape[1]) % max(1, len(calibrated))
    shift = calibrated[which].T if len(calibrated) else np.zeros((ways, 1))
    shift_behind = behind[which].T if len(calibrated) else np.zeros((ways, 1))

    whole = np.hypot(drawn.errors, of_costs)
    half = _reach(drawn.deviations + shift, whole, prompts, blocks) * whole
    apart = np.hypot(drawn.behind_errors, behind_of_costs)
    limit = _reach(drawn.behind_deviations + shift_behind, apart, prompts, blocks)
    alike = drawn.behind + limit * apart >= 0
    alike[best] = True
    return Certainty(speedups * np.exp(-half), speedups * np.exp(half), alike)


def _calibration_draws(total_s: Callable[[Costs], Sequence[float]], costs: Costs, ways: int) -> np.ndarray:
    """(calibrations, ways): logarithms of the speedups by costs that are drawn again, around their mean."""
    found = [np.log(again.autoregressive_s / np.array(total_s(again))) for again in redrawn(costs, CALIBRATIONS)]
    drawn = np.array(found).reshape(-1, ways)
    return drawn - drawn.mean(axis=0) if len(drawn) else drawn


def _logarithms(plain: np.ndarray, drafting: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ways, draws): logarithms of the speedups over drawn prompts, and their standard errors."""
    slow, fast = plain @ times.T, drafting @ times.T
    value = np.log(slow / fast)
    return value, standard_errors([plain, drafting], [1 / slow, -1 / fast], times, np.ones_like(value))


def _behind(plain: np.ndarray, drafting: np.ndarray, best: int, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ways, draws): logarithms of each speedup over the best one's, the same prompts drawn for both."""
    columns = [plain, drafting, plain[[best]], drafting[[best]]]
    sums = [column @ times.T for column in columns]
    value = np.log(sums[0] / sums[1]) - np.log(sums[2] / sums[3])
    signs = (1, -1, -1, 1)
    slopes = [sign / each for sign, each in zip(signs, sums, strict=True)]
    return value, standard_errors(columns, slopes, times, np.ones_like(value))


def _reach(deviations: np.ndarray, errors: np.ndarray, prompts: int, blocks: int) -> float:
    """Standard errors that all intervals reach at once. deviations: (ways, draws); errors: (ways,).

    The largest deviation of any way, in standard errors, as Student's t is wider than the normal distribution: each
    draw's own standard errors would make the largest of many heavy-tailed ones. With few prompts, a single interval's.
    """
    freedom = min(prompts, blocks or prompts) - 1
    student = float(stats.t.ppf((1 + _CONFIDENCE) / 2, freedom))
    if prompts < FEW_PROMPTS:
        return student
    usable = errors > 0
    worst = np.max(np.abs(deviations[usable]) / errors[usable, None], axis=0, initial=0.0)
    joint = float(np.quantile(worst, _CONFIDENCE)) / float(stats.norm.ppf((1 + _CONFIDENCE) / 2))
    return student * max(1.0, joint * np.sqrt(prompts / (prompts - 1)))
