"""Drafters as values: their names, their signal off a trace, and what runs in a decoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from traces.fabricate import fabricate

from probekit.choice.choose import choose
from probekit.costs.measure import measure_costs
from probekit.costs.roofline import roofline_costs
from probekit.decoding.decode import decode
from probekit.decoding.speculative import Speculative
from probekit.drafting.drafters import DraftModel, ExitLayer, equipped, traced_drafters
from probekit.drafting.keys import DrafterKey
from probekit.drafting.policies import FIXED, ConfidenceThreshold, drafts_allowed, policy_named
from probekit.drafting.trees import DraftTree
from probekit.errors import InputError
from probekit.lens.exit_heads import ExitHead, fingerprint, fit_heads, pack_heads
from probekit.models.synthetic import synthetic
from probekit.prediction.predict import predict
from probekit.tracing.tracer import trace
from probekit.validation.run import validate


@pytest.fixture(scope="module")
def dialled():
    """A random model whose exits agree with it now and then."""
    return synthetic("tiny", seed=5, exit_layer=2, dial=0.15)


@pytest.fixture(scope="module")
def run(dialled, tiny_draft):
    return trace(dialled, [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], max_new_tokens=24, draft_model=tiny_draft)


# -- names
def test_equal_ways_of_drafting_have_equal_names():
    assert DrafterKey.exit(3) == DrafterKey.exit(3) != DrafterKey.exit(4)
    assert len({DrafterKey.exit(3), DrafterKey.exit(3, rows=9), DrafterKey.exit(3, exit_heads="a")}) == 3
    key = DrafterKey.draft_model("small")
    assert (key.label, key.method, key.exit_or_null, key.model) == ("small", "speculative", None, "small")
    assert DrafterKey.exit(3).label == "layer 3"


def test_a_key_knows_what_json_calls_it():
    assert DrafterKey.exit(3).names(3) and DrafterKey.exit(3).names(DrafterKey.exit(3))
    assert not DrafterKey.exit(3).names(None)
    assert DrafterKey.draft_model("small").names(None)
    assert not DrafterKey.draft_model("small").names(0)


# -- off a trace
def test_the_drafters_of_a_trace(run):
    keys = [each.key for each in traced_drafters(run)]
    assert keys == [*(DrafterKey.exit(layer) for layer in range(1, run.depth)), DrafterKey.draft_model("tiny-draft")]
    assert [each.key.exit_layer for each in traced_drafters(run, [2])] == [2]
    with pytest.raises(InputError, match="no draft model"):
        traced_drafters(fabricate(), draft_model=True)


def test_any_list_of_drafters_is_predicted(run):
    exits, helper = ExitLayer(3), DraftModel("tiny-draft")
    some = predict(run, draft_lengths=[2], drafters=[helper, exits])
    assert [cell.key for cell in some.cells] == [helper.key, exits.key]
    whole = predict(run, draft_lengths=[2])
    for cell in some.cells:
        assert cell.to_json() == whole.cell(cell.key, 2).to_json()


# -- in a decoder
def test_a_choice_is_decoded_as_it_was_chosen(dialled, run, tiny_draft):
    prediction = predict(run)
    for costs in (roofline_costs(dialled, bandwidth=1e10, flops=1e11), roofline_costs(run, drafter=tiny_draft)):
        choice = choose(prediction, costs)
        done = decode(dialled, [1, 2, 3], choice, draft_model=tiny_draft, max_new_tokens=24)
        assert (done.method, done.exit_layer) == (choice.method, choice.exit_layer)
        assert done.draft_length == (choice.draft_length or 0)
        assert done.tokens == decode(dialled, [1, 2, 3], max_new_tokens=24).tokens
        if choice.speculate:
            rounds = next(
                each for each in predict(run, with_rounds=True).rounds
                if (each.prompt, each.key, each.draft_length) == (0, choice.best.key, choice.draft_length)
            )  # fmt: skip
            assert (tuple(done.drafted), tuple(done.accepted)) == (rounds.drafted, rounds.accepted)


def test_a_choice_brings_its_exit_heads_and_its_rows(dialled, run):
    texts = [torch.tensor([run.prompt_ids(0).tolist() + run.outputs(0).tolist()])]
    fitted = fit_heads(dialled.anatomy, texts)
    order = run.frequent_tokens()
    traced = trace(dialled, [[1, 2, 3], [4, 5]], max_new_tokens=24, exit_heads=fitted, draft_vocabulary=order)
    prediction = predict(traced, [2], [3], draft_rows=20, with_rounds=True)
    costs = roofline_costs(dialled, bandwidth=1e10, flops=1e11, draft_rows=20, exit_heads=prediction.exit_heads)
    choice = choose(prediction, replace(costs, autoregressive_s=1.0))  # dear steps: speculation pays
    assert choice.speculate and choice.exit_heads and choice.draft_rows == 20
    done = decode(dialled, [1, 2, 3], choice, max_new_tokens=24)
    assert tuple(done.accepted) == prediction.rounds[0].accepted
    assert done.tokens == traced.outputs(0).tolist()


def test_a_choice_of_a_draft_model_wants_it(dialled, run):
    costs = replace(roofline_costs(dialled), autoregressive_s=1.0)
    only = predict(run, draft_lengths=[2], drafters=[DraftModel("tiny-draft")])
    helper = measure_costs(dialled, 8, drafter=synthetic("tiny-draft", seed=3), repeats=1).draft_model
    choice = choose(only, replace(costs, draft_model=helper))
    assert choice.method == "speculative"
    with pytest.raises(InputError, match="needs that model"):
        decode(dialled, [1, 2, 3], choice)
    with pytest.raises(InputError, match="a choice and draft_length were both given"):
        decode(dialled, [1, 2, 3], choice, draft_length=2)


def test_what_is_not_there_is_named(dialled):
    with pytest.raises(InputError, match="the 9 tokens that layer 2 drafts among are not known"):
        ExitLayer(2, rows=9).on(dialled)
    assert equipped(ExitLayer(2), exit_heads={3: "a head"}).exit_head is None
    assert equipped(ExitLayer(3), exit_heads={3: "a head"}).exit_head == "a head"


def test_branches_are_refused_by_a_decoder_of_chains(dialled):
    class Branching:
        def __init__(self, inner):
            self.inner, self.key, self.helpers = inner, inner.key, inner.helpers

        def open(self, *arguments):
            proposer = self.inner.open(*arguments)
            propose = proposer.propose

            def branch(*given):
                tree = propose(*given)
                return tree._replace(parents=(0,) * len(tree.parents))

            proposer.propose = branch
            return proposer

    decoder = Speculative(dialled, Branching(ExitLayer(2).on(dialled)), 3)
    with pytest.raises(InputError, match="these drafts branch, and their keys"):
        decoder.decode([[1, 2]], max_new_tokens=9)
    assert not DraftTree(None, (0, 0), None, []).is_chain


# -- policies, in prediction, decoding, costs and validation alike
class Patient:
    """Stops after two drafts: a policy that looks at nothing but their number."""

    exact = True
    needs_confidence = False

    def keep_drafting(self, drafted: int, confidence: float) -> bool:
        return drafted < 2


def test_an_exact_policy_of_ones_own_is_predicted_in_every_round(dialled, run):
    prediction = predict(run, [2, 3], [4], policy=Patient(), with_rounds=True)
    assert prediction.exact
    assert all(max(each.drafted, default=0) <= 2 for each in prediction.rounds)
    plain = predict(run, [2, 3], [2])
    for exit_layer in (2, 3):  # two drafts are two drafts
        assert prediction.cell(exit_layer, 4).counts() == plain.cell(exit_layer, 2).counts()
    found = validate(dialled, run, [(2, 4), (3, 4)], policy=Patient(), costs=roofline_costs(dialled))
    assert found.holds and all(cell.rounds_equal and cell.tokens_equal for cell in found.cells)
    assert all(cell.measured == cell.predicted for cell in found.cells)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.05, 0.3, 1.0])
def test_a_threshold_is_predicted_exactly_but_for_drafts_behind_a_mismatch(dialled, run, threshold):
    policy = ConfidenceThreshold(threshold)
    prediction = predict(run, [2, 3], [5], policy=policy, with_rounds=True)
    assert not prediction.exact
    found = validate(dialled, run, [(2, 5), (3, 5)], policy=policy, costs=roofline_costs(dialled))
    assert found.holds
    for cell in found.cells:
        assert cell.tokens_equal and cell.rounds_equal
        for name in ("rounds", "accepted", "tokens"):
            assert cell.measured[name] == cell.predicted[name]
    if threshold == 1.0:  # every draft is the last of its round, wherever it falls
        assert all(cell.measured == cell.predicted for cell in found.cells)


def test_a_policy_reaches_decode_and_the_choice(dialled, run):
    done = decode(
        dialled, [1, 2, 3], method="self-speculative", exit_layer=2, draft_length=5, policy=Patient(), max_new_tokens=24
    )
    assert max(done.drafted) == 2
    costs = replace(roofline_costs(dialled), autoregressive_s=1.0)
    choice = choose(predict(run, [2], [5], policy=Patient()), costs)
    assert choice.policy.keep_drafting(1, 0.0) and max(decode(dialled, [1, 2], choice, max_new_tokens=24).drafted) == 2
    with pytest.raises(InputError, match="autoregressive decoding has no policy"):
        decode(dialled, [1, 2], policy=Patient())


def test_measured_costs_ask_the_policy(dialled):
    asked = []

    class Watched(Patient):
        needs_confidence = True

        def keep_drafting(self, drafted: int, confidence: float) -> bool:
            asked.append((drafted, confidence))
            return False

    costs = measure_costs(dialled, 8, draft_lengths=[4], policy=Watched(), repeats=1)
    assert {drafted for drafted, _ in asked} == {1, 2, 3}  # though it says stop, every draft is timed
    assert all(0 < confidence <= 1 for _, confidence in asked)
    assert costs.longest_draft == 4


def test_a_policy_needs_a_text_and_a_drafter_that_say_enough(run):
    sampled = fabricate(text="sampled")
    with pytest.raises(InputError, match="predicted on greedy text"):
        predict(sampled, policy=Patient())
    with pytest.raises(InputError, match="how sure the draft model is"):
        predict(run, drafters=[DraftModel("tiny-draft")], policy=ConfidenceThreshold(0.5))


def test_drafts_allowed_by_hand():
    sure = np.array([0.9, 0.2, 0.9, 0.9])
    assert drafts_allowed(ConfidenceThreshold(0.5), sure, 4, 3).tolist() == [2, 1, 3, 3]
    assert drafts_allowed(Patient(), None, 4, 3).tolist() == [2, 2, 2, 3]


@pytest.mark.parametrize(("text", "policy"), [("fixed", FIXED), ("confidence:0.4", ConfidenceThreshold(0.4))])
def test_policies_by_name(text, policy):
    assert policy_named(text) == policy


def test_a_policy_of_ones_own_by_name():
    assert policy_named("drafting.test_drafters.Patient").keep_drafting(1, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "there is no policy 'nonsense': there are fixed, confidence"),
        ("confidence", "makes no policy"),
        ("confidence:much", "makes no policy"),
        ("confidence:2", r"must lie in \[0, 1\]"),
        ("collections.Counter", "is no policy"),
        ("no.such.Thing", "there is no policy"),
    ],
)
def test_a_policy_that_is_none(text, message):
    with pytest.raises(InputError, match=message):
        policy_named(text)


def test_other_exit_heads_than_the_traced_ones_are_refused(tiny):
    width = tiny.model.config.hidden_size
    traced, others = ({2: ExitHead(torch.zeros(width, width), torch.full((width,), by))} for by in (0.5, 0.25))
    drafter = ExitLayer(2, exit_heads=fingerprint(traced), packed_heads=lambda: pack_heads(traced))
    drafter.on(tiny)
    with pytest.raises(InputError, match="not those that were traced"):
        replace(drafter, packed_heads=lambda: pack_heads(others)).on(tiny)
