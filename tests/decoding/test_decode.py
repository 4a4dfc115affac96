import pytest
import torch

from probekit.decoding.decode import METHODS, decode
from probekit.decoding.speculative import Speculative
from probekit.drafting.drafters import ExitLayer
from probekit.drafting.text_drafters import PromptLookup
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import tree_shape_named
from probekit.errors import InputError
from probekit.models.synthetic import synthetic

SETTINGS = {
    "autoregressive": {},
    "self-speculative": {"exit_layer": 2, "draft_length": 3},
    "speculative": {"draft_length": 3},
    "early-exit": {"exit_layer": 2},
}


@pytest.fixture
def setting(tiny_draft):
    def of(method):
        return SETTINGS[method] | ({"draft_model": tiny_draft} if method == "speculative" else {})

    return of


@pytest.mark.parametrize("method", METHODS)
def test_every_method_continues_a_text_and_streams_it(tiny, setting, method):
    pieces = []
    done = decode(
        tiny,
        "hello",
        method=method,
        max_new_tokens=15,
        on_accept=lambda text, how: pieces.append((text, how)),
        **setting(method),
    )
    assert done.method == method
    assert done.prompt_ids == tiny.tokenizer("hello")["input_ids"]
    assert "".join(text for text, _ in pieces) == done.text
    assert pieces[0][1] == "prefill"
    by_ids = decode(tiny, done.prompt_ids, method=method, max_new_tokens=15, **setting(method))
    assert by_ids == done
    if done.lossless:
        assert done.tokens == decode(tiny, "hello", max_new_tokens=15).tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "magic"}, "no method is named 'magic'; there are autoregressive, self-speculative"),
        ({"method": "self-speculative", "exit_layer": 2}, "self-speculative decoding needs draft_length"),
        ({"method": "speculative", "draft_length": 2}, "speculative decoding needs a drafter, or a draft_model"),
        ({"method": "early-exit"}, "early-exit decoding needs exit_layer"),
        ({"method": "autoregressive", "exit_layer": 2}, "autoregressive decoding has no exit_layer"),
        ({"exit_layer": 2}, "self-speculative decoding needs draft_length"),
        ({"draft_length": 2}, "autoregressive decoding has no draft_length"),
        ({"drafter": "ngram:2"}, "speculative decoding needs draft_length"),
        ({"drafter": "magic", "draft_length": 2}, "'magic' names no drafter that needs no trace"),
        ({"drafter": "ngram:2", "draft_length": 2, "exit_layer": 2}, "ngram:2 drafts from no exit"),
        ({"drafter": "tree:2x1", "draft_length": 2}, "tree:2x1 drafts from an exit layer, and none was given"),
        ({"drafter": PromptLookup(2), "draft_length": 2, "exit_layer": 2}, "an exit_layer was given beside"),
        ({"method": "early-exit", "exit_layer": 2, "draft_length": 3}, "early-exit decoding has no draft_length"),
    ],
)
def test_settings_must_fit_the_method(tiny, given, message):
    with pytest.raises(InputError, match=message):
        decode(tiny, "hello", **given)


@pytest.mark.parametrize(
    ("given", "drafter"),
    [
        ({"exit_layer": 2}, ExitLayer(2)),
        ({"drafter": "exit", "exit_layer": 2}, ExitLayer(2)),
        ({"drafter": "ngram:2"}, PromptLookup(2)),
        ({"drafter": PromptLookup(2)}, PromptLookup(2)),
        ({"drafter": "tree:2x1", "exit_layer": 2}, TreeDrafts(ExitLayer(2), tree_shape_named("2x1"))),
    ],
)
def test_settings_say_the_method_and_a_name_the_drafter(tiny, given, drafter):
    done = decode(tiny, "aaa bbb aaa bbb", draft_length=2, max_new_tokens=20, **given)
    ids = tiny.tokenizer("aaa bbb aaa bbb")["input_ids"]
    [meant] = Speculative(tiny, drafter, 2).decode([ids], max_new_tokens=20)
    assert (done.tokens, done.drafted, done.accepted) == (meant.tokens, meant.drafted, meant.accepted)
    assert sum(done.drafted) > 0


def test_a_tree_is_drafted_to_its_depth(tiny):
    whole, level = ({"drafter": "tree:2x1", "exit_layer": 2} | more for more in ({}, {"draft_length": 1}))
    assert max(decode(tiny, "aaa bbb aaa bbb", max_new_tokens=20, **level).drafted) == 2
    found = decode(tiny, "aaa bbb aaa bbb", max_new_tokens=20, **whole)
    assert max(found.drafted) == 4
    assert found == decode(tiny, "aaa bbb aaa bbb", max_new_tokens=20, draft_length=2, **whole)


def test_a_text_needs_a_tokenizer(tiny):
    from dataclasses import replace

    with pytest.raises(InputError, match="tiny has no tokenizer"):
        decode(replace(tiny, tokenizer=None), "hello")
    assert decode(replace(tiny, tokenizer=None), [1, 2], max_new_tokens=3).text == ""


def test_a_model_that_tells_no_token_from_another_is_refused():
    loaded = synthetic("tiny", seed=2)
    torch.nn.init.zeros_(loaded.model.model.norm.weight)  # as where its residuals overflow in the norm
    with pytest.raises(InputError, match="every token the same logit"):
        decode(loaded, [5, 9], max_new_tokens=2)
