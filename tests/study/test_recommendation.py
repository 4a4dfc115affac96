"""The sentence that a study ends with: what was chosen, and what the decoder made of it."""

from __future__ import annotations

import pytest

from probekit.choice.choose import NO_DRAFTS, Candidate, Choice, choose
from probekit.choice.rank import rank
from probekit.costs.profile import Costs
from probekit.drafting.drafters import ExitLayer
from probekit.prediction.predict import predict
from probekit.study.summary import recommendation
from tests.choice.test_choice import linear_costs
from tests.traces.fabricate import fabricate


@pytest.fixture
def choice():
    costs = Costs("measured", "cpu", "float32", 128, 3, 1.0, {1: 0.3, 2: 0.6}, 0.1, {(1, 2): 1.0, (2, 2): 0.7})
    best = Candidate(ExitLayer(1), 2, 1.30, (1.25, 1.35), 2.5, 0.75)
    return Choice("toy", "greedy", (best,), costs, prompts=12)


def measured(speedup: float, predicted: float = 1.28) -> dict[str, float]:
    return {"speedup_measured": speedup, "speedup_predicted": predicted}


def test_what_was_measured_follows_what_was_predicted(choice):
    said = recommendation(choice, measured(1.25))
    assert said.startswith(choice.sentence())
    assert said.endswith("Measured on the other prompts: 1.25x.")


def test_no_gain_is_said(choice):
    assert "0.57x. That is no gain: do not draft so" in recommendation(choice, measured(0.57))


def test_where_a_lookup_pays_and_no_exit_the_lookup_is_recommended():
    """No layer ever agrees with a text that repeats one token."""
    trace = fabricate(agreement=[0.0] * 6, vocabulary=2, prompts=10)
    costs = linear_costs()
    choice = choose(predict(trace), costs, ways=rank(trace, costs))
    assert not choice.speculate and choice.interval is None
    assert choice.other_way is not None and choice.other_way.drafter.startswith(("ngram", "suffix"))
    ran = {"prompts": 4, "speedup_measured": 2.1}
    said = recommendation(choice, None, [ran])
    assert "do not speculate" not in said and "no exit layer pays" in said
    assert f"drafting with {choice.other_way.label}" in said and said.endswith("Measured on 4 other prompts: 2.10x.")
    alone = choose(predict(trace), costs)
    assert alone.other_way is None and "do not speculate" in alone.sentence()


def test_a_wide_miss_is_remarked_on(choice):
    said = recommendation(choice, measured(1.10))
    assert "Predicted for those prompts: 1.28x; a miss of over 15%" in said
    assert "miss" not in recommendation(choice, measured(1.12))


def test_without_a_choice_or_a_round_there_is_nothing_to_add(choice):
    assert recommendation(choice, None) == choice.sentence()
    assert recommendation(choice, {"speedup_measured": None, "speedup_predicted": None}) == choice.sentence()
    slow = Candidate(ExitLayer(1), 1, 0.9, None)
    refused = Choice("toy", "greedy", (slow,), choice.costs, prompts=12)
    assert refused.best is NO_DRAFTS
    assert recommendation(refused, None).startswith("toy: do not speculate")
