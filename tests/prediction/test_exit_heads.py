"""Drafting through exit heads: predicted exactly, validated against the decoder, known to the costs and the choice."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces.fabricate import list_again

import probekit
from probekit.choice.choose import choose
from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.costs.roofline import roofline_costs
from probekit.decoding.sampling import warp
from probekit.decoding.speculative import SelfSpeculative
from probekit.engines.export import export_choice
from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.lens.exit_heads import ExitHead, fingerprint, fit_heads, pack_heads
from probekit.models.synthetic import synthetic
from probekit.prediction.predict import predict
from probekit.prediction.rounds import rounds_of
from probekit.settings import Sampling
from probekit.traces.trace import Trace
from probekit.tracing.plan import traced_heads
from probekit.tracing.tracer import trace
from probekit.validation.run import validate

PROMPTS = ["the cat sat", "once upon a", "hello"]
BUDGET = 14


def random_heads(parts, exits, seed=0, size=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: ExitHead(
            size * torch.randn(parts.width, parts.width, generator=generator) / parts.width**0.5,
            size * torch.randn(parts.width, generator=generator),
        )
        for layer in exits
    }


@pytest.fixture(scope="module")
def dialled():
    """`tiny` whose late layers write less, so that exits from 2 on often agree."""
    return synthetic("tiny", seed=1, dial=0.3, exit_layer=2, ends=False)


@pytest.fixture(scope="module")
def heads(dialled):
    return random_heads(dialled.anatomy, dialled.anatomy.exits)


@pytest.fixture(scope="module")
def run(dialled, heads):
    counted = trace(dialled, PROMPTS[:1], max_new_tokens=BUDGET, statistics="agreement")
    return trace(dialled, PROMPTS, max_new_tokens=BUDGET, exit_heads=heads, draft_vocabulary=counted)


def costs_of(loaded, name, rows=None):
    return roofline_costs(loaded, bandwidth=1e10, flops=1e11, draft_rows=rows, exit_heads=name)


# -------------------------------------------------------------------------------------------------- the prediction
@given(
    seed=st.integers(0, 10**6),
    dial=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    exit_layer=st.integers(1, 3),
    draft_length=st.integers(1, 9),
    budget=st.integers(2, 20),
    rows=st.sampled_from([None, None, 5, 60, 97]),
    size=st.sampled_from([0.1, 0.3, 1.0]),
    prompts=st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=6), min_size=1, max_size=3),
)
@settings(max_examples=40)
def test_any_heads_of_any_small_llama(seed, dial, exit_layer, draft_length, budget, rows, size, prompts):
    """Every round of the decoder is the predicted one, with the whole head behind the exit head and with some rows."""
    loaded = synthetic("tiny", seed=seed, layers=4, dial=dial, exit_layer=exit_layer)
    heads = random_heads(loaded.anatomy, [exit_layer], seed, size)
    order = None if rows is None else np.random.default_rng(seed).permutation(97).tolist()
    traced = trace(
        loaded, prompts, max_new_tokens=budget, statistics="agreement", exit_heads=heads, draft_vocabulary=order
    )
    ids = None if rows is None else torch.from_numpy(traced.draft_head_ids(rows))
    method = SelfSpeculative(loaded, exit_layer, draft_length, exit_head=heads[exit_layer], draft_vocabulary=ids)
    for prompt, done in enumerate(method.decode(prompts, max_new_tokens=budget)):
        agrees = traced.agreement(prompt) if rows is None else traced.draft_head_agreement(prompt, rows)
        predicted = rounds_of(agrees[exit_layer], draft_length, budget)
        assert done.tokens == traced.outputs(prompt).tolist()
        assert (done.drafted, done.accepted) == (predicted.drafted.tolist(), predicted.accepted.tolist())


def test_heads_that_change_nothing_leave_the_trace_as_it_was(dialled):
    width = dialled.anatomy.width
    none = {layer: ExitHead(torch.zeros(width, width), torch.zeros(width)) for layer in dialled.anatomy.exits}
    plain = trace(dialled, PROMPTS, max_new_tokens=BUDGET)
    through = trace(dialled, PROMPTS, max_new_tokens=BUDGET, exit_heads=none)
    assert [cell.counts() for cell in predict(through).cells] == [cell.counts() for cell in predict(plain).cells]


def test_only_the_final_norm_lens_of_the_named_exits_changes(dialled, heads):
    plain = trace(dialled, PROMPTS, max_new_tokens=BUDGET)
    through = trace(dialled, PROMPTS, max_new_tokens=BUDGET, exit_heads={2: heads[2]})
    assert through.manifest.settings.exit_heads.exits == (2,)
    for prompt in plain.prompts:
        mine, theirs = (one.values(prompt, "log_probability") for one in (through, plain))
        different = [layer for layer in range(plain.depth + 1) if not np.array_equal(mine[layer], theirs[layer])]
        assert different == [2]
        raw = [one.values(prompt, "log_probability", "raw") for one in (through, plain)]
        np.testing.assert_array_equal(*raw)


def test_agreement_only_says_the_same(dialled, heads, run):
    quick = trace(dialled, PROMPTS, max_new_tokens=BUDGET, statistics="agreement", exit_heads=heads)
    for prompt in run.prompts:
        np.testing.assert_array_equal(quick.agreement(prompt), run.agreement(prompt))


def test_sampled_text_is_judged_by_the_heads_distribution(dialled, heads):
    """w = min(1, q / p) of the text's next token, q through the head, both warped: against float64."""
    sampling = Sampling(temperature=0.7, top_k=20, seed=3)
    traced = trace(dialled, PROMPTS, max_new_tokens=BUDGET, sampling=sampling, exit_heads=heads)
    parts = dialled.anatomy
    for prompt in traced.prompts:
        context, y = traced.prompt_ids(prompt).tolist(), traced.outputs(prompt).tolist()
        with torch.no_grad(), Capture(parts) as capture:
            parts.decoder(input_ids=torch.tensor([context + y[:-1]]))
        p = _probabilities(parts, capture[parts.depth][0, len(context) - 1 :], sampling)
        for exit_layer, head in heads.items():
            h = capture[exit_layer][0, len(context) - 1 :].double()
            mapped = h + h @ head.change.double().T + head.offset.double()
            q = _probabilities(parts, mapped.float(), sampling)
            at = torch.arange(len(y)), torch.tensor(y)
            expected = (q[at] / p[at]).clamp(max=1)
            found = traced.accept_probability(prompt)[exit_layer]
            np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=1e-5)


