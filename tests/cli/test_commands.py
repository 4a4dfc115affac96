"""Every command on a tiny model: the JSON contract to the letter, and output that a person can read."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from probekit.cli.app import run
from probekit.cli.commands import ALL, name_of
from probekit.cli.validate import SHOWN_DIFFERENCES, _show_differences
from probekit.validation.differences import Difference

pytestmark = pytest.mark.usefixtures("brief_calibration")
CELL_KEYS = {
    "exit_layer", "draft_length", "prompts", "tokens", "rounds", "drafted", "accepted", "acceptance_rate",
    "acceptance_rate_interval", "alpha", "tokens_per_round", "tokens_per_round_interval", "accepted_by_position",
}  # fmt: skip


def document(capsys, *arguments: object) -> dict:
    """The one JSON document that a command prints."""
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("abc\ndefg\nhij\nk\n")
    return path


@pytest.fixture(scope="module")
def run_folder(tiny_folder, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(["trace", str(tiny_folder), "--prompts", str(prompts), "-o", str(folder), "--max-new-tokens", "12",
                "--keep-residuals", "all", "--residual-rows", "scored", "--device", "cpu", "--quiet"]) == 0  # fmt: skip
    return folder


def test_models(capsys):
    found = document(capsys, "models")
    assert found["schema"] == "probekit/models/1"
    for model in found["models"]:
        assert {"name", "path", "layers", "tied", "parameters", "trained_on"} <= set(model)


def test_inspect(capsys, tiny_folder):
    found = document(capsys, "inspect", tiny_folder)
    assert found["layers"] == 5
    assert found["tied"] is False
    assert run(["inspect", str(tiny_folder)]) == 0
    assert "layers" in capsys.readouterr().out


def test_predict(capsys, run_folder):
    found = document(capsys, "predict", run_folder, "--rounds")
    assert {"schema", "model", "text", "decoding", "first_round", "cells", "exact", "budget", "rounds"} <= set(found)
    assert found["schema"] == "probekit/predict/1"
    assert found["text"] == "greedy"
    assert found["exact"] is True
    assert found["decoding"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    assert len(found["cells"]) == 4 * 8
    assert all(set(cell) >= CELL_KEYS for cell in found["cells"])
    assert len(found["rounds"]) == 4 * 8 * 4
    for row in found["rounds"]:
        assert {"prompt", "exit_layer", "draft_length", "drafted", "accepted"} <= set(row)
    drafted = document(capsys, "predict", run_folder, "--first-round", "draft", "--exit-layers", "2,3",
                       "--draft-lengths", "1-2")  # fmt: skip
    assert [(cell["exit_layer"], cell["draft_length"]) for cell in drafted["cells"]] == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert drafted["first_round"] == "draft"
    assert "rounds" not in drafted


def test_choose(capsys, run_folder, tmp_path):
    found = document(capsys, "choose", run_folder, "--context", 16, "--exit-layers", "2,3", "--draft-lengths", "1-3",
                     "--export", tmp_path / "exported")  # fmt: skip
    assert {"schema", "exit_layer", "draft_length", "speedup", "interval", "speculate", "runners_up", "costs"} <= set(
        found
    )
    assert (found["exit_layer"] is None) == (not found["speculate"])
    assert list((tmp_path / "exported").iterdir())
    roofline = document(capsys, "choose", run_folder, "--costs", "roofline")
    assert roofline["costs"]["source"] == "roofline"


@pytest.mark.parametrize("costs", [pytest.param("measured", marks=pytest.mark.second), "roofline"])
def test_choose_ranks_long_drafts_and_the_draft_model(capsys, tiny_folder, tiny_draft, prompts, tmp_path, costs):
    drafter = tmp_path / "drafter"
    tiny_draft.model.save_pretrained(drafter)
    tiny_draft.tokenizer.save_pretrained(drafter)
    folder = tmp_path / "two models"
    assert run(["trace", str(tiny_folder), "--prompts", str(prompts), "-o", str(folder), "--max-new-tokens", "16",
                "--draft-model", str(drafter), "--device", "cpu", "--quiet"]) == 0  # fmt: skip
    found = document(capsys, "choose", folder, "--costs", costs, "--context", 16, "--draft-lengths", "11")
    assert {method["method"] for method in found["methods"]} == {"autoregressive", "self-speculative", "speculative"}
    assert {method["draft_length"] for method in found["methods"] if method["method"] != "autoregressive"} == {11}


def test_validate(capsys, run_folder):
    found = document(capsys, "validate", run_folder, "--exit-layers", "1,3", "--draft-lengths", "2,4", "--limit", 2)
    assert found["schema"] == "probekit/validate/1"
    assert len(found["cells"]) == 4
    for cell in found["cells"]:
        assert {"exit_layer", "draft_length", "predicted", "measured", "rounds_equal", "tokens_equal", "ties",
                "speedup_predicted", "speedup_measured"} <= set(cell)  # fmt: skip
        assert cell["rounds_equal"] or cell["ties"] > 0


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--method", "self-speculative", "--exit-layer", "2", "--draft-length", "3"],
        ["--method", "early-exit", "--exit-layer", "2"],
        ["--temperature", "0.8", "--seed", "3"],
    ],
)
def test_decode(capsys, tiny_folder, extra):
    found = document(capsys, "decode", tiny_folder, "abc", "--max-new-tokens", 8, *extra)
    assert found["schema"] == "probekit/decode/1"
    assert 1 <= len(found["tokens"]) <= 8
    assert found["lossless"] is ("early-exit" not in extra)
    assert run(["decode", str(tiny_folder), "abc", "--max-new-tokens", "8", *extra]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == found["text"].strip()


def test_lens(capsys, tiny_folder, tmp_path):
    found = document(capsys, "lens", tiny_folder, "abc", "--max-new-tokens", 3)
    assert found["schema"] == "probekit/lens/1"
    page = tmp_path / "lens.html"
    assert run(["lens", str(tiny_folder), "abc", "--max-new-tokens", "3", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "layer" in printed
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.second
def test_study_resumes_and_refuses(capsys, tiny_folder, prompts, tmp_path):
    folder = tmp_path / "study"
    arguments = ["study", tiny_folder, "--prompts", prompts, "-o", folder, "--max-new-tokens", 12,
                 "--draft-lengths", "1-3", "--device", "cpu"]  # fmt: skip
    summary = document(capsys, *arguments)
    assert summary["schema"] == "probekit/study/1"
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (folder / "report.html").exists()
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".pdf", ".svg", ".png"}
    assert {path.name for path in (folder / "tables").glob("*.csv")} >= {"layers.csv", "cells.csv", "validation.csv"}
    assert len(summary["models"]) == 1
    assert summary["models"][0]["sentence"]
    ways = summary["models"][0]["ways"]
    assert {row["policy"] for row in ways["ways"]} >= {"fixed", "none"}
    assert ways["oracle"]["speedup"] >= ways["ways"][0]["speedup"] and ways["ladder"][-1]["rung"] == "oracle"
    assert len(ways["validated"]) == 10
    assert all(row["rounds_equal"] and row["tokens_equal"] for row in ways["validated"])
    written = {path: path.stat().st_mtime_ns for path in (folder / "traces").rglob("*.parquet")}
    left = [folder / "figures" / ".0123.unfinished", next((folder / "phases").iterdir()) / ".4567.unfinished"]
    for path in left:  # by a process that was killed
        path.write_bytes(b"half")
    again = document(capsys, *arguments)
    assert not any(path.exists() for path in left)
    assert again["models"][0]["validation"] == summary["models"][0]["validation"]
    assert {path: path.stat().st_mtime_ns for path in (folder / "traces").rglob("*.parquet")} == written
    assert run([*map(str, arguments), "--chat"]) == 2
    assert "other settings (chat)" in capsys.readouterr().err


def test_every_command_prints_one_json_document(capsys, tiny_folder, prompts, run_folder, tmp_path):
    """Nothing else reaches standard output, and where no one watches, nothing reaches standard error either."""
    other, study = tmp_path / "other", tmp_path / "study"
    lines = {
        "models": ["models"],
        "inspect": ["inspect", tiny_folder],
        "lens": ["lens", tiny_folder, "abc", "--max-new-tokens", 2, "--raw", "--html", tmp_path / "lens.html"],
        "patch": ["patch", tiny_folder, "abcd", "abxd", "--sites", "residual"],
        "trace": ["trace", tiny_folder, "--prompts", prompts, "-o", other, "--max-new-tokens", 6],
        "predict": ["predict", run_folder],
        "choose": ["choose", run_folder, "--costs", "roofline"],
        "costs": ["costs", tiny_folder, "--engine", "transformers", "-o", tmp_path / "costs.json", "--exit-layers", 2,
                  "--draft-lengths", 2, "--contexts", 33, "--sweeps", 1],
        "export": ["export", run_folder, "-o", tmp_path / "to", "--exit-layer", 2, "--draft-length", 2],
        "rank": ["rank", run_folder, "--costs", "roofline", "--draft-lengths", 2],
        "probe": ["probe", run_folder, "--label", "position", "--layers", 2],
        "geometry": ["geometry", run_folder, "--directions", 3],
        "decode": ["decode", tiny_folder, "abc", "--max-new-tokens", 4],
        "validate": ["validate", run_folder, "--exit-layers", 2, "--draft-lengths", 2, "--limit", 1],
        "fit-heads": ["fit-heads", run_folder, "-o", tmp_path / "heads.safetensors"],
        "compare": ["compare", run_folder, run_folder],
        "study": ["study", tiny_folder, "--prompts", prompts, "-o", study, "--max-new-tokens", 6,
                  "--exit-layers", 2, "--draft-lengths", 2, "--context", 8],
        "report": ["report", study],
        "figures": ["figures", study, "--only", "fig02", "--format", "svg"],
        "verify": ["verify", study],
    }  # fmt: skip
    assert set(lines) == set(map(name_of, ALL))
    for name, arguments in lines.items():
        status = run([*map(str, arguments), "--json", "--device", "cpu", "--quiet"])
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert found["schema"] == f"probekit/{'cost-profile' if name == 'costs' else name}/1"
        assert (status == 2) == ("error" in found), (name, found)
        assert captured.err == "", name
        assert name == "compare" or status == 0


def test_each_difference_is_printed_with_its_margin(capsys):
    found = [Difference(prompt, "rounds", 7, "near-tie", 3, 1, 0.0123) for prompt in range(SHOWN_DIFFERENCES + 2)]
    _show_differences([SimpleNamespace(label="layer 2", draft_length=3, differences=found)])
    printed = capsys.readouterr().out
    assert "margin" in printed and "2 more are in the JSON" in printed
    assert printed.count("0.012") == SHOWN_DIFFERENCES
    _show_differences([SimpleNamespace(label="layer 2", draft_length=3, differences=())])
    assert capsys.readouterr().out == ""


def test_help_and_wrong_use(capsys):
    assert run(["--help"]) == 0
    helped = capsys.readouterr().out
    for command in ALL:
        assert name_of(command) in helped
        assert run([name_of(command), "--help"]) == 0
        assert {"--device", "--dtype", "--json", "--quiet"} <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for wrong in (["predict"], ["nonsense"], ["lens", "x"], ["decode", "x", "y", "--max-new-tokens", "many"]):
        assert run(wrong) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.strip().splitlines()) == 1
