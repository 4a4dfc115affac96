"""What the phases of a study hand to each other."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from probekit.errors import Remark
from probekit.kept import Kept
from probekit.settings import StudySettings
from probekit.study.phases import (
    Models,
    attribute_texts,
    choose_pair,
    even,
    odd,
    predict_rounds,
    rank_ways,
    validate_choice,
)
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
