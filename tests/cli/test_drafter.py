"""`--drafter` reaches prediction and validation: each drafter by its name, and the default as before."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from probekit.cli.app import run
from probekit.prediction.predict import predict
from probekit.traces.trace import Trace


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("drafter") / "prompts.txt"
    prompts.write_text("a king\naaa bbb aaa\nthe fox\n")
    folder = prompts.parent / "run"
    words = ["--prompts", str(prompts), "-o", str(folder), "--max-new-tokens", "16", "--quiet"]
    assert run(["trace", str(tiny_folder), *words, "--draft-model", str(tiny_folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def imported(folder):
    trace = Trace.open(folder)
    rows = [(prompt, at, int(token)) for prompt in trace.prompts for at, token in enumerate(trace.outputs(prompt))]
    path = folder.parent / "perfect.parquet"
    pd.DataFrame(rows, columns=["prompt", "output", "token"]).to_parquet(path)
    return path


def document(capsys, *words):
    status = run([*map(str, words), "--json"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads(shown.out)


def names(imported):
    """What is named, and what a cell and a round then carry: drafter, exit layers."""
    return [
        ("exit", "self", [1, 2, 3, 4]),
        ("model", None, [None]),
        ("ngram:2", "ngram:2", [None]),
        ("ngram:2-3:vllm", "ngram:2-3:vllm", [None]),
        ("suffix", "suffix", [None]),
        (f"imported:{imported}", "perfect", [None]),
        ("tree:2x1", "tree:2x1", [1, 2, 3, 4]),
        ("tree:2/1/0/0", "tree:2/1/0/0", [1, 2, 3, 4]),
    ]


def test_each_drafter_by_its_name(folder, imported, capsys):
    for text, drafter, exits in names(imported):
        found = document(capsys, "predict", folder, "--drafter", text, "--draft-lengths", "2", "--rounds")
        own = Trace.open(folder).manifest.drafter.name if drafter is None else drafter
        assert [(cell["drafter"], cell["exit_layer"]) for cell in found["cells"]] == [(own, each) for each in exits]
        assert {row["drafter"] for row in found["rounds"]} == {own}
        assert {row["exit_layer"] for row in found["rounds"]} == set(exits)
        for cell in found["cells"]:
            rows = [row for row in found["rounds"] if row["exit_layer"] == cell["exit_layer"]]
            assert sum(len(row["drafted"]) for row in rows) == cell["rounds"]
            assert sum(map(sum, (row["drafted"] for row in rows))) == cell["drafted"]


def test_the_default_is_as_it_was(folder, capsys):
    assert document(capsys, "predict", folder) == json.loads(json.dumps(predict(folder).to_json()))
    exits = document(capsys, "predict", folder, "--drafter", "exit")["cells"]
    model = document(capsys, "predict", folder, "--drafter", "model")["cells"]
    assert document(capsys, "predict", folder)["cells"] == exits + model
    assert document(capsys, "predict", folder, "--exit-layers", "2")["cells"] == [
        cell for cell in exits if cell["exit_layer"] == 2
    ]


def test_a_length_of_a_tree_counts_levels(folder, capsys):
    cells = document(capsys, "predict", folder, "--drafter", "tree:3x2x1", "--exit-layers", "2")["cells"]
    assert [cell["draft_length"] for cell in cells] == [1, 2, 3]
    assert cells[0]["drafted"] <= 3 * cells[0]["rounds"]


def test_each_is_run(folder, imported, capsys):
    for text in ("model", "ngram:2", f"imported:{imported}", "tree:2x1"):
        words = ["--draft-lengths", "2", "--limit", "2", *(["--exit-layers", "2"] if "tree" in text else [])]
        [cell] = document(capsys, "validate", folder, "--drafter", text, *words)["cells"]
        assert cell["rounds_equal"] and cell["tokens_equal"] and cell["speedup_predicted"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drafter", "oracle"], "'oracle' names no drafter"),
        (["--drafter", ""], "'' names no drafter"),
        (["--drafter", "exit:3"], "'exit:3' names no drafter"),
        (["--drafter", "ngram"], "'ngram' names no lookup"),
        (["--drafter", "ngram:0"], "must be"),
        (["--drafter", "tree:"], "'tree:' names no drafter"),
        (["--drafter", "tree:0x1"], "'0x1' names no shape"),
        (["--drafter", "tree:99x99"], "1 to 256"),
        (["--drafter", "imported:nothing.parquet"], "there is no file nothing.parquet"),
        (["--drafter", "ngram:2", "--exit-layers", "2"], "drafts from no exit"),
        (["--drafter", "tree:2x1", "--draft-rows", "8"], "no smaller head"),
        (["--drafter", "tree:2x1", "--draft-lengths", "3"], "this tree has 2 levels"),
        (["--drafter", "tree:2x1", "--exit-layers", "9"], "exit layer 9 is out of range"),
        (["--drafter", "ngram:2", "--policy", "confidence:0.5"], "never more or less sure"),
    ],
)
def test_bad_input_is_one_clear_line(folder, capsys, words, message):
    assert run(["predict", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_run_without_a_draft_model(tiny_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    (tmp_path / "prompts.txt").write_text("a king\n")
    words = ["--prompts", str(tmp_path / "prompts.txt"), "-o", str(folder), "--max-new-tokens", "4", "--quiet"]
    assert run(["trace", str(tiny_folder), *words]) == 0
    assert run(["predict", str(folder), "--drafter", "model"]) == 2
    assert "no draft model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--drafter", "ngram:2"], ["--drafter", "tree:2x1", "--exit-layer", 2], ["--exit-layer", 2]]
)
def test_decode_drafts_as_it_is_told(capsys, tiny_folder, words):
    found = document(capsys, "decode", tiny_folder, "aaa bbb aaa", "--draft-length", 2, "--max-new-tokens", 16, *words)
    plain = document(capsys, "decode", tiny_folder, "aaa bbb aaa", "--max-new-tokens", 16)
    assert found["tokens"] == plain["tokens"]
    assert sum(found["drafted"]) > 0
