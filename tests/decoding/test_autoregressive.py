import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.decoding.autoregressive import Autoregressive, EarlyExit
from probekit.errors import InputError
from probekit.models.synthetic import synthetic

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 30, 2, 2], [1]]


def generated(model, prompt, budget):
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=budget, do_sample=False)
    return output[0, len(prompt) :].tolist()


def test_greedy_tokens_are_transformers(any_tiny, unchanged):
    unchanged(any_tiny.model)
    expected = [generated(any_tiny.model, prompt, 40) for prompt in PROMPTS]
    together = Autoregressive(any_tiny).decode(PROMPTS, max_new_tokens=40)
    assert [done.tokens for done in together] == expected
    for index, prompt in enumerate(PROMPTS):
        (alone,) = Autoregressive(any_tiny).decode([prompt], max_new_tokens=40, indices=[index])
        assert alone == together[index]
        assert (alone.method, alone.lossless, alone.prompt) == ("autoregressive", True, index)
        assert alone.accepted == alone.drafted == [0] * (len(alone.tokens) - 1)
        assert alone.text == any_tiny.tokenizer.decode(alone.tokens[: -1 if alone.ended == "eos" else None])


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 30), st.booleans(), st.integers(1, 3))
@settings(max_examples=25)
def test_greedy_tokens_are_transformers_for_any_small_llama(seed, layers, budget, tied, groups):
    loaded = synthetic("tiny", seed=seed, layers=layers, tied=tied, heads=2 * groups, key_value_heads=2, vocabulary=23)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (3,), generator=generator).tolist()
    prompts = [torch.randint(0, 22, (length,), generator=generator).tolist() for length in lengths]
    done = Autoregressive(loaded).decode(prompts, max_new_tokens=budget)
    assert [text.tokens for text in done] == [generated(loaded.model, prompt, budget) for prompt in prompts]
    assert all((text.ended == "eos") == (text.tokens[-1] == 22) for text in done)


def test_early_exit_is_the_truncated_model_and_says_that_it_is_lossy(any_tiny):
    for exit_layer in any_tiny.anatomy.exits:
        truncated = copy.deepcopy(any_tiny.model)
        truncated.model.layers = truncated.model.layers[:exit_layer]
        truncated.config.num_hidden_layers = exit_layer
        done = EarlyExit(any_tiny, exit_layer).decode(PROMPTS, max_new_tokens=20)
        assert [text.tokens for text in done] == [generated(truncated, prompt, 20) for prompt in PROMPTS]
        assert {(text.method, text.lossless, text.exit_layer) for text in done} == {("early-exit", False, exit_layer)}


@pytest.mark.parametrize("exit_layer", [0, 5, 99, -1, True, 1.0])
def test_exit_layers_that_do_not_exist_are_refused(tiny, exit_layer):
    with pytest.raises(InputError, match=r"out of range: this model has exits 1\.\.4"):
        EarlyExit(tiny, exit_layer)


def test_seconds_add_up(tiny):
    (done,) = Autoregressive(tiny).decode([[1, 2]], max_new_tokens=5)
    seconds = dict(done.seconds)
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), rel=0.2)
    assert seconds["draft"] == 0
    assert min(seconds["prefill"], seconds["verify"]) > 0
