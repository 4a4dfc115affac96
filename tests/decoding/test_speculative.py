from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import Speculative
from probekit.drafting.policies import ConfidenceThreshold
from probekit.errors import InputError
from probekit.models.synthetic import synthetic
from probekit.settings import Sampling

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 30, 2, 2], [1]]


def foretold(drafter, done, draft_length, budget):
    """(drafted, accepted) from the drafter's argmax in one pass over the target's text."""
    sequence = torch.tensor([[*done.prompt_ids, *done.tokens][:-1]])
    drafts = drafter.model(sequence).logits[0, len(done.prompt_ids) - 1 :].argmax(-1).tolist()
    agrees = [draft == token for draft, token in zip(drafts, done.tokens, strict=True)]
    drafted, accepted, output = [], [], 1
    while output < len(agrees):
        k = min(draft_length, budget - output - 1)
        window = [*agrees[output : output + k], False]
        drafted.append(k)
        accepted.append(window.index(False))
        output += accepted[-1] + 1
    return drafted, accepted


@pytest.mark.parametrize("draft_length", [1, 3, 8])
def test_tokens_are_the_models_and_rounds_those_that_the_drafter_foretells(tiny, tiny_draft, unchanged, draft_length):
    unchanged(tiny.model)
    unchanged(tiny_draft.model)
    references = Autoregressive(tiny).decode(PROMPTS, max_new_tokens=30)
    method = Speculative(tiny, tiny_draft, draft_length)
    for done, reference in zip(method.decode(PROMPTS, max_new_tokens=30), references, strict=True):
        assert (done.tokens, done.ended) == (reference.tokens, reference.ended)
        assert (done.drafted, done.accepted) == foretold(tiny_draft, done, draft_length, 30)
        assert (done.method, done.drafter, done.exit_layer) == ("speculative", "tiny-draft", None)
        (alone,) = method.decode([done.prompt_ids], max_new_tokens=30, indices=[done.prompt])
        assert alone == done


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.lists(st.lists(st.integers(0, 95), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(1, 25),
    st.sampled_from([Sampling(), Sampling(0.9, 20, 0.9, seed=3)]),
)
@settings(max_examples=30)
def test_any_drafter_any_batch(seed, dial, prompts, draft_length, budget, sampling):
    """The drafter is the target with its last layers dialled up or down: it agrees always, often or rarely."""
    loaded = synthetic("tiny", seed=seed, layers=3)
    drafter = synthetic("tiny", seed=seed, layers=3, dial=dial, exit_layer=2)
    setting = {"max_new_tokens": budget, "sampling": sampling, "stop": ["ab", "c"]}
    method = Speculative(loaded, drafter, draft_length)
    together = method.decode(prompts, **setting)
    for index, (done, prompt) in enumerate(zip(together, prompts, strict=True)):
        assert done == method.decode([prompt], indices=[index], **setting)[0]
        if sampling.greedy:
            assert done.tokens == Autoregressive(loaded).decode([prompt], **setting)[0].tokens
            assert (done.drafted, done.accepted) == foretold(drafter, done, draft_length, budget)
        if dial == 1:
            assert done.rejections == 0


def test_a_drafter_with_a_padded_or_a_shorter_head(tiny):
    references = Autoregressive(tiny).decode(PROMPTS, max_new_tokens=20)
    for vocabulary in (90, 104):
        drafter = replace(synthetic("tiny-draft", seed=3, vocabulary=vocabulary, ends=False), tokenizer=tiny.tokenizer)
        done = Speculative(tiny, drafter, 3).decode([[1, 2, 3], [4]], max_new_tokens=20, sampling=Sampling(1.0))
        assert all(max(text.tokens) < 97 for text in done)
        done = Speculative(tiny, drafter, 3).decode(PROMPTS, max_new_tokens=20)
        assert [text.tokens for text in done] == [text.tokens for text in references]


def test_a_threshold_drafts_less_and_keeps_the_tokens(tiny, tiny_draft):
    references = Autoregressive(tiny).decode(PROMPTS, max_new_tokens=30)
    done = Speculative(tiny, tiny_draft, 6, policy=ConfidenceThreshold(0.06)).decode(PROMPTS, max_new_tokens=30)
    assert [text.tokens for text in done] == [text.tokens for text in references]
    assert len({length for text in done for length in text.drafted[:-1]}) > 1


def test_another_tokenizer_is_refused(tiny, tiny_tied, tiny_draft, tiny_chain):
    with pytest.raises(
        InputError, match=r"draft model tiny-tied cannot draft for tiny: its tokenizer has other tokens"
    ):
        Speculative(tiny, tiny_tied, 2)
    with pytest.raises(InputError, match="no two tokenizers"):
        Speculative(tiny, replace(tiny_draft, tokenizer=None), 2)
    bare = replace(tiny, tokenizer=None), replace(tiny_chain, tokenizer=None)
    with pytest.raises(InputError, match="vocabularies of 4 and 97 tokens"):
        Speculative(*bare, 2)
    assert Speculative(bare[0], replace(tiny_draft, tokenizer=None), 2)


def test_prompts_must_fit_the_drafter_too(tiny):
    drafter = synthetic("tiny-draft", seed=3, context=16)
    with pytest.raises(InputError, match="exceeds the context of 16 tokens of tiny-draft"):
        Speculative(tiny, drafter, 2).decode([[1] * 10], max_new_tokens=10)


def test_impossible_draft_lengths_are_refused(tiny, tiny_draft):
    with pytest.raises(InputError, match="draft length must be"):
        Speculative(tiny, tiny_draft, 0)


def test_a_draft_length_beyond_the_budget_is_the_budget(tiny, tiny_draft):
    for prompts in ([[5, 9, 17]], [[5, 9, 17], [3]]):
        within = Speculative(tiny, tiny_draft, 4).decode(prompts, max_new_tokens=4)
        beyond = Speculative(tiny, tiny_draft, 2**63 - 1).decode(prompts, max_new_tokens=4)
        assert [each.tokens for each in beyond] == [each.tokens for each in within]
        assert [(each.drafted, each.accepted, each.draft_length) for each in beyond] == [
            (each.drafted, each.accepted, 4) for each in within
        ]
