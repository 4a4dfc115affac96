"""Exit heads on the command line: fitted on one run, traced on other prompts, chosen, validated, decoded, studied."""

from __future__ import annotations

import base64
import json

import numpy as np
import pandas as pd
import pytest

from probekit.cli.app import run
from probekit.costs.profile import Costs
from probekit.presentation.report_data import Source, pack_models
from probekit.traces.trace import Trace


def document(capsys, *arguments: object) -> dict:
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def places(tiny_folder, tiny_tied_folder, tmp_path_factory):
    """A run to fit on, the heads, and a run through them."""
    folder = tmp_path_factory.mktemp("exit-heads")
    names = {name: str(folder / name) for name in ("fitted", "heads.safetensors", "run", "other", "long")}
    (folder / "some.txt").write_text("abc\ndefg\nhij\n")
    (folder / "others.txt").write_text("xyz\nklmn\n")
    (folder / "many.txt").write_text("xyz\nklmn\npq\nrs\ntuv\nwx\n")
    common = ["--max-new-tokens", "12", "--device", "cpu", "--quiet"]
    sampled = ["--temperature", "0.8", "--seed", "1"]
    some, others = ["--prompts", str(folder / "some.txt")], ["--prompts", str(folder / "others.txt")]
    assert run(["trace", str(tiny_folder), *some, "-o", names["fitted"], *common, *sampled]) == 0
    assert run(["trace", str(tiny_tied_folder), *some, "-o", names["other"], *common]) == 0
    assert run(["trace", str(tiny_folder), *some, "-o", names["long"], *common, "--max-new-tokens", "24"]) == 0
    assert run(["fit-heads", names["fitted"], "-o", names["heads.safetensors"], "--quiet"]) == 0
    through = ["--exit-heads", names["heads.safetensors"]]
    assert run(["trace", str(tiny_folder), *others, "-o", names["run"], *common, *through]) == 0
    return {
        **names,
        "model": str(tiny_folder),
        "prompts": str(folder / "others.txt"),
        "many": str(folder / "many.txt"),
        "folder": str(folder),
    }


def test_fit_heads_says_what_it_did(capsys, places, tmp_path):
    arguments = [places["fitted"], "-o", tmp_path / "some.safetensors", "--exit-layers", "2,4", "--ridge", "0.01"]
    found = document(capsys, "fit-heads", *arguments)
    assert found["schema"] == "probekit/fit-heads/1"
    assert (found["exit_layers"], found["texts"], found["ridge"]) == ([2, 4], 3, 0.01)
    assert found["tokens"] > 3 * 12
    assert found["method"] == "ridge"
    assert run(["fit-heads", *map(str, arguments)]) == 0
    assert "probekit trace" in capsys.readouterr().err


def test_a_jacobian_lens_is_fitted_read_through_and_drafted_with(capsys, places, tmp_path):
    heads = tmp_path / "lens.safetensors"
    found = document(capsys, "fit-heads", places["long"], "-o", heads, "--jacobian", "--exit-layers", "1,3")
    assert (found["method"], found["ridge"], found["exit_layers"]) == ("jacobian", None, [1, 3])
    words = ["lens", places["model"], "abc", "--max-new-tokens", 4]
    plain, through = document(capsys, *words), document(capsys, *words, "--exit-heads", heads)
    changed = [one != other for one, other in zip(plain["layers"], through["layers"], strict=True)]
    assert changed == [False, True, False, True, False, False]
    assert (plain["exit_heads"], through["exit_heads"]) == (None, found["fingerprint"])
    how = ["--method", "self-speculative", "--exit-layer", 3, "--draft-length", 3, "--max-new-tokens", 9]
    drafted = document(capsys, "decode", places["model"], "abc", *how, "--exit-heads", heads)
    assert drafted["tokens"] == document(capsys, "decode", places["model"], "abc", "--max-new-tokens", 9)["tokens"]


@pytest.mark.second
def test_trace_predict_choose_and_validate(capsys, places):
    name = document(capsys, "fit-heads", places["fitted"], "-o", places["heads.safetensors"])["fingerprint"]
    assert document(capsys, "predict", places["run"])["exit_heads"] == name
    for costs in ("roofline", "measured"):
        found = document(capsys, "choose", places["run"], "--costs", costs, "--context", 16, "--draft-lengths", "1,2")
        assert found["exit_heads"] == found["costs"]["exit_heads"] == name
    found = document(capsys, "validate", places["run"], "--exit-layers", "1,2,4", "--draft-lengths", "3")
    assert found["exit_heads"] == name
    assert all(cell["rounds_equal"] and cell["tokens_equal"] for cell in found["cells"])
    assert run(["predict", places["run"]]) == 0
    assert "through exit heads" in capsys.readouterr().out


