"""The whole proof on the bundled models, by the script that keeps its record: analyses/check_decoding.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from probekit.models.loaded import load
from probekit.models.shipped import TALES

ROOT = Path(__file__).parents[2]
KEPT = sorted((ROOT / "docs" / "results" / "decoding").glob("checked-*.json"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_decoding", ROOT / "analyses" / "check_decoding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drafter():
    return load("tales-draft", device="cpu", dtype="float32")


def hold(methods, runs):
    """Every run is as predicted, but for near-ties, which are counted."""
    for name, found in methods.items():
        assert found["unexplained"] == 0, name
        assert found["runs"] - found["runs_equal"] <= found["near_ties"], name
        assert found["runs"] == runs[name], name


def test_prompts_are_distinct_beginnings_of_different_lengths(script, drafter):
    prompts = script.cut_prompts(drafter, 200)
    assert len({tuple(ids) for ids in prompts}) == 200
    assert len({len(ids) for ids in prompts}) > 20


@pytest.mark.second
def test_a_few_prompts_on_one_model(script, drafter):
    loaded = load("tales-layerskip", device="cpu", dtype="float32")
    found = script.check_greedy(loaded, drafter, 8, 6)
    hold(found["methods"], {
        "self-speculative, batches": 8 * 11, "draft head, batches": 8 * 4, "exit heads, batches": 8 * 4,
        "two models, batches": 8,
        "self-speculative, alone": 8, "two models, alone": 8, "autoregressive, alone": 8,
    })  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", TALES)
def test_200_prompts_over_all_exits(script, drafter, name):
    loaded = load(name, device="cpu", dtype="float32")
    found = script.check_greedy(loaded, drafter, 200, 40)
    hold(found["methods"], {
        "self-speculative, batches": 200 * 11, "draft head, batches": 200 * 4, "exit heads, batches": 200 * 4,
        "two models, batches": 200,
        "self-speculative, alone": 200, "two models, alone": 200, "autoregressive, alone": 200,
    })  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", TALES)
def test_sampled_counts_lie_within_their_joint_interval(script, drafter, name):
    """Intervals are joint over all counts of all cells of a model."""
    cells = script.check_sampled(load(name, device="cpu", dtype="float32"), drafter, 6)["cells"]
    assert all(cell["within_interval"] for cell in cells), cells
    assert max(width for cell in cells for width in cell["half_width"].values()) < 0.1, cells


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_kept_records_hold(path):
    record = json.loads(path.read_text())
    assert record["settings"]["prompts"] == 200
    for row in record["models"]:
        assert row["greedy"]["texts"] == 200
        assert all(found["unexplained"] == 0 for found in row["greedy"]["methods"].values())
        assert all(cell["within_interval"] for cell in row["sampled"]["cells"])
        assert max(width for cell in row["sampled"]["cells"] for width in cell["half_width"].values()) < 0.1
