"""The script that runs on a GPU, in miniature on a CPU: every part of it, and what its records hold."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytestmark = pytest.mark.second

ANALYSES = Path(__file__).parent.parent / "analyses"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ANALYSES))
        yield importlib.import_module("validate_on_gpu")
    for name in ("validate_on_gpu", "benchmarking"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(script):
    app = typer.Typer(add_completion=False)
    app.command()(script.main)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def miniature(run, tmp_path_factory):
    """The folder that `--miniature` leaves, without the study of real weights."""
    folder = tmp_path_factory.mktemp("gpu")
    parts = [word for part in ("costs", "cells", "tutorial") for word in ("--part", part)]
    result = run("--device", "cpu", "--miniature", "-o", folder, *parts)
    assert result.exit_code == 0, result.output
    return folder


def record(folder, name):
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert found["schema"] == f"probekit/gpu-{name}/1"
    assert found["machine"]["device"] == "cpu" and found["versions"]["torch"] == torch.__version__
    assert found["settings"]["miniature"] is True and found["seconds"] > 0
    for rate in found["rates"].values():
        assert 0 < rate["p20"] <= rate["p50"] <= rate["p80"]
    assert str(folder) not in json.dumps(found)
    return found


def test_costs_stand_beside_the_roofline(miniature):
    found = record(miniature, "costs")
    steps = {row["step"] for row in found["rows"] if row["model"] == "large"}
    assert {"autoregressive", "early 2", "head 2", "verify 2 3", "verify 2 5"} <= steps
    # asked for at 96 tokens, where the model's context ends: the longest draft must find room
    assert {row["context"] for row in found["rows"]} == {8, 96 - 4 - 1}
    for row in found["rows"]:
        assert row.get("seconds", 1) > 0 and row.get("roofline_s", 1) > 0
    shares = [row for row in found["rows"] if row["step"].startswith("share")]
    assert len(shares) == 4 and all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in shares)
    (judged,) = found["targets"]
    assert judged["at_least"] == 0.8 and judged["measured"]["p50"] == shares[0]["p50"]
    layers, width, inner, keys, vocabulary, context = 8, 32, 48, 16, 64, 8
    weights = layers * (2 * width * (32 + keys) + 3 * width * inner + 2 * width) + vocabulary * width
    assert shares[0]["bytes"] == 4 * (weights + layers * 2 * keys * context)


def test_cells_are_predicted_and_measured(miniature):
    found = record(miniature, "cells")
    assert len(found["rows"]) == 2 * 2 * 2  # shapes, dials, draft lengths; one share
    assert {(row["model"], row["exit_layer"], row["depth"]) for row in found["rows"]} == {
        ("large", 2, 8),
        ("small", 1, 4),
    }
    for row in found["rows"]:
        assert row["unexplained"] == 0
        if row["ties"] == 0:
            assert row["rounds_equal"] and row["tokens_equal"] and row["predicted"] == row["measured"]
        assert row["speedup_predicted"] > 0 and row["speedup_measured"] > 0 and row["speedup_ideal"] > 0
        assert 1 <= row["tokens_per_round_measured"] <= row["draft_length"] + 1
    by_dial = {dial: [row["alpha_predicted"] for row in found["rows"] if row["dial"] == dial] for dial in (0.1, 0.6)}
    assert sum(by_dial[0.1]) > sum(by_dial[0.6])  # the lower the dial, the more is accepted
    miss, gain = found["targets"]
    assert miss["measured"]["p50"] == max(
        abs(row["speedup_predicted"] / row["speedup_measured"] - 1) for row in found["rows"]
    )
    assert gain["at_least"] == 1.7
    for kind in ("pdf", "svg", "png"):
        assert (miniature / f"predicted_and_measured.{kind}").stat().st_size > 0


def test_every_way_takes_its_turns_in_the_tutorials_setting(miniature):
    found = record(miniature, "tutorial")
    ways = {row["way"]: row for row in found["rows"]}
    assert {
        "autoregressive", "autoregressive, rounds of the device", "self-speculative 2,4",
        "self-speculative 2,4, rounds of the device", "two models, 2 drafts", "transformers",
        "transformers, static cache", "transformers, assisted, 2 drafts", "transformers, early exit 2,4",
    } <= ways.keys()  # fmt: skip
    assert all(row["same_tokens"] for row in ways.values())
    assert ways["autoregressive"]["speedup_end_to_end"] == {"p20": 1, "p50": 1, "p80": 1}
    pairs = [(row["exit_layer"], row["draft_length"]) for row in found["predicted"]]
    assert pairs == [(2, 2), (2, 4), (None, 2), (None, 4)]
    assert all(row["rounds_equal"] or row["ties"] for row in found["predicted"])
    assert [line["at_least"] for line in found["targets"]] == [1.0, 3.0]


def test_margins_are_those_of_the_last_row(script, tiny):
    """Of the exit and of the model, after the traced text up to an output."""
    from probekit.tracing.tracer import trace

    run = trace(tiny, [[3, 4, 5]], max_new_tokens=6)
    sequence = torch.tensor([[3, 4, 5, *run.outputs(0).tolist()]])
    logits = tiny.model(sequence).logits[0, 3 + 4 - 1].topk(2).values
    found = script.margins(tiny, run, 2, 0, 4)
    assert found["model_margin"] == pytest.approx((logits[0] - logits[1]).item(), abs=1e-5)
    hidden = tiny.model(sequence, output_hidden_states=True).hidden_states[2][0, 3 + 4 - 1]
    exit_logits = tiny.anatomy.head(tiny.anatomy.norm(hidden)).topk(2).values
    assert found["exit_margin"] == pytest.approx((exit_logits[0] - exit_logits[1]).item(), abs=1e-5)


def test_the_study_of_real_weights(run, tiny_folder, tmp_path):
    result = run(
        "--device", "cpu", "--miniature", "--part", "study", "--model", tiny_folder, "--max-new-tokens", 8,
        "-o", tmp_path / "records", "--work", tmp_path / "work",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = record(tmp_path / "records", "study")["rows"]
    assert row["anatomy"]["layers"] == 5
    assert all(cell["unexplained"] == 0 for cell in row["validation"]["cells"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(run, tmp_path):
    result = run("-o", tmp_path)
    assert result.exit_code == 2
    assert "CUDA device 'cuda' is not there: this machine has none that torch can use." in result.output
    assert list(tmp_path.iterdir()) == []
