"""Profiles that a person types in: what they mean, what is read between their rows, and what is refused."""

from __future__ import annotations

import json

import pytest
from traces.fabricate import fabricate

from probekit.choice.choose import choose
from probekit.costs.engine_profile import SCHEMA, EngineProfile, Step, read_profile
from probekit.costs.profile import Costs
from probekit.drafting.keys import DrafterKey
from probekit.errors import InputError
from probekit.prediction.predict import predict

CSV = """step,exit_layer,tokens,rows,context,seconds
autoregressive,,1,1,128,0.010
autoregressive,,1,16,128,0.012
draft,2,1,1,128,0.004
draft,2,1,16,128,0.005
verify,,2,1,128,0.011
verify,,5,1,128,0.014
verify,,2,16,128,0.020
verify,,5,16,128,0.050
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "vllm.csv"
    path.write_text(CSV)
    return path


def test_rounds_of_a_typed_table(table):
    """Exit 2 of 4: k draft steps of 4 ms and a pass of the whole model; 3 tokens lie between 2 and 5."""
    profile = read_profile(table)
    costs = profile.costs(4)
    assert (costs.source, costs.rows, costs.context, costs.autoregressive_s) == ("vllm", 1, 128, 0.010)
    assert costs.round_seconds(2, 1) == pytest.approx(0.004 + 0.011)
    assert costs.round_seconds(2, 2) == pytest.approx(2 * 0.004 + 0.012)
    assert costs.round_seconds(2, 0) == pytest.approx(0.010)
    assert costs.round_seconds(3, 1) == pytest.approx(0.007 + 0.011)  # halfway from 2 layers to all 4
    assert costs.longest_draft == 4
    assert costs.whole_pass_seconds(3) == pytest.approx(0.012)  # a lookup's round: nobody drafts
    assert Costs.from_json(costs.to_json()) == costs
    batch = profile.costs(4, rows=16)
    assert batch.round_seconds(2, 4) == pytest.approx(4 * 0.005 + 0.050)
    assert profile.costs(4, rows=6).autoregressive_s == pytest.approx(0.010 + 0.002 / 3)


def test_json_is_the_same(table, tmp_path):
    profile = read_profile(table)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile.to_json()))
    assert read_profile(path) == profile
    assert profile.to_json()["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("ask", "message"),
    [({"rows": 32}, "for rows 1 to 16, not 32"), ({"context": 4096}, "for context 128, not 4096")],
)
def test_beyond_the_profile_nothing_is_known(table, ask, message):
    with pytest.raises(InputError, match=message):
        read_profile(table).costs(4, **ask)


def test_a_drafter_as_deep_as_the_model(table):
    with pytest.raises(InputError, match="a drafter of 2 layers; the model has 2"):
        read_profile(table).costs(2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prefill,,1,1,128,0.1", "step 9: step 'prefill' is not known"),
        ("verify,,2,1,128,-1", "step 9: a verify step takes -1 seconds"),
        ("verify,,1,1,128,1", "tokens of a verify step is 1; expected 2 to 10,000"),
        ("draft,,1,1,128,1", "draft and first steps have one"),
        ("verify,,2,1,128,0", "a verify step takes 0 seconds"),
        ("verify,,2,0,128,1", "rows of a verify step is 0"),
        ("verify,,2,1.5,128,1", "rows of a verify step is 1.5"),
        ("verify,,2,1,128,fast", "takes 'fast' seconds"),
    ],
)
def test_bad_rows_are_named(table, line, message):
    table.write_text(CSV + line + "\n")
    with pytest.raises(InputError, match=message):
        read_profile(table)


def test_files_that_are_no_profile(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": "probekit/choose/1"}')
    with pytest.raises(InputError, match="expected probekit/cost-profile/1"):
        read_profile(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_profile(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="has no draft step"):
        EngineProfile("e", "d", "t", (Step("autoregressive", 1.0), Step("verify", 1.0, tokens=2)))


# ------------------------------------------------------------------------------------- a draft model of its own
HELPED = """step,drafter,tokens,rows,context,seconds
autoregressive,,1,1,128,0.010
draft,small,1,1,128,0.001
first,small,1,1,128,0.0005
verify,,2,1,128,0.011
verify,,5,1,128,0.014
"""


def test_a_draft_model_of_its_own_needs_no_exits(tmp_path):
    path = tmp_path / "vllm.csv"
    path.write_text(HELPED)
    profile = read_profile(path)
    assert profile.drafters == ["small"]
    path.with_suffix(".json").write_text(json.dumps(profile.to_json()))
    assert read_profile(path.with_suffix(".json")).steps == profile.steps
    for costs in (profile.costs(6), profile.costs(6, drafter="small")):
        small = DrafterKey.draft_model("small")
        assert costs.round_seconds(small, 2) == pytest.approx(2 * 0.001 + 0.0005 + 0.012)
        assert costs.round_seconds(small, 0) == pytest.approx(0.010)
        assert costs.longest_draft == 4
        assert not costs.knows(DrafterKey.exit(2))
        assert Costs.from_json(costs.to_json()) == costs
    assert profile.costs(6, drafter="another").draft_model is None


def test_what_was_not_timed_is_not_chosen_from(tmp_path):
    path = tmp_path / "vllm.csv"
    path.write_text(HELPED.replace("small", "fabricated-drafter"))
    trace = fabricate(drafter=True, agreement=[0.9] * 6)
    choice = choose(predict(trace, draft_lengths=[1, 2, 4]), read_profile(path).costs(trace.depth))
    assert {each.label for each in choice.ranking} == {"fabricated-drafter"}
    with pytest.raises(InputError, match="there is nothing to choose from"):
        choose(predict(fabricate(agreement=[0.9] * 6)), read_profile(path).costs(6))


def test_two_draft_models_are_told_apart(table):
    typed = read_profile(table)
    steps = (*typed.steps, Step("draft", 0.001, drafter="small", context=128),
             Step("draft", 0.002, drafter="large", context=128))  # fmt: skip
    both = EngineProfile("vllm", "cpu", "float32", steps)
    assert both.costs(4).draft_model is None  # which of them is not said
    for name, seconds in (("small", 0.001), ("large", 0.002)):
        costs = both.costs(4, drafter=name)
        assert costs.round_seconds(DrafterKey.draft_model(name), 1) == pytest.approx(seconds + 0.011)
        assert costs.round_seconds(2, 1) == pytest.approx(0.004 + 0.011)  # exits as before


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"step": "draft", "drafter": ""}, "expected the name of a draft model"),
        ({"step": "draft", "drafter": "small", "exit_layer": 2}, "of exit layer 2 and of the draft model small"),
        ({"step": "verify", "drafter": "small", "tokens": 3}, "draft and first steps have one of them, others none"),
    ],
)
def test_a_step_is_of_one_drafter(step, message):
    with pytest.raises(InputError, match=message):
        Step(seconds=0.1, **step)
