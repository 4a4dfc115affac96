"""A study handed on: its card, and its figures in an experiment tracker."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from presentation.fabricate_study import fabricate_study

import probekit
from probekit.cli.app import run
from probekit.errors import InputError
from probekit.presentation.model_card import inline, metadata, write_card
from probekit.presentation.report import write_report
from probekit.study.log_to import check_tracker, log_study, metrics_of
from probekit.tracing.prompts import as_prompts


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory):
    return fabricate_study(tmp_path_factory.mktemp("studies") / "study", models=("a", "b|c"), prompts=8)


@pytest.fixture
def study(fabricated, tmp_path):
    """A copy of it, and its summary."""
    folder = Path(shutil.copytree(fabricated, tmp_path / "study"))
    return folder, json.loads((folder / "summary.json").read_text())


def test_the_card_is_what_a_hub_reads(study):
    folder, summary = study
    summary["models"][0]["reference"] = "owner/model@main"
    summary["models"][1]["reference"] = "/a/folder"
    page = write_card(folder, summary).read_text()
    _, header, body = page.split("---\n", 2)
    assert yaml.safe_load(header) == metadata(summary)
    assert metadata(summary)["base_model"] == ["owner/model"]
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(summary["models"])
    assert all(line.replace("\\|", "").count("|") == 7 for line in rows)  # a name with a bar stays in its cell
    assert "Measured on" in body


def test_nothing_in_a_card_is_markup():
    assert inline("a|b `c` <d>\n# e") == r"a\|b \`c\` \<d\> \# e"
    assert inline(None) == "–"


class Recorder:
    """Stands for a tracker: what a test machine has none of."""

    def __init__(self) -> None:
        self.calls: list = []

    def __getattr__(self, name):
        return lambda *given, **named: self.calls.append((name, given, named)) or self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_gets_settings_figures_and_files(study, monkeypatch, tracker):
    folder, summary = study
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, tracker, recorder)
    log_study(tracker, folder, summary)
    names = [name for name, *_ in recorder.calls]
    for wanted in {"wandb": ("init", "log", "log_artifact", "finish"), "mlflow": ("start_run", "log_metrics")}[tracker]:
        assert names.count(wanted) == len(summary["models"])
    for model in summary["models"]:
        found = metrics_of(model)
        assert found["speedup_predicted"] == model["choice"]["speedup"]
        assert found["agreement_layer_000"] == model["agreement"][0]
        assert all(isinstance(value, float) for value in found.values())


def test_a_tracker_that_is_not_there_is_told_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(["study", "tales-tied", "-o", str(tmp_path / "study"), "--log-to", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
    with pytest.raises(InputError, match="wandb or mlflow"):
        check_tracker("tensorboard")


@pytest.mark.second
@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_the_real_trackers_take_it(study, monkeypatch, tmp_path, tracker):
    """Where they are installed: offline, into a folder."""
    pytest.importorskip(tracker)
    folder, summary = study
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_report(folder)
    log_study(tracker, folder, summary)
    if tracker == "mlflow":
        metrics = list((tmp_path / "mlruns").rglob("speedup_predicted"))
        assert len(metrics) == len(summary["models"])
        assert len(list((tmp_path / "mlruns").rglob("report.html"))) == len(summary["models"])
    else:
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == len(summary["models"])


def test_frames_and_datasets_are_prompts(tiny_folder):
    frame = pd.DataFrame({"prompt": ["abc", "de"], "kind": ["code", None], "response": [None, None]})
    made = as_prompts(frame)
    assert [(prompt.text, prompt.kind, prompt.response) for prompt in made] == [("abc", "code", None), ("de", "", None)]
    rows = ({"prompt": text} for text in ("abc", "de"))  # what iterating a datasets.Dataset gives
    assert [prompt.text for prompt in as_prompts(rows)] == ["abc", "de"]
    assert len(probekit.trace(tiny_folder, frame, max_new_tokens=2)) == 2
    with pytest.raises(InputError, match="no `prompt`"):
        as_prompts(pd.DataFrame({"text": ["abc"]}))
