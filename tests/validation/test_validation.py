"""Validation: predictions that hold, differences that are named, planted errors that are caught, and transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from traces.fabricate import fabricate

from probekit.costs.roofline import roofline_costs
from probekit.decoding.results import Decoded
from probekit.decoding.speculative import SelfSpeculative
from probekit.drafting.drafters import runs_of
from probekit.errors import InputError
from probekit.hooks.sites import open_hooks
from probekit.models.synthetic import synthetic
from probekit.prediction.predict import predict
from probekit.prediction.rounds import rounds_of
from probekit.settings import Sampling
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace
from probekit.validation import run as validation_module
from probekit.validation.differences import PredictedText, differences_of
from probekit.validation.results import SCHEMA
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted

PROMPTS = ["the cat sat", "once upon a", "hello"]
BUDGET = 14


@pytest.fixture(scope="module")
def dialled():
    """`tiny` whose late layers write less, so that exits from 2 on often agree. Its end is a token that it writes."""
    loaded = synthetic("tiny", seed=1, dial=0.3, exit_layer=2, ends=False)
    first = trace(loaded, PROMPTS, max_new_tokens=BUDGET, statistics="agreement")
    loaded.model.generation_config.eos_token_id = int(first.outputs(0)[8])
    return loaded


@pytest.fixture(scope="module")
def drafter():
    return synthetic("tiny-draft", seed=3, ends=False)


@pytest.fixture(scope="module")
def costs(dialled):
    return roofline_costs(dialled, bandwidth=1e10, flops=1e11, drafter="tiny-draft")


@pytest.fixture(scope="module")
def run(dialled, drafter):
    return trace(dialled, PROMPTS, max_new_tokens=BUDGET, draft_model=drafter)


def changed(run: Trace, table: str, change) -> Trace:
    """The trace with one of its tables changed by `change(frame)`."""
    frames = {name: getattr(run, name).copy() for name in ("texts", "tokens", "layers", "drafter")}
    change(frames[table])
    return Trace.from_frames(run.manifest.but(top_prompts=0), **frames)


def at(frame, prompt: int, output: int, layer: int):
    return (
        (frame["prompt"] == prompt)
        & (frame["output"] == output)
        & (frame["layer"] == layer)
        & (frame["lens"] == "final-norm")
    )


# ------------------------------------------------------------------------------------------------ what holds
def test_rounds_and_tokens_are_as_predicted(dialled, run, drafter, costs, unchanged):
    unchanged(dialled.model)
    seen = []
    found = validate(
        dialled, run, [(2, 3), (4, 9), (1, 1), (None, 2)], drafter=drafter, costs=costs,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert found.holds
    assert [cell.label for cell in found.cells] == ["layer 2", "layer 4", "layer 1", drafter.name]
    predicted = predict(run, draft_lengths=[1, 2, 3, 9])
    for cell in found.cells:
        assert cell.rounds_equal
        assert cell.tokens_equal
        assert (cell.ties, cell.unexplained, cell.prompts) == (0, 0, 3)
        assert cell.predicted == cell.measured == predicted.cell(cell.exit_layer, cell.draft_length).counts()
        assert cell.speedup_predicted > 0
        assert cell.speedup_measured > 0
        low, high = cell.speedup_measured_quantiles
        assert low <= high
    assert "eos" in run.texts["ended"].tolist()  # an accepted end was among them
    assert seen[-1] == ("validate", 15, 15)


@pytest.mark.parametrize("which", ["untied", "tied"])
def test_every_cell_of_a_tiny_model(which, tiny, tiny_tied):
    """All exits, draft lengths up to beyond the budget, both prompts at once, on models that nobody dialled."""
    loaded = tiny if which == "untied" else tiny_tied
    seen = trace(loaded, ["b", "a long way off"], max_new_tokens=9, statistics="agreement")
    prompts = [seen.prompt_ids(prompt).tolist() for prompt in seen.prompts]
    for exit_layer in range(1, loaded.depth):
        for length in (1, 2, 3, 5, 8, 12):
            runs = SelfSpeculative(loaded, exit_layer, length).decode(prompts, max_new_tokens=9)
            for prompt, run in zip(seen.prompts, runs, strict=True):
                predicted = rounds_of(seen.agreement(prompt)[exit_layer], length, 9)
                assert run.tokens == seen.outputs(prompt).tolist()
                assert run.drafted == predicted.drafted.tolist()
                assert run.accepted == predicted.accepted.tolist()


def test_json_frames_and_rows(dialled, run, costs):
    found = validate(dialled, run, [(3, 2)], limit=2, costs=costs)
    document = json.loads(json.dumps(found.to_json()))
    assert document["schema"] == SCHEMA
    (cell,) = document["cells"]
    assert {"exit_layer", "draft_length", "predicted", "measured", "rounds_equal", "tokens_equal", "ties",
            "speedup_predicted", "speedup_measured"} <= set(cell)  # fmt: skip
    assert set(cell["predicted"]) == set(cell["measured"]) == {"rounds", "drafted", "accepted", "tokens"}
    rows = found.rounds_json()
    assert {row["prompt"] for row in rows} == {0, 1}
    assert all(row["accepted_predicted"] == row["accepted_measured"] for row in rows)
    assert sum(row["drafted"] for row in rows) == cell["measured"]["drafted"]
    assert {"predicted_rounds", "measured_rounds", "speedup_measured_20"} <= set(found.to_pandas().columns)
    page = found._repr_html_()
    assert page.count('<th scope="row">') == len(found.cells)
    assert page.count(">yes</td>") == 2 * len(found.cells)


def test_costs_are_measured_where_none_are_given(dialled, run, monkeypatch):
    asked = []

    def measured(loaded, context, **settings):
        asked.append((context, settings))
        return roofline_costs(loaded, bandwidth=1e10, flops=1e11)

    monkeypatch.setattr(validation_module, "measure_costs", measured)
    found = validate(dialled, run, exit_layers=[2], draft_lengths=[2], limit=1)
    assert [cell.label for cell in found.cells] == ["layer 2"]
    (context, settings) = asked[0]
    assert 8 < context < 26  # the prompt, and about half of what follows
    assert settings["draft_lengths"] == [2]


# ------------------------------------------------------------------------------------------------ what does not
def test_a_planted_error_is_caught(dialled, run, costs):
    """One agreement of the trace turned round: the round that it decides is named."""
    place = int(np.flatnonzero(run.agreement(0)[2])[1])

    def turn(layers):
        layers.loc[at(layers, 0, place, 2), "agrees"] = False

    found = validate(dialled, changed(run, "layers", turn), [(2, 3)], costs=costs)
    (cell,) = found.cells
    assert not found.holds
    assert cell.rounds_equal is False
    assert cell.tokens_equal is True
    (difference,) = cell.differences
    assert (difference.prompt, difference.what, difference.output) == (0, "rounds", place)
    assert difference.kind == "unexplained"
    assert difference.measured > difference.predicted


def test_a_near_tie_is_counted_and_named(dialled, run, costs):
    place = int(np.flatnonzero(run.agreement(0)[2])[1])

    def turn(layers):
        here = at(layers, 0, place, 2)
        layers.loc[here, "agrees"] = False
        layers.loc[here, "near_tie"] = True

    found = validate(dialled, changed(run, "layers", turn), [(2, 3)], costs=costs)
    (cell,) = found.cells
    assert found.holds
    assert (cell.ties, cell.unexplained, cell.rounds_equal) == (1, 0, False)
    (difference,) = cell.to_json()["differences"]
    assert difference["kind"] == "near-tie"
    margins = run.values(0, "margin")[:, difference["output"]]
    assert difference["margin"] == pytest.approx(min(margins[2], margins[-1]))
    ties = [run.near_ties(prompt)[[2, -1]].any(axis=0) for prompt in run.prompts]
    ties[0][place] = True  # the one that was put there
    assert cell.excusable_share == pytest.approx(np.concatenate(ties).mean())


def test_a_token_that_differs_is_found(dialled, run, costs):
    """The trace claims another third token for prompt 1."""

    def change(tokens):
        here = (tokens["prompt"] == 1) & (tokens["output"] == 2)
        tokens.loc[here, "text_id"] = (tokens.loc[here, "text_id"] + 1) % 90

    (cell,) = validate(dialled, changed(run, "tokens", change), [(2, 3)], costs=costs).cells
    (difference,) = cell.differences
    assert (difference.prompt, difference.what, difference.output, difference.kind) == (1, "tokens", 2, "unexplained")
    assert cell.tokens_equal  # the decoder itself is as good as autoregressive decoding


def judged(agrees, drafted, accepted, tokens=None, ties=(), budget=12, draft_length=3):
    """Differences between a run and a trace whose text is 1, 2, 3, ..."""
    y = list(range(1, len(agrees) + 1))
    tied = np.isin(np.arange(len(agrees)), ties)
    text = PredictedText(0, y, runs_of(np.array(agrees, dtype=bool)), tied, np.zeros(len(agrees), dtype=bool))
    found = Decoded("self-speculative", 0, [0], tokens or y, "", "budget", list(drafted), list(accepted))
    return differences_of(text, draft_length, budget, found)


def test_rounds_after_a_near_tie_are_judged_from_where_the_decoder_is():
    agrees = [0, 1, 1, 0, 1, 1, 0, 1]
    predicted = rounds_of(np.array(agrees, dtype=bool), 3, 12)
    assert judged(agrees, predicted.drafted, predicted.accepted) == []
    # predicted 2 | 2 | 1; the decoder missed output 2 (a near-tie), started again at 3, and was right from there
    assert predicted.accepted.tolist() == [2, 2, 1]
    (difference,) = judged(agrees, [3, 3, 3, 3], [1, 0, 2, 1], ties=[2])
    assert (difference.output, difference.kind) == (2, "near-tie")
    # and where it is not right from there, that is found, too
    tie, bug = judged(agrees, [3, 3, 3, 3, 3], [1, 0, 1, 0, 1], ties=[2])
    assert (tie.kind, bug.output, bug.kind) == ("near-tie", 5, "unexplained")


def test_a_wrong_number_of_drafts_is_a_difference():
    (difference,) = judged([1] * 8, [3, 2], [3, 2])
    assert (difference.what, difference.output, difference.predicted, difference.measured) == ("drafts", 5, 3, 2)


def test_rounds_behind_another_token_are_not_judged():
    (difference,) = judged([1] * 8, [3, 3], [3, 0], tokens=[1, 2, 3, 4, 5, 60, 61, 62])
    assert (difference.what, difference.output) == ("tokens", 5)


# ------------------------------------------------------------------------------------------------ sampled text
def test_sampled_counts_agree_and_a_planted_error_is_caught(tiny_chain):
    prompts = [[place % 4, place // 4] for place in range(16)]
    sampling = Sampling(temperature=1.0, seed=5)
    run = trace(tiny_chain, prompts, max_new_tokens=8, sampling=sampling)
    costs = roofline_costs(tiny_chain, bandwidth=1e10, flops=1e11)
    found = validate(tiny_chain, run, [(2, 3)], costs=costs, repeats=2)
    (cell,) = found.cells
    assert found.holds
    assert cell.rounds_equal is cell.tokens_equal is None
    assert cell.ties == 0
    document = cell.to_json()
    assert document["within_interval"] is True
    for name in ("rounds", "drafted", "accepted"):
        low, high = document["difference_interval"][name]
        assert low < high
        assert abs(cell.measured[name] - cell.predicted[name]) <= high - low
    assert found.rounds_json() == []

    def certain(layers):
        layers["accept_probability"] = 1.0

    frames = {name: getattr(run, name).copy() for name in ("texts", "tokens", "layers")}
    certain(frames["layers"])
    wrong = Trace.from_frames(run.manifest.but(top_prompts=0), **frames)
    assert not validate(tiny_chain, wrong, [(2, 3)], costs=costs).holds


# ------------------------------------------------------------------------------------------------ refusals
def test_given_text_is_refused(dialled):
    with pytest.raises(InputError, match="given text"):
        validate(dialled, fabricate(text="given"))


def test_another_model_is_refused(tiny_tied, tiny, run):
    with pytest.raises(InputError, match="tiny-tied is another model"):
        validate(tiny_tied, run)
    with pytest.raises(InputError, match="other weights"):
        validate(tiny, run)  # of the same shape


def test_other_refusals(dialled, run, tiny, drafter):
    without = changed(run, "texts", lambda frame: None)
    without = Trace.from_frames(
        without.manifest.but(drafter=None), texts=run.texts, tokens=run.tokens, layers=run.layers
    )
    for arguments, message in (
        ({"cells": [(9, 2)]}, "exit layer 9 is out of range"),
        ({"cells": [(1, 0)]}, "draft length 0"),
        ({"cells": []}, "no cell to validate"),
        ({"cells": [(None, 2)]}, "needs the draft model"),
        ({"cells": [(1, 1)], "limit": 0}, "limit is 0 prompts"),
        ({"cells": [(1, 1)], "repeats": 0}, "repeats is 0"),
        ({"cells": [(1, 1)], "drafter": tiny}, "the run is of the draft model"),
    ):
        with pytest.raises(InputError, match=message):
            validate(dialled, run, **arguments)
    with pytest.raises(InputError, match="traced without a draft model"):
        validate(dialled, without, [(None, 2)], drafter=drafter)
    half = Trace.from_frames(
        run.manifest.but(dtype="bfloat16", top_prompts=0), run.texts, run.tokens, run.layers, drafter=run.drafter
    )
    with pytest.raises(InputError, match="traced in bfloat16"):
        validate(dialled, half, [(1, 1)])


# ------------------------------------------------------------------------------------------------ transformers
@pytest.mark.parametrize(("exit_layer", "draft_length"), [(1, 3), (2, 2), (4, 5)])
def test_transformers_accepts_what_is_predicted(dialled, run, exit_layer, draft_length):
    for prompt in run.prompts:
        found = transformers_accepted(dialled, run.prompt_ids(prompt).tolist(), exit_layer, draft_length, BUDGET)
        predicted = rounds_of(run.agreement(prompt)[exit_layer], draft_length, BUDGET, "draft")
        assert found.tokens == run.outputs(prompt).tolist()
        assert found.accepted == predicted.accepted.tolist()
        assert all(own <= k for own, k in zip(found.drafted, predicted.drafted.tolist(), strict=True))


def test_an_end_that_transformers_calls_the_bonus_is_accepted(dialled, run):
    """With every draft right, prompt 0 ends inside a draft: accepted, and no bonus token follows."""
    outputs = run.outputs(0)
    agrees = run.agreement(0)[4]
    assert run.ended(0) == "eos"
    assert agrees[len(outputs) - 1]
    found = transformers_accepted(dialled, run.prompt_ids(0).tolist(), 4, BUDGET, BUDGET)
    assert sum(found.accepted) + len(found.accepted) - 1 == len(outputs)


def test_transformers_leaves_the_model_as_it_was(dialled, run, unchanged, monkeypatch):
    unchanged(dialled.model)
    before = dialled.model.generation_config
    ids = run.prompt_ids(0).tolist()
    transformers_accepted(dialled, ids, 2, 3, 6)
    assert dialled.model.generation_config is before

    def broken(*args, **kwargs):
        raise RuntimeError("in the middle")

    handle = dialled.anatomy.layers[1].register_forward_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            transformers_accepted(dialled, ids, 2, 3, 6)
    finally:
        handle.remove()
    assert dialled.model.generation_config is before
    assert dialled.model.config.num_hidden_layers == 5
    assert "_get_candidate_generator" not in dialled.model.__dict__
    assert open_hooks(dialled.model) == []
