"""Decoding in rounds of the device: in float32 the very tokens, rounds and texts of the methods it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.device_decoding import DeviceAutoregressive, DeviceSelfSpeculative
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.models.loaded import load
from probekit.models.synthetic import synthetic
from probekit.settings import Sampling

pytestmark = pytest.mark.second

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 30, 2, 2], [1]]


def pair(loaded, exit_layer, draft_length, **setting):
    """A method and its stand-in; exit layer None: one token a round."""
    if exit_layer is None:
        return Autoregressive(loaded), DeviceAutoregressive(loaded)
    here = (loaded, exit_layer, draft_length)
    return SelfSpeculative(*here, **setting), DeviceSelfSpeculative(*here, **setting)


def assert_same(loaded, prompts, cells, **setting):
    for exit_layer, draft_length in cells:
        method, device = pair(loaded, exit_layer, draft_length)
        assert device.decode(prompts, **setting) == method.decode(prompts, **setting)  # all but seconds


def test_tokens_and_rounds_are_the_methods(any_tiny, unchanged):
    unchanged(any_tiny.model)
    cells = [(None, 0), *((exit_layer, length) for exit_layer in any_tiny.anatomy.exits for length in (1, 4, 30))]
    assert_same(any_tiny, PROMPTS, cells, max_new_tokens=20)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_small_budgets(tiny, budget):
    assert_same(tiny, PROMPTS, [(None, 0), (2, 3)], max_new_tokens=budget)


@pytest.mark.parametrize("tokens", [59, 60, 61, 63, 64, 127])
def test_over_the_edge_of_a_bucket(tiny, tokens):
    prompt = [(7 * place) % 90 for place in range(tokens)]
    assert_same(tiny, [prompt, prompt[:3]], [(None, 0), (2, 1), (2, 7)], max_new_tokens=12)


def test_up_to_the_end_of_the_context(tiny):
    prompt = [(7 * place) % 90 for place in range(246)]
    assert_same(tiny, [prompt], [(None, 0), (2, 5)], max_new_tokens=10)


def test_an_ending_is_found_one_round_late_and_nothing_of_that_round_is_kept(tiny):
    """The second round of a dialled-down model ends the text in the middle of its drafts."""
    loaded = synthetic("tiny", seed=11, dial=0.0, exit_layer=2, ends=False)
    method, device = pair(loaded, 2, 4)
    (whole,) = method.decode([[3, 4]], max_new_tokens=23)
    loaded.model.generation_config.eos_token_id = loaded.model.config.eos_token_id = whole.tokens[8]
    pieces = []
    (ended,) = device.decode([[3, 4]], max_new_tokens=23, on_accept=pieces.append)
    assert ended.ended == "eos" and ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[8]) + 1]
    assert ended == method.decode([[3, 4]], max_new_tokens=23)[0]
    assert [token for piece in pieces for token in piece.tokens] == ended.tokens


@st.composite
def cases(draw):
    loaded = synthetic(
        "tiny",
        seed=draw(st.integers(0, 10**6)),
        layers=draw(st.integers(2, 4)),
        tied=draw(st.booleans()),
        heads=6,
        key_value_heads=draw(st.sampled_from([1, 2, 3, 6])),
        vocabulary=draw(st.sampled_from([7, 23, 97])),
        dial=draw(st.sampled_from([0.0, 0.2, 0.6])),
        exit_layer=1,
    )
    tokens = st.integers(0, loaded.anatomy.vocabulary - 2)
    prompts = draw(st.lists(st.lists(tokens, min_size=1, max_size=8), min_size=1, max_size=3))
    setting = {
        "max_new_tokens": draw(st.integers(1, 30)),
        "stop": draw(st.lists(st.text("abcdef", min_size=1, max_size=2), max_size=1)),
        "sampling": draw(st.sampled_from([Sampling(), Sampling(1.0, seed=5), Sampling(0.7, 5, 0.9, seed=8)])),
    }
    return loaded, draw(st.integers(1, 9)), prompts, setting


@given(cases())
@settings(max_examples=25)
def test_any_small_llama_any_batch_any_ending(case):
    loaded, draft_length, prompts, setting = case
    assert_same(loaded, prompts, [(None, 0), (1, draft_length)], **setting)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, seed=2)])
def test_draft_vocabularies_and_exit_heads(any_tiny, sampling):
    ids = torch.tensor([57, 2, 19, 40, 16, 25, 71, 3, 8, 44])
    for more in ({"draft_vocabulary": ids}, {"exit_head": torch.neg}):
        method, device = pair(any_tiny, 4, 3, **more)
        setting = {"max_new_tokens": 20, "sampling": sampling}
        assert device.decode(PROMPTS, **setting) == method.decode(PROMPTS, **setting)


def test_attention_without_folding(tiny):
    loaded = synthetic("tiny", seed=1)
    loaded.model.config._attn_implementation = "eager"
    assert_same(loaded, PROMPTS, [(None, 0), (2, 3)], max_new_tokens=12)


def test_hooks(tiny, unchanged):
    unchanged(tiny.model)
    method, device = pair(tiny, 2, 3)
    buffer = torch.zeros(1, 3, 7, 36)
    with Capture(tiny.model, [5], into=buffer):
        found = device.decode(PROMPTS, max_new_tokens=8)
    assert buffer[0, :, :4].abs().sum(-1).all()
    assert found == method.decode(PROMPTS, max_new_tokens=8)
    with Capture(tiny.model, [5]), pytest.raises(InputError, match=r"Use Capture\(model, sites, into=buffer\)"):
        device.decode(PROMPTS, max_new_tokens=8)


@pytest.mark.parametrize("name", ["tales-untied", "tales-tied", "tales-layerskip"])
def test_bundled_models(name):
    loaded = load(name, device="cpu", dtype="float32")
    prompts = [loaded.tokenizer(text)["input_ids"] for text in ("Once upon a time there was", "The king said")]
    assert_same(loaded, prompts, [(None, 0), (2, 3)], max_new_tokens=80)


@pytest.mark.long
def test_smollm2(smollm2):
    prompts = [smollm2.tokenizer("The capital of France is")["input_ids"]]
    assert_same(smollm2, prompts, [(None, 0), (12, 2), (27, 4)], max_new_tokens=24)
