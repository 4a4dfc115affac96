"""Joint intervals and ways that cannot be told apart: prompts and calibrations drawn again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from choice.test_choice import linear_costs
from traces.fabricate import fabricate

from probekit.choice.certainty import certainty
from probekit.choice.choose import choose
from probekit.costs.batch import BatchCosts
from probekit.costs.blocks import redrawn
from probekit.prediction.intervals import bootstrap_ratio
from probekit.prediction.predict import predict


def with_blocks(costs, spread: float, blocks: int = 12, seed: int = 0):
    """Costs whose calibration had so many blocks; passes above the first exit vary in time, and nothing else does."""
    random = np.random.default_rng(seed)
    exits, rows = sorted(costs.early_s), sorted({count for _, count in costs.verify_s})
    steps = {"autoregressive": costs.autoregressive_s, "head first": costs.head_s, "booking 0": costs.overhead_s}
    steps |= {"booking 4": costs.overhead_s}
    for exit_layer in exits:
        early, head = costs.early_s[exit_layer], costs.heads_s.get(exit_layer, costs.head_s)
        steps |= {f"early {exit_layer}": early, f"early first {exit_layer}": early, f"head {exit_layer}": head}
        steps |= {f"verify {exit_layer} {count}": costs.verify_s[exit_layer, count] for count in rows}
    noisy = {
        step: tuple(seconds * np.exp(random.normal(0, spread if step.startswith("verify 1 ") else 0, blocks)))
        for step, seconds in steps.items()
    }
    return replace(costs, blocks=noisy)


@pytest.fixture(scope="module")
def prediction():
    return predict(fabricate(depth=6, prompts=24, tokens=40, agreement=[0.1, 0.7, 0.72, 0.74, 0.76, 0.9]))


def test_joint_intervals_are_wider_than_each_by_itself(prediction):
    costs = linear_costs()
    sure = certainty(prediction.cells, costs)
    seconds = [costs.rounds_seconds_of(cell.drafts, cell.draft_length) for cell in prediction.cells]
    low, high = bootstrap_ratio(
        np.array([cell.tokens_of_prompt * costs.autoregressive_s for cell in prediction.cells]),
        np.array([cell.rounds_by_drafted @ each for cell, each in zip(prediction.cells, seconds, strict=True)]),
    )
    ratio = np.log(sure.high / sure.low) / np.log(high / low)
    assert (ratio > 0.95).all()
    assert 1.1 < np.median(ratio) < 2


def test_a_jittery_calibration_widens_what_it_touches(prediction):
    calm, jittery = (certainty(prediction.cells, with_blocks(linear_costs(), spread)) for spread in (0.0, 0.3))
    width = np.log(jittery.high / jittery.low) / np.log(calm.high / calm.low)
    exits = np.array([cell.exit_layer for cell in prediction.cells])
    assert width[exits > 2].max() < 1.05 < width[exits == 1].min()
    assert width[exits == 1].max() > 2
    assert jittery.alike.sum() >= calm.alike.sum()


def test_drawn_costs_are_costs_of_drawn_blocks():
    costs = with_blocks(linear_costs(), 0.2)
    again = list(redrawn(costs, 30))
    assert len(again) == 30
    assert len({each.verify_s[1, 2] for each in again}) > 10
    assert {each.autoregressive_s for each in again} == {costs.autoregressive_s}
    assert list(redrawn(linear_costs(), 30)) == []  # nobody kept blocks


def test_what_cannot_be_told_apart_is_named(prediction):
    choice = choose(prediction, linear_costs())
    assert choice.alike
    assert {row["exit_layer"] for row in choice.to_json()["alike"]} == {each.exit_layer for each in choice.alike}
    assert "cannot be told apart" in choice.sentence()
    apart = choose(predict(fabricate(depth=6, prompts=24, tokens=60, agreement=[0.1, 1, 0, 0, 0, 0])), linear_costs())
    assert apart.exit_layer == 1
    assert {each.exit_layer for each in apart.alike} <= {1}


@pytest.mark.second
def test_the_winner_is_covered():
    """Cells that are equally good: the best one's joint interval still holds what it is worth on all prompts."""
    trace = fabricate(depth=6, prompts=240, tokens=30, agreement=[0.1, *[0.7] * 5])
    costs = linear_costs()
    whole = predict(trace, draft_lengths=[2, 3])
    held = []
    random = np.random.default_rng(0)
    truth = {}
    for cell in whole.cells:
        seconds = cell.rounds_by_drafted @ costs.rounds_seconds_of(cell.drafts, cell.draft_length)
        truth[cell.cell] = cell.tokens * costs.autoregressive_s / seconds.sum()
    for _ in range(150):
        some = random.integers(240, size=10)
        cells = [
            replace(
                cell, tokens_of_prompt=cell.tokens_of_prompt[some], rounds_by_drafted=cell.rounds_by_drafted[some],
                accepted_at=cell.accepted_at[some], rejections_of_prompt=cell.rejections_of_prompt[some],
            )
            for cell in whole.cells
        ]  # fmt: skip
        choice = choose(replace(whole, cells=tuple(cells), prompts=tuple(range(10))), costs)
        best = choice.ranking[0]
        held.append(best.interval[0] <= truth[best.cell] <= best.interval[1])
    assert np.mean(held) >= 0.92


def test_batches_of_one_row_are_prompts():
    """The intervals of batches come another way, from prompts that are put into new batches."""
    replayed = predict(fabricate(depth=6, prompts=24, tokens=40, agreement=[0.1, 0.7, 0.72, 0.74, 0.76, 0.9]),
                       with_rounds=True)  # fmt: skip
    costs = with_blocks(linear_costs(), 0.05)
    alone, one, four = (
        choose(replayed, each)
        for each in (costs, BatchCosts({1: costs}), BatchCosts({1: costs, 4: replace(costs, rows=4)}))
    )
    assert [each.cell for each in one.ranking] == [each.cell for each in alone.ranking]
    for mine, theirs in zip(one.ranking, alone.ranking, strict=True):
        assert mine.speedup == pytest.approx(theirs.speedup)
        assert mine.interval == pytest.approx(theirs.interval, rel=0.03)
    # as dear as one row: a round of four lasts as long as its longest row, and texts end at different times
    assert all(mine.speedup < theirs.speedup for mine, theirs in zip(four.ranking[:5], one.ranking, strict=False))
