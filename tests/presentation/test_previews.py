"""What a study draws of itself: five pictures, or six, of three kinds, from the tables, with nothing left out."""

from __future__ import annotations

import json
import warnings

import pandas as pd
import pytest
from matplotlib.figure import Figure
from presentation.fabricate_study import fabricate_study

from probekit.presentation import previews
from probekit.traces.trace import Trace

pytestmark = pytest.mark.second

NAMES = ("lens_table", "agreement", "acceptance", "speedup", "predicted_against_measured", "probes")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of the previews, and the figures by name."""
    folder = fabricate_study(tmp_path_factory.mktemp("previews") / "study", ("tales-untied", "a_$model$"), depth=4,
                             prompts=4, tokens=12, draft_lengths=(1, 3), drafter=True, probed=True)  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    tables = {
        name: pd.read_csv(folder / "tables" / f"{name}.csv") for name in ("layers", "cells", "validation", "probes")
    }
    traces = {model["name"]: Trace.open(folder / model["trace"]) for model in summary["models"]}
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(figure, *arguments, **options):
        if figure not in figures:
            figures.append(figure)
        return save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph, a layout that does not fit
        patch.setattr(Figure, "savefig", remember)
        previews.draw_previews(folder / "figures", tables, traces, {"tales-untied": (2, 3), "a_$model$": None})
    return folder / "figures", dict(zip(NAMES, figures, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_preview_comes_in_three_kinds(drawn, name):
    for kind, magic in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        assert (drawn[0] / f"{name}.{kind}").read_bytes().startswith(magic)


def test_nothing_else_is_left(drawn):
    assert {path.name for path in drawn[0].iterdir()} == {f"{name}.{kind}" for name in NAMES for kind in previews.KINDS}


def test_panels_name_their_models_and_the_choice(drawn):
    titles = [ax.get_title(loc="left") for ax in drawn[1]["speedup"].axes[:2]]
    assert titles == ["tales-untied: E 2, K 3", r"a_\$model\$: do not speculate"]
    assert [len(ax.patches) > 0 for ax in drawn[1]["speedup"].axes[:2]] == [True, False]


@pytest.mark.parametrize("name", ["acceptance", "speedup"])
def test_all_heat_maps_have_numbers_of_one_size(drawn, name):
    sizes = {text.get_fontsize() for ax in drawn[1][name].axes[:2] for text in ax.texts}
    assert len(sizes) == 1
    assert all(len(ax.texts) == 2 * 4 for ax in drawn[1][name].axes[:2])  # three exits and a draft model


def test_each_model_has_a_panel_of_acceptance_and_one_of_the_answer(drawn):
    figure = drawn[1]["probes"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["tales-untied", r"a_\$model\$"] * 2
    assert [ax.get_ylabel() for ax in figure.axes] == ["AUROC of acceptance", "", "model's token (share)", ""]
    assert [len(part.legends) for part in figure.subfigs] == [1, 1]


@pytest.mark.parametrize("name", ["agreement", "predicted_against_measured"])
def test_one_legend_for_all_panels(drawn, name):
    figure = drawn[1][name]
    assert len(figure.legends) == 1
    assert all(ax.get_legend() is None for ax in figure.axes)
