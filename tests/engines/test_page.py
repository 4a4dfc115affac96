"""The page on other engines names what they name, and its table is that of the records."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from probekit.engines.acceptance import AcceptanceProfile
from probekit.engines.known import ENGINES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "how-to" / "use-in-another-engine.md"
PROFILE = AcceptanceProfile("toy", "layer 3", 2, "greedy", "vllm", 4, 10, 20, 12, 0.6, 2.1, None, (7, 5), True)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_word_of_an_engine_is_in_the_table(engine):
    text = PAGE.read_text(encoding="utf-8")
    for name in ENGINES[engine].words(PROFILE):
        assert f"`{name}`" in text
    assert f"`{engine}`" in text


def test_the_table_is_that_of_the_records():
    spec = importlib.util.spec_from_file_location("engines_tool", DOCS / "tools" / "engines.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for page, *which in (
        (PAGE,),
        (tool.COSTS_PAGE, "speedups", tool.speedups),
        (tool.COSTS_PAGE, "regrets", tool.regrets),
        (tool.INVARIANT_PAGE, "prices", tool.prices),
        (tool.INVARIANT_PAGE, "excused", tool.excused),
    ):
        text = page.read_text(encoding="utf-8")
        assert tool.page(text, *which) == text


@pytest.mark.parametrize("path", sorted((DOCS / "results" / "engines").glob("*.json")), ids=lambda path: path.stem)
def test_records_hold_what_they_claim(path):
    """Equal counts in every cell without a difference; each engine's convention; all of one budget."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["convention"] == ENGINES[record["engine"]].first_round
    assert record["rows"]
    for row in record["rows"]:
        assert row["unexplained"] == 0
        if row["rounds_equal"] == row["prompts"] and not row["unseen"]:
            assert row["predicted"]["accepted_by_position"] == row["measured"]["accepted_by_position"]
