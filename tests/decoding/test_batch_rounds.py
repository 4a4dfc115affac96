"""A batch's rounds as they are predicted, and as the decoder makes them: row by row, pass by pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from costs.test_costs import WorkClock

from probekit.choice.choose import choose
from probekit.costs import timing
from probekit.costs.batch import BatchCosts
from probekit.costs.measure import measure_batch, measure_costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.batch import DecodeBatch
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.drafting.policies import ConfidenceThreshold
from probekit.errors import InputError
from probekit.models.loaded import load
from probekit.prediction.joint import check_batch, in_order, joint_rounds, own_rounds, rounds_of_prompts
from probekit.prediction.predict import predict
from probekit.settings import Sampling
from probekit.tracing.prompts import bundled_prompts_for
from probekit.tracing.tracer import trace

NEW = 20


@pytest.fixture(scope="module")
def tales():
    return load("tales-layerskip", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def run(tales):
    return trace(tales, bundled_prompts_for(tales.name)[::3][:7], max_new_tokens=NEW, statistics="all")


@pytest.fixture
def seen(monkeypatch):
    """(rows that go on, drafts of the round) of every verification, autoregressive steps among them."""
    rounds: list[tuple[int, int]] = []
    verify = DecodeBatch.verify

    def watched(self, tree, logits):
        rounds.append((len(self.rows), tree.tokens.shape[1]))
        return verify(self, tree, logits)

    monkeypatch.setattr(DecodeBatch, "verify", watched)
    return rounds


def joint(drafted, places) -> list[tuple[int, int]]:
    rounds = joint_rounds(drafted, np.asarray(places))
    return [pair for pair in zip(rounds.rows.tolist(), rounds.drafted.tolist(), strict=True) if pair[0]]


def prompts_of(run, places):
    return [run.prompt_ids(run.prompts[place]).tolist() for place in places]


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize(("exit_layer", "length"), [(1, 2), (3, 4), (6, 5)])
def test_the_decoders_own_rounds(tales, run, seen, rows, exit_layer, length):
    """Every pass of every batch, in its order: how many rows took part, and how many tokens were drafted."""
    prediction = predict(run, [exit_layer], [length], with_rounds=True)
    drafted = rounds_of_prompts(prediction, prediction.keys[0], length)
    for places in in_order(len(run), rows):
        seen.clear()
        SelfSpeculative(tales, exit_layer, length).decode(prompts_of(run, places), max_new_tokens=NEW)
        assert seen == joint(drafted, places)


def test_a_policy_and_plain_decoding_in_a_batch(tales, run, seen):
    policy = ConfidenceThreshold(0.5)
    prediction = predict(run, [3], [4], with_rounds=True, policy=policy)
    decoded = Speculative(tales, prediction.cells[0].drafts, 4, policy=policy).decode(
        prompts_of(run, range(5)), max_new_tokens=NEW
    )
    assert seen == joint(own_rounds(each.drafted for each in decoded), range(5))
    seen.clear()
    Autoregressive(tales).decode(prompts_of(run, range(5)), max_new_tokens=NEW)
    steps = own_rounds([0] * int(tokens) for tokens in prediction.cells[0].tokens_of_prompt)
    assert seen == joint(steps, range(5))


def test_rounds_side_by_side():
    drafted = own_rounds([[3, 3, 1], [2], [3, 2, 2, 0]])
    assert joint(drafted, [0, 1]) == [(2, 3), (1, 3), (1, 1)]
    assert joint(drafted, [1, 2, 0]) == [(3, 3), (2, 3), (2, 2), (1, 0)]
    assert joint(drafted, [1, 1]) == [(2, 2)]
    assert in_order(7, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]


class RowsClock(WorkClock):
    """The same for a batch: 10 a layer and 1 a token of it; 20 a head and 3 a token."""

    def watch(self, loaded) -> None:
        for modules, once, each in ((loaded.anatomy.layers, 10, 1), ([loaded.anatomy.head], 20, 3)):
            for module in modules:

                def count(_module, _args, output, once=once, each=each):
                    self.now += once + each * output.shape[:-1].numel()

                self.hooks.callback(module.register_forward_hook(count).remove)


@pytest.fixture
def rows_clock(monkeypatch):
    clock = RowsClock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr("probekit.decoding.batch.perf_counter", clock.perf_counter)
    with clock.hooks:
        yield clock


def test_a_predicted_speedup_is_that_of_the_decoders_work(tales, run, rows_clock):
    """By a clock that counts work: the speedup of batches of 4 at every cell, the last batch filled up."""
    rows_clock.watch(tales)
    costs = measure_batch(tales, 32, rows=4, draft_lengths=[4], repeats=2)
    assert sorted(costs.by_rows) == [1, 2, 4] and costs.whole.rows == 4
    assert costs.plain_seconds().tolist() == [0, *(12 * (10 + rows) + 20 + 3 * rows for rows in range(1, 5))]
    choice = choose(predict(run, [1, 3, 6], [2, 4], with_rounds=True), costs)
    assert len(choice.ranking) == 6 and choice.costs.rows == 4 and "4 rows" in choice.sentence()
    batches = [prompts_of(run, places) for places in in_order(len(run), 4)]

    def seconds(decoder):
        took = 0.0
        for batch in batches:
            done = decoder.decode(batch, max_new_tokens=NEW)
            took += max(each.seconds["total"] for each in done) - done[0].seconds["prefill"]
        return took

    plain = seconds(Autoregressive(tales))
    for each in choice.ranking:
        assert each.speedup == pytest.approx(plain / seconds(SelfSpeculative(tales, *each.cell)))
        assert each.interval[0] < each.speedup < each.interval[1]


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({"with_rounds": True}, 8, "a batch of 8 rows needs as many prompts; there are 7"),
        ({}, 2, "follow from every prompt's own"),
        ({"with_rounds": True, "first_round": "draft"}, 2, "rounds begin after the prefill"),
    ],
)
def test_a_prediction_that_says_nothing_of_a_batch(run, settings, rows, message):
    with pytest.raises(InputError, match=message):
        check_batch(predict(run, [3], [2], **settings), rows)


def test_sampled_text_shares_no_rounds(tales):
    sampled = trace(tales, ["Once upon", "The wolf"], max_new_tokens=8, sampling=Sampling(temperature=1.0))
    with pytest.raises(InputError, match="the rounds of sampled text are expected ones"):
        check_batch(predict(sampled, [3], [2], with_rounds=True), 2)


def test_costs_that_make_no_batch(tiny):
    one, four = (measure_costs(tiny, 12, draft_lengths=[2], rows=rows, repeats=1) for rows in (1, 4))
    assert BatchCosts({1: one, 4: four}).rows == 4
    for costs in ({4: four}, {1: one, 2: four}, {1: one, 4: replace(four, depth=7)}):
        with pytest.raises(InputError, match="batch"):
            BatchCosts(costs)
    with pytest.raises(InputError, match="records rounds of one row, not of 4"):
        measure_costs(tiny, 12, rows=4, engine="cuda")
