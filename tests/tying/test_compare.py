"""Traces side by side: the contract's JSON, paired differences, and which factor may be blamed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from traces.fabricate import fabricate
from tying.toys import toy

from probekit.errors import InputError
from probekit.traces.trace import Trace
from probekit.tying.compare import compare_traces, explain, recipe_of

RISING = [[[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]], [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]]


def renamed(trace: Trace, **changes) -> Trace:
    manifest = trace.manifest.but(model=replace(trace.manifest.model, **changes))
    return Trace.from_frames(manifest, trace.texts, trace.tokens, trace.layers)


def record(folder, *, recipe=None, data="text", seed=1):
    folder.mkdir()
    (folder / "training.json").write_text(
        json.dumps({"corpus_sha256": data, "steps": 10, "seed": seed, "recipe": recipe})
    )
    return str(folder)


@pytest.fixture
def trained(tmp_path):
    """Three traces whose models differ in tying, or in training, and carry the record of it."""
    base = toy(RISING)
    return (
        renamed(base, name="untied", reference=record(tmp_path / "a"), weights_hash="a"),
        renamed(base, name="tied", reference=record(tmp_path / "b"), weights_hash="b", tied=True, parameters=1),
        renamed(base, name="skip", reference=record(tmp_path / "c", recipe={"dropout": 0.1}), weights_hash="c"),
    )


def test_the_document():
    comparison = compare_traces([fabricate(prompts=3), fabricate(prompts=3, seed=1)])
    document = comparison.to_json()
    assert document["schema"] == "probekit/compare/1"
    assert set(document) == {"schema", "models", "layers", "differences", "factors", "verdicts"}
    assert len(document["layers"]) == 2 * 7
    json.dumps(document, allow_nan=False)
    for table in comparison.tables():
        assert table.title
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert len(comparison.to_pandas()) == len(document["differences"])
    assert "half agreement" in comparison._repr_html_()


def test_classes_of_a_layer_sum_to_one():
    for row in compare_traces([fabricate(), fabricate(seed=1)]).layers:
        assert row["agrees"] + row["echoes"] + row["in_top_50"] + row["gibberish"] == pytest.approx(1)
        assert row["echo_interval"][0] <= row["echo"] <= row["echo_interval"][1]


def test_a_difference_by_hand():
    """Agreement after one layer 2/8 and 4/8; after two 1 and 1."""
    other = [[[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]]
    found = {row["quantity"]: row for row in compare_traces([toy(RISING), toy(other)]).differences}
    quarter = found["agreement at a quarter of the depth"]
    assert (quarter["one_value"], quarter["other_value"]) == (pytest.approx(2 / 8), pytest.approx(4 / 8))
    assert quarter["difference"] == pytest.approx(-1 / 4)
    assert quarter["interval"] == pytest.approx([-1 / 4, -1 / 4])  # the same on both prompts, and they are paired
    assert quarter["clear"]
    assert quarter["paired"]
    # half agreement: between 2/8 and 1 at 1 + 1/3 of 3 layers; at exactly one half after one layer
    assert found["depth of half agreement, share of the depth"]["difference"] == pytest.approx(4 / 9 - 1 / 3)


@pytest.mark.second
def test_clear_is_said_of_all_differences_together():
    """Two models of one kind: by themselves some intervals leave out 0 by chance, all together hardly ever."""
    comparisons = [
        compare_traces([fabricate(prompts=12, seed=2 * seed), fabricate(prompts=12, seed=2 * seed + 1)])
        for seed in range(6)
    ]
    rows = [row for comparison in comparisons for row in comparison.differences]
    alone = [row for row in rows if row["interval"][0] > 0 or row["interval"][1] < 0]
    assert alone
    assert sum(row["clear"] for row in rows) < len(alone)
    assert all(row["p_corrected"] >= row["p"] for row in rows)
    assert "Holm" in comparisons[0].tables()[2].footnote
    apart = compare_traces([fabricate(prompts=12), fabricate(prompts=12, agreement=[0.95] * 6)])
    assert any(row["clear"] for row in apart.differences)


def test_other_prompts_are_not_paired():
    rows = compare_traces([toy(RISING), toy(RISING, prompts_hash="others")]).differences
    assert not any(row["paired"] for row in rows)
    assert all(row["difference"] == pytest.approx(0) for row in rows)


def test_tying_and_training_are_told_apart(trained):
    comparison = compare_traces(trained)
    factors = {(row["one"], row["other"]): row for row in comparison.factors}
    assert factors["untied", "tied"]["factor"] == "tying"
    assert factors["untied", "skip"]["factor"] == "training"
    assert factors["tied", "skip"]["factor"] == "cannot be separated"
    assert factors["tied", "skip"]["differ"] == ["tying", "training"]
    assert [model["training"] for model in comparison.models] == ["plain", "plain", "early-exit"]
    assert {row["factor"] for row in comparison.differences if row["other"] == "tied"} == {"tying"}


def test_other_data_cannot_be_told_from_tying(trained, tmp_path):
    untied, tied, _ = trained
    tied = renamed(tied, reference=record(tmp_path / "d", data="other text"))
    found = explain(recipe_of(untied), recipe_of(tied), untied, tied)
    assert found["differ"] == ["tying", "data"]
    assert not found["separable"]


def test_unknown_recipes_cannot_be_separated():
    one, other = renamed(toy(RISING), name="a", weights_hash="a"), renamed(toy(RISING), name="b", weights_hash="b")
    found = explain(recipe_of(one), recipe_of(other), one, other)
    assert found["differ"] == ["data (not known)", "training (not known)"]
    assert "cannot tell them apart" in found["says"]
    bigger = renamed(other, tied=True, width=32)
    assert explain(recipe_of(one), recipe_of(bigger), one, bigger)["differ"][:2] == ["tying", "size"]


def test_the_same_model_on_two_texts():
    one, other = toy(RISING), toy(RISING, accept=[[[0.5] * 4] * 3] * 2)
    comparison = compare_traces([one, other])
    assert comparison.factors[0]["factor"] == "text"
    assert [model["run"] for model in comparison.models] == ["toy (greedy)", "toy (sampled)"]
    same = compare_traces([one, one])
    assert same.factors[0]["factor"] == "nothing"
    assert same.factors[0]["one"] != same.factors[0]["other"]


def test_models_of_other_depth_are_compared_by_share_of_depth():
    rows = compare_traces([fabricate(depth=4), fabricate(depth=9)]).differences
    assert all(np.isfinite(row["difference"]) for row in rows)


def test_what_cannot_be_compared():
    with pytest.raises(InputError, match="at least two"):
        compare_traces([fabricate()])
    with pytest.raises(InputError, match="agreement only"):
        compare_traces([fabricate(), fabricate(statistics="agreement")])
