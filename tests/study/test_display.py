"""A finished study shows itself in a notebook, and turns into pandas with one call."""

from __future__ import annotations

import json

import pytest
from presentation.fabricate_study import fabricate_study

from probekit.study.summary import Study


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = fabricate_study(tmp_path_factory.mktemp("study") / "study", depth=3, prompts=4, tokens=8,
                             draft_lengths=(2,))  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    for model in summary["models"]:
        pair = (model["choice"]["exit_layer"], model["choice"]["draft_length"])
        cells = model["validation"]["cells"]
        model["chosen_validation"] = next(
            (cell for cell in cells if (cell["exit_layer"], cell["draft_length"]) == pair), None
        )
    summary["models"][0]["sentence"] = "<script>alert(1)</script>"
    return Study(folder, summary)


def test_a_row_a_model(study):
    table = study.to_pandas()
    assert table["model"].tolist() == [model["name"] for model in study.summary["models"]]
    for row, model in zip(table.itertuples(), study.summary["models"], strict=True):
        assert row.speculate == model["choice"]["speculate"]
        assert row.speedup == model["choice"]["speedup"]
        if row.speculate:
            assert row.speedup_low <= row.speedup <= row.speedup_high
            assert row.speedup_measured == model["chosen_validation"]["speedup_measured"]


def test_it_shows_sentences_a_table_and_the_picture(study):
    page = study._repr_html_()
    assert study.summary["models"][1]["sentence"] in page
    assert "<script>" not in page
    assert page.count("<tr") == 1 + len(study.summary["models"])
    assert "<img" not in page
    (study.folder / "figures").mkdir()
    (study.folder / "figures" / "agreement.png").write_bytes(b"\x89PNG")
    assert '<img alt="agreement by layer"' in study._repr_html_()
    assert "data:image/png;base64,iVBORw==" in study._repr_html_()