def _probabilities(parts, residual, sampling):
    with torch.no_grad():
        return warp(parts.head(parts.norm(residual)), sampling).exp()


@pytest.mark.parametrize("rows", [None, 12])
def test_the_decoder_does_what_is_predicted(dialled, heads, run, rows, unchanged):
    unchanged(dialled.model)
    costs = costs_of(dialled, fingerprint(heads), rows)
    found = validate(dialled, run, [(2, 3), (4, 9), (1, 1)], draft_rows=rows, costs=costs)
    assert found.holds
    assert found.to_json()["exit_heads"] == fingerprint(heads) == predict(run).to_json()["exit_heads"]
    for cell in found.cells:
        assert cell.rounds_equal
        assert cell.tokens_equal


def test_a_decoder_through_other_heads_is_caught(dialled, heads, run):
    """A trace that claims other heads than those it was read through."""
    others = random_heads(dialled.anatomy, dialled.anatomy.exits, seed=9, size=1.0)
    record = replace(run.manifest.settings.exit_heads, fingerprint=fingerprint(others))
    manifest = run.manifest.but(exit_heads=record, draft_vocabulary=None, top_prompts=0)
    claimed = Trace.from_frames(manifest, run.texts, run.tokens, run.layers, exit_heads=pack_heads(others))
    found = validate(dialled, claimed, [(2, 3), (3, 3)], costs=costs_of(dialled, fingerprint(others)))
    assert not found.holds
    assert all(cell.tokens_equal for cell in found.cells), "lossless all the same"


def test_fitted_heads_accept_more_on_text_that_was_not_fitted(dialled):
    texts = trace(dialled, [[a, b] for a in range(8) for b in range(8)], max_new_tokens=24,
                  sampling=Sampling(temperature=0.9, seed=1), statistics="agreement")  # fmt: skip
    batches = (torch.tensor([[*texts.prompt_ids(each), *texts.outputs(each)]]) for each in texts.prompts)
    fitted = fit_heads(dialled.anatomy, batches, [3], ridge=0.1)
    held_out = [[20 + a, b] for a in range(6) for b in range(6)]
    rates = [
        predict(trace(dialled, held_out, max_new_tokens=24, exit_heads=given), [3], [2]).cells[0].acceptance_rate
        for given in (None, fitted)
    ]
    assert rates[1] >= rates[0]


# ------------------------------------------------------------------------------------------------------ the run
def test_the_heads_stay_with_the_run(dialled, heads, run, tmp_path):
    for traced in (run, run.save(tmp_path / "saved"), run.select([0])):
        found = traced_heads(traced, dialled)
        assert list(found) == list(heads)
        assert fingerprint(found) == traced.manifest.settings.exit_heads.fingerprint == fingerprint(heads)
    again = Trace.open(tmp_path / "saved")
    assert again.manifest.settings.exit_heads == run.manifest.settings.exit_heads
    assert traced_heads(trace(dialled, PROMPTS, max_new_tokens=4), dialled) == {}


