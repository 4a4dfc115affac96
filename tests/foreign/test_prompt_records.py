"""Prompts as other projects write them: Spec-Bench's turns, ShareGPT's conversations, OpenAI's content parts."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from probekit.errors import InputError
from probekit.tracing.prompts import as_prompts, load_prompts

TURNS = {"question_id": 81, "category": "writing", "turns": ["Write a tale.", "Shorten it."]}
SHAREGPT = {"id": "a", "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hello"},
                                         {"from": "gpt", "value": "Hi."}]}  # fmt: skip
PARTS = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]}]
}


def test_each_form_is_read(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (TURNS, SHAREGPT, PARTS)))
    turns, chat, parts = load_prompts(path)
    assert (turns.text, turns.kind) == ("Write a tale.", "writing")
    assert [message["role"] for message in chat.messages] == ["system", "user"]  # the model writes the answer
    assert chat.response == "Hi."
    assert parts.messages == ({"role": "user", "content": "What is it?"},)
    assert load_prompts(path, given=True)[1].response == "Hi."
    assert [prompt.text for prompt in as_prompts([TURNS])] == ["Write a tale."]


def test_a_table_with_turns_is_read(tmp_path):
    path = tmp_path / "bench.parquet"
    pd.DataFrame({"category": ["math"], "turns": [["1 + 1?", "And twice?"]]}).to_parquet(path)
    [prompt] = load_prompts(path)
    assert (prompt.text, prompt.kind) == ("1 + 1?", "math")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"turns": []}, "`turns` is no list of at least one entry"),
        ({"turns": [3]}, "the first of `turns` is a int; expected a text"),
        ({"turns": "abc"}, "`turns` is no list"),
        ({"conversations": [{"from": "martian", "value": "a"}]}, "from one of human"),
        ({"conversations": {"from": "human"}}, "`conversations` is no list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"question": "why"}, "there is no `prompt`; it has question"),
    ],
)
def test_what_cannot_be_read_is_named(record, message):
    with pytest.raises(InputError, match=message):
        as_prompts([record])


def test_long_prompts_are_named_or_left_out(tiny, tmp_path):
    from probekit.tracing.tracer import trace

    prompts = [[1, 2, 3], [5] * 250, [4]]
    with pytest.raises(InputError, match=r"prompt 1 has 250 tokens; .* skip_long"):
        trace(tiny, prompts, max_new_tokens=8)
    kept = trace(tiny, prompts, max_new_tokens=8, skip_long=True)
    assert kept.prompts == [0, 2]
    with pytest.raises(InputError, match="every prompt is longer than the 248 tokens"):
        trace(tiny, prompts[1:2], max_new_tokens=8, skip_long=True)


def test_an_array_and_a_batch_of_requests(tmp_path):
    """ShareGPT is published as one JSON array; OpenAI's batch files hold a request a line."""
    path = tmp_path / "ShareGPT_V3.json"
    path.write_text(json.dumps([SHAREGPT, TURNS, "Once upon"], indent=1))
    chat, turns, text = load_prompts(path)
    assert (chat.response, turns.text, text.text) == ("Hi.", "Write a tale.", "Once upon")
    path.write_text(json.dumps([SHAREGPT, 3]))
    with pytest.raises(InputError, match="entry 2: expected an object with `prompt` or `messages`, not 3"):
        load_prompts(path)
    for content, message in (("[", "is not JSON"), ("{}", "is no array of prompts"), ("[]", "holds no prompt")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_prompts(path)
    requests = tmp_path / "batch.jsonl"
    requests.write_text(json.dumps({"custom_id": "a", "method": "POST", "body": {"model": "m", **PARTS}}))
    assert load_prompts(requests)[0].messages == ({"role": "user", "content": "What is it?"},)


def test_a_path_is_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('["a", "b"]')
    assert as_prompts(path) == load_prompts(path)
