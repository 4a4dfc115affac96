"""What a model writes by itself: after prompts and their beginnings, greedily, each once, and no more than asked."""

from __future__ import annotations

import pytest

import probekit
from probekit.models.synthetic import synthetic
from probekit.tracing.prompts import Prompt, as_prompts
from probekit.tracing.self_generated import AT_ONCE, beginnings, self_generated_texts


@pytest.fixture(scope="module")
def loaded():
    return synthetic("tiny", seed=1, ends=False)


def test_whole_prompts_come_first_and_none_comes_twice(loaded):
    found = list(beginnings(loaded, as_prompts([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9], [7]])))
    assert found == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9], [7], [1, 2, 3, 4, 5, 6], [1, 2], [1, 2, 3, 4], [1]]


def test_a_chat_is_not_cut(loaded, monkeypatch):
    from probekit.tracing import self_generated as own_text

    chat = Prompt(0, messages=({"role": "user", "content": "hello there"},))
    monkeypatch.setattr(own_text, "encode", lambda prompt, tokenizer: as_prompts([[1, 2, 3, 4]])[0])
    assert list(beginnings(loaded, [chat])) == [[1, 2, 3, 4]]


def test_the_texts_are_the_models_greedy_ones(loaded):
    prompts = as_prompts([[3 * number, number, 5, 6] for number in range(AT_ONCE)])
    reports = []
    texts = list(self_generated_texts(loaded, prompts, 6, progress=lambda *counts: reports.append(counts)))
    assert [ids for ids, _ in texts] == list(beginnings(loaded, prompts))
    assert len(texts) > AT_ONCE
    for ids, tokens in texts[::7]:
        assert tokens == probekit.decode(loaded, ids, max_new_tokens=6).tokens
    assert reports[-1] == ("learn drafting", 16_000, 16_000)
    assert reports[0] == ("learn drafting", 6 * AT_ONCE, 16_000)


def test_no_further_texts_than_asked_for(loaded):
    prompts = as_prompts([[number, 2, 3, 4] for number in range(2 * AT_ONCE)])
    assert len(list(self_generated_texts(loaded, prompts, 6, most_tokens=5))) == AT_ONCE
    assert len(list(self_generated_texts(loaded, prompts, 6, most_tokens=6 * AT_ONCE + 1))) == 2 * AT_ONCE
