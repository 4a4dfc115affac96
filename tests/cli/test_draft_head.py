"""Draft heads of F rows on the command line: an order from one run, predictions from another, and the decoder."""

from __future__ import annotations

import json

import pytest

from probekit.cli.app import run


def document(capsys, *arguments: object) -> dict:
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """(the run that is counted, the run that answers for draft heads)"""
    folder = tmp_path_factory.mktemp("draft-head")
    prompts = folder / "prompts.txt"
    prompts.write_text("abc\ndefg\nhij\n")
    common = [str(tiny_folder), "--prompts", str(prompts), "--max-new-tokens", "12", "--device", "cpu", "--quiet"]
    assert run(["trace", *common, "-o", str(folder / "counted")]) == 0
    order = ["--draft-vocabulary", str(folder / "counted")]
    assert run(["trace", *common, "-o", str(folder / "run"), *order]) == 0
    return folder / "counted", folder / "run"


@pytest.mark.second
def test_predict_choose_and_validate_with_a_draft_head(capsys, runs):
    _, folder = runs
    head = ["--draft-rows", 6]
    assert document(capsys, "predict", folder, *head)["draft_rows"] == 6
    for costs in ("roofline", "measured"):
        found = document(capsys, "choose", folder, *head, "--costs", costs, "--context", 16, "--draft-lengths", "1,2")
        assert found["draft_rows"] == found["costs"]["draft_rows"] == 6
    found = document(capsys, "validate", folder, *head, "--exit-layers", "2,4", "--draft-lengths", "3")
    assert found["draft_rows"] == 6
    assert all(cell["rounds_equal"] and cell["tokens_equal"] for cell in found["cells"])
    assert run(["predict", str(folder), "--draft-rows", "6"]) == 0
    assert "draft head of 6 rows" in capsys.readouterr().out


def test_decode_with_a_draft_head(capsys, tiny_folder, runs):
    counted, _ = runs
    plain = document(capsys, "decode", tiny_folder, "abc", "--max-new-tokens", 9)
    how = ["--method", "self-speculative", "--exit-layer", 2, "--draft-length", 3, "--max-new-tokens", 9]
    kept = document(capsys, "decode", tiny_folder, "abc", *how, "--draft-vocabulary", counted, "--draft-rows", 4)
    assert kept["tokens"] == plain["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{counted}", "--draft-rows", "5"], "--draft-vocabulary"),
        (["predict", "{run}", "--draft-rows", "98"], "out of range"),
        (["decode", "{model}", "abc", "--draft-rows", "5"], "belong together"),
        (["decode", "{model}", "abc", "--draft-rows", "5", "--draft-vocabulary", "{counted}"], "draft_vocabulary"),
        (["trace", "{model}", "-o", "{counted}-2", "--temperature", "1", "--draft-vocabulary", "{run}"], "greedy text"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, tiny_folder, runs, arguments, message):
    places = {"model": tiny_folder, "counted": runs[0], "run": runs[1]}
    assert run([argument.format(**places) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
