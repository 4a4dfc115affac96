"""Draft heads of F rows: predicted exactly, validated against the decoder, and known to the costs and the choice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces.fabricate import fabricate

from probekit.choice.choose import choose
from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.costs.roofline import roofline_costs
from probekit.decoding.speculative import SelfSpeculative
from probekit.engines.export import export_choice
from probekit.errors import InputError
from probekit.models.synthetic import synthetic
from probekit.prediction.predict import predict
from probekit.prediction.rounds import rounds_of
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace
from probekit.validation.run import validate

PROMPTS = ["the cat sat", "once upon a", "hello"]
BUDGET = 14


@pytest.fixture(scope="module")
def dialled():
    """`tiny` whose late layers write less, so that exits from 2 on often agree."""
    return synthetic("tiny", seed=1, dial=0.3, exit_layer=2, ends=False)


@pytest.fixture(scope="module")
def run(dialled):
    counted = trace(dialled, PROMPTS[:1], max_new_tokens=BUDGET, statistics="agreement")
    return trace(dialled, PROMPTS, max_new_tokens=BUDGET, draft_vocabulary=counted)


def costs_of(loaded, rows):
    return roofline_costs(loaded, bandwidth=1e10, flops=1e11, draft_rows=rows)


@given(
    seed=st.integers(0, 10**6),
    dial=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    exit_layer=st.integers(1, 3),
    draft_length=st.integers(1, 9),
    budget=st.integers(2, 20),
    prompts=st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=6), min_size=1, max_size=3),
    data=st.data(),
)
@settings(max_examples=40)
def test_any_head_of_any_small_llama(seed, dial, exit_layer, draft_length, budget, prompts, data):
    """Every round of the decoder is the predicted one, whatever the order and the number of rows."""
    loaded = synthetic("tiny", seed=seed, layers=4, dial=dial, exit_layer=exit_layer)
    order = data.draw(st.lists(st.integers(0, 96), unique=True, max_size=97))
    rows = data.draw(st.sampled_from([1, 2, 5, 20, 60, 97]))
    traced = trace(loaded, prompts, max_new_tokens=budget, statistics="agreement", draft_vocabulary=order)
    ids = torch.from_numpy(traced.draft_head_ids(rows))
    method = SelfSpeculative(loaded, exit_layer, draft_length, draft_vocabulary=ids)
    for prompt, done in enumerate(method.decode(prompts, max_new_tokens=budget)):
        predicted = rounds_of(traced.draft_head_agreement(prompt, rows)[exit_layer], draft_length, budget)
        assert done.tokens == traced.outputs(prompt).tolist()
        assert (done.drafted, done.accepted) == (predicted.drafted.tolist(), predicted.accepted.tolist())


def test_a_head_of_all_rows_is_the_whole_head(run):
    whole, kept = predict(run), predict(run, draft_rows=97)
    assert [cell.counts() for cell in kept.cells] == [cell.counts() for cell in whole.cells]
    assert [cell.near_ties for cell in kept.cells] == [cell.near_ties for cell in whole.cells]
    assert (whole.draft_rows, kept.draft_rows) == (None, 97)
    assert kept.to_json()["draft_rows"] == 97


def test_fewer_rows_accept_no_token_that_they_lack(run):
    """The token of rank 0 is the only one that a head of one row can have right."""
    first = run.draft_head_ids(1)[0]
    for cell in predict(run, draft_lengths=[1], draft_rows=1).cells:
        assert cell.accepted <= sum(int((run.outputs(prompt)[1:] == first).sum()) for prompt in run.prompts)


def test_the_decoder_does_what_is_predicted(dialled, run, unchanged):
    unchanged(dialled.model)
    seen = {}
    for rows in (1, 4, 12, 97):
        found = validate(dialled, run, [(2, 3), (4, 9), (1, 1)], draft_rows=rows, costs=costs_of(dialled, rows))
        assert found.holds
        assert found.to_json()["draft_rows"] == rows
        for cell in found.cells:
            assert cell.rounds_equal
            assert cell.tokens_equal
            assert cell.predicted == cell.measured
        seen[rows] = found.cells[0].measured["accepted"]
    assert seen[1] < seen[97]


def changed(run: Trace, column: str, value: int, prompt: int, output: int, layer: int) -> Trace:
    head = run.draft_head.copy()
    head.loc[(head["prompt"] == prompt) & (head["output"] == output) & (head["layer"] == layer), column] = value
    return Trace.from_frames(run.manifest.but(top_prompts=0), run.texts, run.tokens, run.layers, draft_head=head)


def test_a_planted_error_is_caught_and_a_near_tie_is_named(dialled, run):
    rows = 12
    place = int(np.flatnonzero(run.draft_head_agreement(0, rows)[2])[1])
    wrong = changed(run, "agrees_up_to", rows - 1, 0, place, 2)
    (cell,) = validate(dialled, wrong, [(2, 3)], draft_rows=rows, costs=costs_of(dialled, rows)).cells
    (difference,) = cell.differences
    assert (difference.prompt, difference.what, difference.output) == (0, "rounds", place)
    assert difference.kind == "unexplained"
    tied = changed(wrong, "surely_up_to", rows - 1, 0, place, 2)
    assert tied.draft_head_near_ties(0, rows)[2, place]
    assert not tied.draft_head_near_ties(0, rows - 1)[2, place]
    found = validate(dialled, tied, [(2, 3)], draft_rows=rows, costs=costs_of(dialled, rows))
    assert found.holds
    assert (found.cells[0].ties, found.cells[0].rounds_equal) == (1, False)
    assert predict(tied, [2], [3], draft_rows=rows).cells[0].near_ties == 1


# ------------------------------------------------------------------------------------------------ costs and choice
def test_a_roofline_reads_only_the_rows_that_are_kept(dialled):
    whole, kept = costs_of(dialled, None), costs_of(dialled, 24)
    assert kept.head_s == pytest.approx(whole.head_s * 24 / 97)
    assert kept.verify_s == whole.verify_s
    assert Costs.from_json(json.loads(json.dumps(kept.to_json()))) == kept


def test_measured_costs_draft_with_the_rows_that_are_kept(tiny, monkeypatch):
    from probekit.drafting import proposers

    used = []
    original = proposers.DraftHead.__call__

    def watched(self, residual):
        logits = original(self, residual)
        used.append(logits.shape[-1])
        return logits

    monkeypatch.setattr(proposers.DraftHead, "__call__", watched)
    costs = measure_costs(tiny, 20, draft_lengths=[2], draft_vocabulary=[5, 3, 40], repeats=1)
    assert set(used) == {3}
    assert costs.draft_rows == 3
    assert costs.to_json()["draft_rows"] == 3


def test_the_choice_names_the_draft_head_and_refuses_costs_of_another(dialled, run, tmp_path):
    prediction = predict(run, draft_rows=24)
    choice = choose(prediction, costs_of(dialled, 24))
    assert choice.draft_rows == choice.to_json()["draft_rows"] == 24
    assert "among the 24 most frequent tokens only" in choice.sentence()
    assert (
        "transformers drafts with the whole head" in (export_choice(choice, tmp_path / "to") / "README.md").read_text()
    )
    with pytest.raises(InputError, match="a draft head of 24 rows, and these costs are of drafts with the whole head"):
        choose(prediction, costs_of(dialled, None))
    with pytest.raises(InputError, match="drafts with the whole head, and these costs are of a draft head of 24 rows"):
        choose(predict(run), costs_of(dialled, 24))
    with pytest.raises(InputError, match="these costs are of drafts with the whole head"):
        validate(dialled, run, [(2, 3)], draft_rows=24, costs=costs_of(dialled, None))


@pytest.mark.parametrize("rows", [0, 98, 1.5])
def test_heads_that_no_model_has_are_refused(run, rows):
    with pytest.raises(InputError, match=r"out of range: expected 1\.\.97"):
        predict(run, draft_rows=rows)


def test_a_trace_that_knows_no_draft_head_is_refused():
    with pytest.raises(InputError, match="knows nothing of draft heads"):
        predict(fabricate(), draft_rows=5)
