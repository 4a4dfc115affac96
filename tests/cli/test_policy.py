"""`--policy` reaches prediction, choice, decoding and validation."""

from __future__ import annotations

import json

import pytest

from probekit.cli.app import run


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("policy") / "prompts.txt"
    prompts.write_text("a king\nonce upon a time\nthe fox\n")
    folder = prompts.parent / "run"
    words = ["--prompts", str(prompts), "-o", str(folder), "--max-new-tokens", "16", "--quiet"]
    assert run(["trace", str(tiny_folder), *words]) == 0
    return folder


def document(capsys, *words):
    status = run([*map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_policy_is_obeyed_by_every_command(folder, tiny_folder, capsys):
    policy = ["--policy", "confidence:0.05", "--draft-lengths", "5", "--exit-layers", "3"]
    status, predicted = document(capsys, "predict", folder, "--rounds", *policy)
    assert status == 0 and not predicted["exact"] and "0.05" in predicted["policy"]
    assert document(capsys, "predict", folder)[1].keys() == predicted.keys() - {"policy", "rounds"}
    status, found = document(capsys, "validate", folder, *policy)
    assert status == 0 and found["cells"][0]["rounds_equal"] and "0.05" in found["policy"]
    status, chosen = document(capsys, "choose", folder, "--costs", "roofline", "--device", "h100", *policy)
    assert status == 0 and "0.05" in chosen["policy"]
    words = [
        "decode",
        tiny_folder,
        "a king",
        "--method",
        "self-speculative",
        "--exit-layer",
        "3",
        "--draft-length",
        "5",
    ]
    status, stopped = document(capsys, *words, "--policy", "confidence:1", "--max-new-tokens", "16")
    assert status == 0 and max(stopped["drafted"]) == 1
    status, plain = document(capsys, *words, "--max-new-tokens", "16")
    assert plain["tokens"] == stopped["tokens"] and max(plain["drafted"]) == 5


def test_a_policy_that_is_none_is_one_clear_line(folder, capsys):
    assert run(["predict", str(folder), "--policy", "sometimes"]) == 2
    assert "there is no policy 'sometimes'" in capsys.readouterr().err
