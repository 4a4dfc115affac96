"""What `probekit trace` tells while it runs and when it is done."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from probekit.cli import terminal
from probekit.cli.app import run


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("abc\ndefg\nhij\nk\n")
    return path


@pytest.fixture
def trace(tiny_folder, prompts, tmp_path):
    arguments = ["trace", str(tiny_folder), "--prompts", str(prompts), "-o", str(tmp_path / "run"), "--device", "cpu"]
    return lambda *more: run([*arguments, "--max-new-tokens", "6", *more])


def test_near_ties_and_savings_are_told(trace, capsys):
    assert trace("--statistics", "agreement") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "of 144 agreements are near-ties" in told  # 4 texts x 6 tokens x layers 0..5
    assert "% of the products with the head; the bits are the same." in told


def test_near_ties_and_savings_stand_in_the_document(trace, capsys):
    assert trace("--statistics", "agreement", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["near_ties"]["of"] == 144
    assert 0 <= found["near_ties"]["near_ties"] <= 144
    assert {"rows", "full", "screened", "witnessed_share", "products_avoided"} <= set(found["manifest"]["savings"])


def test_all_statistics_spare_nothing(trace, capsys):
    assert trace() == 0
    told = capsys.readouterr().err
    assert "near-ties" in told
    assert "spared" not in told


def test_the_bar_shows_tokens_per_second_and_the_time_left(trace, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=screen, force_terminal=True, width=160))
    assert trace() == 0
    seen = screen.getvalue()
    assert "reading layers" in seen
    assert "4/4" in seen
    assert "tokens per second" in seen
    assert "left" in seen
    assert "0:00:00" in seen
