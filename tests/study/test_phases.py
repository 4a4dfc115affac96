"""What the phases of a study hand to each other."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.errors import Remark
from probekit.kept import Kept
from probekit.models.synthetic import synthetic
from probekit.probing.linear_answer import linear_answer
from probekit.probing.probe import probe
from probekit.settings import KeptResiduals, StudySettings
from probekit.study.phases import (
    Drafting,
    Models,
    attribute_texts,
    choose_pair,
    even,
    odd,
    predict_rounds,
    rank_ways,
    trace_prompts,
    validate_choice,
)
from probekit.study.probes import COLUMNS, MOST_LAYERS, probe_texts, probed_layers
from probekit.tracing.prompts import Prompt
from probekit.tracing.tracer import trace
from probekit.validation import kept_texts
from tests.choice.test_choice import linear_costs


def test_the_choice_and_its_validation_share_no_prompt(tiny):
    run = trace(tiny, ["one", "two", "three", "four", "five"], max_new_tokens=3)
    assert [list(part(run).prompts) for part in (even, odd)] == [[0, 2, 4], [1, 3]]


@torch.no_grad()
def test_the_shares_of_the_first_texts_add_up_to_what_the_model_says(tiny):
    run = trace(tiny, ["one", "two", "three"], max_new_tokens=4, top_prompts=2)
    table = attribute_texts(tiny, run)
    assert sorted(set(table["prompt"])) == [0, 1]
    for prompt in (0, 1):
        ids = [*run.prompt_ids(prompt).tolist(), *run.outputs(prompt).tolist()][:-1]
        logits = tiny.model(torch.tensor([ids])).logits[0].max(-1).values
        whole = table[table["prompt"] == prompt].groupby("position")["logit"].sum()
        np.testing.assert_allclose(whole, logits, atol=1e-3)


def test_a_model_whose_parts_are_not_known_has_none_and_says_so(tiny):
    run = trace(tiny, ["one"], max_new_tokens=2)
    parts = replace(tiny.anatomy, family=replace(tiny.anatomy.family, branches=None), sizes=None)
    with pytest.warns(Remark, match="does not say who wrote the logits"):
        assert attribute_texts(replace(tiny, anatomy=parts), run).empty


QUIET = lambda *_, **__: None  # noqa: E731


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A model whose exits' drafts are accepted or not, and its run with residuals."""
    loaded = synthetic("tiny", seed=6, layers=3, exit_layer=1, dial=0.5)
    texts = ["one", "two", "three", "four", "five"]
    kept = KeptResiduals(None, rows="scored")
    return loaded, trace(
        loaded, texts, tmp_path_factory.mktemp("probed") / "run", max_new_tokens=24, keep_residuals=kept
    )


def test_a_study_is_probed_when_it_is_asked_to(probed, tmp_path):
    loaded, run = probed
    kept = Kept(tmp_path, "study")
    assert probe_texts(loaded, run, StudySettings(("m",)), kept, QUIET).empty
    table = probe_texts(loaded, run, StudySettings(("m",), probes=True), kept, QUIET)
    assert tuple(table.columns) == COLUMNS
    exits = list(range(1, loaded.depth))
    for label, own in (
        ("accepted", probe(run, "accepted", exits).to_pandas()),
        ("answer", linear_answer(loaded, run, [0, *exits])),
    ):
        rows = table[table["label"] == label].reset_index(drop=True)
        assert set(rows["layer"]) == set(exits if label == "accepted" else [0, *exits])
        pd.testing.assert_frame_equal(rows[["layer", "kind", "value", "low", "high"]],
                                      own[["layer", "kind", "value", "low", "high"]])  # fmt: skip
    again = probe_texts(None, None, StudySettings(("m",), probes=True), kept, QUIET)  # it is kept: no model is asked
    pd.testing.assert_frame_equal(again, table)


def test_what_cannot_be_probed_is_left_out_with_a_word(tiny, tmp_path):
    run = trace(tiny, ["one", "two", "three"], tmp_path / "run", max_new_tokens=3, keep_residuals="all")
    with pytest.warns(Remark, match="a probe needs 4"):
        table = probe_texts(tiny, run, StudySettings(("m",), probes=True), Kept(tmp_path, "study"), QUIET)
    assert table.empty and tuple(table.columns) == COLUMNS


@pytest.mark.parametrize("depth", [2, 3, 12, 13, 14, 30, 80])
def test_probed_layers_are_spread_from_the_first_exit_to_the_last(depth):
    layers = probed_layers(depth)
    assert layers[0] == 1 and layers[-1] == depth - 1 and len(layers) == min(MOST_LAYERS, depth - 1)
    assert set(np.diff(layers)) <= {(depth - 2) // (MOST_LAYERS - 1), (depth - 2) // (MOST_LAYERS - 1) + 1}


def test_residuals_are_kept_for_the_probes_only(tiny, tmp_path):
    texts = [Prompt(index, text) for index, text in enumerate(("one", "two"))]
    kept = [
        trace_prompts(Models(tiny, None), texts, Drafting(), StudySettings(("m",), max_new_tokens=3, probes=asked),
                      tmp_path / str(asked), QUIET).manifest.settings.keep_residuals
        for asked in (False, True)
    ]  # fmt: skip
    assert kept == [(), tuple(range(tiny.depth + 1))]


def test_a_validation_that_was_ended_decodes_no_text_again(tiny, tmp_path, monkeypatch):
    run = trace(tiny, ["one", "two", "three", "four"], max_new_tokens=4)
    settings = StudySettings(("tiny",), exit_layers=(2, 4), draft_lengths=(2, 4))
    costs = linear_costs(tiny.depth)
    choice = choose_pair(predict_rounds(run, settings), costs, rank_ways(run, costs, settings))
    write, decoded = kept_texts.append_line, []

    def validated(most: int):
        def append(path, line):
            write(path, line)
            made = json.loads(line)["made"] if line else {"runs": ()}
            decoded.extend((name, made["prompt"]) for name in made["runs"])
            if len(decoded) >= most:
                raise KeyboardInterrupt

        monkeypatch.setattr(kept_texts, "append_line", append)
        quiet = lambda *_, **__: None  # noqa: E731
        return validate_choice(Models(tiny, None), run, choice, settings, Kept(tmp_path, "study"), quiet)

    for most in (1, 7, 9):  # in the validation of the best, of others, and of ways
        with pytest.raises(KeyboardInterrupt):
            validated(most)
    found = validated(999)
    assert len(decoded) == len(set(decoded)) == 2 * (len(found.cells) + len(found.ways))
    assert [path.name for path in tmp_path.iterdir()] == ["validation.json"]