def test_decode(capsys, places):
    plain = document(capsys, "decode", places["model"], "abc", "--max-new-tokens", 9)
    how = ["--method", "self-speculative", "--exit-layer", 2, "--draft-length", 3, "--max-new-tokens", 9]
    through = document(capsys, "decode", places["model"], "abc", *how, "--exit-heads", places["heads.safetensors"])
    assert through["tokens"] == plain["tokens"]


@pytest.mark.second
def test_a_study_fits_counts_and_validates(capsys, places, tmp_path):
    arguments = ["study", places["model"], "--prompts", places["many"], "-o", tmp_path / "study",
                 "--max-new-tokens", 8, "--draft-lengths", "1,2", "--fit-heads", "--draft-rows", 30]  # fmt: skip
    found = document(capsys, *arguments)
    (model,) = found["models"]
    assert Trace.open(tmp_path / "study" / model["trace"]).prompts == [1, 2, 3, 5], "0 and 4 are learned on"
    assert (found["settings"]["fit_heads"], found["settings"]["draft_rows"]) == (True, 30)
    assert model["choice"]["exit_heads"] and model["choice"]["draft_rows"] == 30
    assert all(cell["rounds_equal"] and cell["tokens_equal"] for cell in model["validation"]["cells"])
    page = (tmp_path / "study" / "report.html").read_text()
    assert "is read through exit heads; the raw lens is not." in page
    assert "30 rows, the most frequent tokens of" in page
    replays_the_draft_head(tmp_path / "study", model)
    (heads,) = (tmp_path / "study" / "exit_heads").iterdir()
    before = heads.stat().st_mtime_ns
    again = document(capsys, *arguments)
    assert heads.stat().st_mtime_ns == before, "a study that is resumed fits nothing again"
    assert again["models"][0]["choice"]["exit_heads"] == model["choice"]["exit_heads"]
    assert run([*map(str, arguments[:-2]), "--quiet"]) == 2
    assert "draft_rows" in capsys.readouterr().err


def replays_the_draft_head(folder, model):
    """What the report's replay reads is the agreement of the draft head, and no token that it does not know."""
    trace = Trace.open(folder / model["trace"])
    costs = Costs.from_json(model["choice"]["costs"])
    (packed,) = pack_models([Source("tiny", trace, pd.read_csv(folder / "tables" / "cells.csv"), costs)])
    for row in packed["prompts"]:
        expected = trace.draft_head_agreement(row["prompt"], 30)[1:-1]
        data = np.frombuffer(base64.b64decode(row["signal"]["data"]), dtype=np.uint8)
        np.testing.assert_array_equal(np.unpackbits(data, count=row["signal"]["length"]), expected.ravel())
        assert row["drafts"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit-heads", "{fitted}", "{other}", "-o", "{folder}/x"], "different models"),
        (["fit-heads", "{fitted}", "-o", "{folder}"], "is no file that can be written"),
        (["fit-heads", "{fitted}", "-o", "{folder}/nowhere/x"], "there is no folder"),
        (["fit-heads", "{folder}/none", "-o", "{folder}/x"], "no run folder"),
        (["fit-heads", "{fitted}", "-o", "{folder}/x", "--ridge", "0"], "must exceed 0"),
        (["fit-heads", "{fitted}", "-o", "{folder}/x", "--exit-layers", "7"], "exit layer 7"),
        (["fit-heads", "{fitted}", "-o", "{folder}/x", "--jacobian"], "no text has 18 tokens"),
        (["fit-heads", "{fitted}", "-o", "{folder}/x", "--jacobian", "--ridge", "1"], "has no --ridge"),
        (["trace", "{model}", "-o", "{folder}/x", "--exit-heads", "{prompts}"], "cannot be read as exit heads"),
        (["decode", "{model}", "abc", "--exit-heads", "{heads.safetensors}"], "exit_heads"),
        (["study", "{model}", "-o", "{folder}/y", "--prompts", "{many}", "--draft-rows", "0"], "out of range"),
        (["study", "{model}", "-o", "{folder}/z", "--prompts", "{many}", "--draft-rows", "98"], "out of range"),
        (["study", "{model}", "-o", "{folder}/x", "--prompts", "{prompts}", "--fit-heads"], "at least 3 prompts"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, places, arguments, message):
    filled = []
    for argument in arguments:
        for name, value in places.items():
            argument = argument.replace(f"{{{name}}}", value)
        filled.append(argument)
    assert run(filled) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