def test_a_run_without_its_heads_or_with_others_is_refused(dialled, heads, run, tmp_path):
    saved = run.save(tmp_path / "saved")
    path = tmp_path / "saved" / "exit_heads.safetensors"
    for damaged in (pack_heads({2: heads[3]}), b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"exit_heads\.safetensors is damaged or of another run"):
            validate(dialled, saved, [(2, 2)])
    for damaged, message in (
        (pack_heads({2: heads[3]}), "are not those that it was traced with"),
        (b"nonsense", "cannot be read as exit heads"),
    ):
        path.write_bytes(damaged)
        list_again(tmp_path / "saved")  # as if the run had been written so
        with pytest.raises(InputError, match=message):
            validate(dialled, Trace.open(tmp_path / "saved"), [(2, 2)])
    path.unlink()
    with pytest.raises(InputError, match=r"exit_heads\.safetensors is missing.*--resume"):
        validate(dialled, saved, [(2, 2)])


def test_a_run_goes_on_with_its_own_heads_only(dialled, heads, tmp_path):
    common = {"max_new_tokens": 6, "batch_size": 1, "resume": True}
    whole = trace(dialled, PROMPTS, tmp_path / "run", exit_heads=heads, **common)
    for part in tmp_path.glob("run/*-00002.parquet"):
        part.unlink()
    (tmp_path / "run" / "exit_heads.safetensors").unlink()
    for others in (None, {2: heads[2]}):
        with pytest.raises(InputError, match="exit_heads"):
            trace(dialled, PROMPTS, tmp_path / "run", exit_heads=others, **common)
    again = trace(dialled, PROMPTS, tmp_path / "run", exit_heads=heads, **common)
    assert again.layers.equals(whole.layers)
    assert fingerprint(traced_heads(again, dialled)) == fingerprint(heads)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no exit heads"),
        ({9: ExitHead(torch.zeros(36, 36), torch.zeros(36))}, "exit layer 9"),
        ({2: ExitHead(torch.zeros(3, 3), torch.zeros(3))}, "3 wide"),
        ({2: torch.neg}, "not an ExitHead"),
        ("nowhere.safetensors", "cannot be read"),
    ],
)
def test_heads_that_do_not_fit_are_refused_before_any_work(dialled, given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        trace(dialled, PROMPTS, tmp_path / "run", exit_heads=given)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ costs and choice
def test_a_roofline_reads_the_map_too(dialled, heads, run):
    whole, through = costs_of(dialled, None), costs_of(dialled, fingerprint(heads))
    assert through.head_s == pytest.approx(whole.head_s * (97 + 36) / 97)
    assert through.verify_s == whole.verify_s
    assert Costs.from_json(json.loads(json.dumps(through.to_json()))) == through
    assert roofline_costs(run, bandwidth=1e10, flops=1e11).exit_heads == fingerprint(heads)


def test_measured_costs_draft_through_the_heads(tiny, monkeypatch):
    heads, called = random_heads(tiny.anatomy, [1, 2]), []
    monkeypatch.setattr(ExitHead, "__call__", lambda self, residual: called.append(self) or residual)
    costs = measure_costs(tiny, 20, draft_lengths=[2], exit_heads=heads, repeats=1)
    assert {id(head.change) for head in called} == {id(heads[1].change), id(heads[2].change)}
    assert costs.exit_heads == fingerprint(heads)
    assert measure_costs(tiny, 20, draft_lengths=[2], repeats=1).exit_heads is None


def test_the_choice_names_the_heads_and_refuses_costs_of_others(dialled, heads, run, tmp_path):
    name = fingerprint(heads)
    choice = choose(predict(run), costs_of(dialled, name))
    assert choice.exit_heads == choice.to_json()["exit_heads"] == name
    assert choice.speculate
    assert "through exit heads" in choice.sentence()
    assert "knows no exit heads" in (export_choice(choice, tmp_path / "to") / "README.md").read_text()
    for wrong in (None, "other"):
        with pytest.raises(InputError, match=f"behind exit heads {name}, and these costs are of"):
            choose(predict(run), costs_of(dialled, wrong))
    with pytest.raises(InputError, match="these costs are of drafts with the whole head"):
        validate(dialled, run, [(2, 3)], costs=costs_of(dialled, None))


# ---------------------------------------------------------------------------------------------------- one prompt
def test_decode_goes_through_the_head_of_its_exit(dialled, heads, run):
    plain = probekit.decode(dialled, PROMPTS[0], max_new_tokens=BUDGET)
    how = {"method": "self-speculative", "draft_length": 3, "max_new_tokens": BUDGET}
    through = probekit.decode(dialled, PROMPTS[0], exit_layer=2, exit_heads=heads, **how)
    assert through.tokens == plain.tokens
    predicted = rounds_of(run.agreement(0)[2], 3, BUDGET)
    assert (through.drafted, through.accepted) == (predicted.drafted.tolist(), predicted.accepted.tolist())
    with pytest.raises(InputError, match="no exit head of layer 3"):
        probekit.decode(dialled, PROMPTS[0], exit_layer=3, exit_heads={2: heads[2]}, **how)
    with pytest.raises(InputError, match="autoregressive decoding has no exit_heads"):
        probekit.decode(dialled, PROMPTS[0], exit_heads=heads)
