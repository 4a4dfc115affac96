"""What the phases of a study hand to each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probekit.errors import Remark
from probekit.study.phases import attribute_texts, even, odd
from probekit.tracing.tracer import trace


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
