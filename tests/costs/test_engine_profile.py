"""Profiles that a person types in: what they mean, what is read between their rows, and what is refused."""

from __future__ import annotations

import json

import pytest

from probekit.costs.engine_profile import SCHEMA, EngineProfile, Step, read_profile
from probekit.costs.profile import Costs
from probekit.errors import InputError

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
