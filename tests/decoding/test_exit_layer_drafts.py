import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import SelfSpeculative
from probekit.drafting.policies import ConfidenceThreshold
from probekit.errors import InputError
from probekit.models.synthetic import synthetic
from probekit.settings import Sampling

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 30, 2, 2], [1]]


def drafts_on(loaded, prompt, tokens, exit_layer, ids=None):
    """What the exit would draft for each output of the text: its argmax in one teacher-forced pass, (N,)."""
    sequence = torch.tensor([[*prompt, *tokens][:-1]])
    residual = loaded.model(sequence, output_hidden_states=True).hidden_states[exit_layer][0, len(prompt) - 1 :]
    logits = loaded.anatomy.head(loaded.anatomy.norm(residual))
    return (logits.argmax(-1) if ids is None else ids[logits[:, ids].argmax(-1)]).tolist()


def simulated(drafts, tokens, draft_length, budget):
    """Rounds step by step: (drafted, accepted), as the design defines them."""
    drafted, accepted, output = [], [], 1
    while output < len(tokens):
        k, run = min(draft_length, budget - output - 1), 0
        while run < k and output + run < len(tokens) and drafts[output + run] == tokens[output + run]:
            run += 1
        drafted.append(k)
        accepted.append(run)
        output += min(run + 1, len(tokens) - output)
    return drafted, accepted


def check(loaded, done, reference, exit_layer, draft_length, budget, ids=None):
    assert (done.tokens, done.text, done.ended) == (reference.tokens, reference.text, reference.ended)
    drafts = drafts_on(loaded, done.prompt_ids, done.tokens, exit_layer, ids)
    assert (done.drafted, done.accepted) == simulated(drafts, done.tokens, draft_length, budget)


def test_tokens_are_the_models_and_rounds_those_that_the_exit_foretells(any_tiny, unchanged):
    unchanged(any_tiny.model)
    references = Autoregressive(any_tiny).decode(PROMPTS, max_new_tokens=20)
    for exit_layer in any_tiny.anatomy.exits:
        for draft_length in (1, 4, 30):
            method = SelfSpeculative(any_tiny, exit_layer, draft_length)
            together = method.decode(PROMPTS, max_new_tokens=20)
            for index, done in enumerate(together):
                check(any_tiny, done, references[index], exit_layer, draft_length, 20)
                assert (done.method, done.exit_layer, done.draft_length) == (
                    "self-speculative",
                    exit_layer,
                    min(draft_length, 20),  # the budget
                )
                assert done == method.decode([PROMPTS[index]], max_new_tokens=20, indices=[index])[0]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_small_budgets_and_empty_drafts(tiny, budget):
    references = Autoregressive(tiny).decode(PROMPTS, max_new_tokens=budget)
    for done, reference in zip(
        SelfSpeculative(tiny, 2, 3).decode(PROMPTS, max_new_tokens=budget), references, strict=True
    ):
        check(tiny, done, reference, 2, 3, budget)
        if budget == 1:
            assert done.drafted == []
        if budget == 2:
            assert (done.drafted, done.accepted) == ([0], [0])


@st.composite
def cases(draw):
    seed = draw(st.integers(0, 10**6))
    layers = draw(st.integers(2, 5))
    exit_layer = draw(st.integers(1, layers - 1))
    loaded = synthetic(
        "tiny",
        seed=seed,
        layers=layers,
        tied=draw(st.booleans()),
        vocabulary=draw(st.sampled_from([7, 23, 97])),
        dial=draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])),
        exit_layer=exit_layer,
    )
    tokens = st.integers(0, loaded.anatomy.vocabulary - 2)
    prompts = draw(st.lists(st.lists(tokens, min_size=1, max_size=8), min_size=1, max_size=4))
    stop = draw(st.lists(st.text("abcdef", min_size=1, max_size=2), max_size=2))
    return loaded, exit_layer, draw(st.integers(1, 9)), prompts, draw(st.integers(1, 30)), stop


@given(cases())
@settings(max_examples=40)
def test_any_small_llama_any_batch_any_ending(case):
    loaded, exit_layer, draft_length, prompts, budget, stop = case
    setting = {"max_new_tokens": budget, "stop": stop}
    pieces = [[] for _ in prompts]
    references = [
        Autoregressive(loaded).decode([prompt], indices=[index], **setting)[0] for index, prompt in enumerate(prompts)
    ]
    method = SelfSpeculative(loaded, exit_layer, draft_length)
    together = method.decode(prompts, on_accept=lambda piece: pieces[piece.prompt].append(piece), **setting)
    for done, reference, handed in zip(together, references, pieces, strict=True):
        check(loaded, done, reference, exit_layer, draft_length, budget)
        assert [token for piece in handed for token in piece.tokens] == done.tokens
        assert "".join(piece.text for piece in handed) == done.text
        assert sum(len(piece.tokens) for piece in handed if piece.how == "accepted") == sum(done.accepted)
        assert sum(piece.how == "corrected" for piece in handed) == done.rejections


@given(cases(), st.sampled_from([Sampling(1.0, seed=5), Sampling(0.7, 5, 0.9, seed=8)]))
@settings(max_examples=25)
def test_sampled_batches_are_their_prompts_alone(case, sampling):
    loaded, exit_layer, draft_length, prompts, budget, stop = case
    setting = {"max_new_tokens": budget, "stop": stop, "sampling": sampling}
    method = SelfSpeculative(loaded, exit_layer, draft_length)
    together = method.decode(prompts, indices=range(7, 7 + len(prompts)), **setting)
    for place, prompt in enumerate(prompts):
        assert method.decode([prompt], indices=[7 + place], **setting)[0] == together[place]


def test_a_dialled_down_model_accepts_everything_and_an_end_inside_a_draft_ends_it():
    # dial 0: the late layers write nothing, so every draft is right; the budget is spent in whole rounds
    loaded = synthetic("tiny", seed=11, dial=0.0, exit_layer=2, ends=False)
    (done,) = SelfSpeculative(loaded, 2, 4).decode([[3, 4]], max_new_tokens=23)
    assert done.drafted == [4, 4, 4, 4, 1]
    assert done.accepted == done.drafted
    assert done.alpha == 1
    # the same weights, with the token at output 8 as an end-of-sequence token
    end = done.tokens[8]
    first = done.tokens.index(end)
    loaded.model.generation_config.eos_token_id = end
    loaded.model.config.eos_token_id = end
    (ended,) = SelfSpeculative(loaded, 2, 4).decode([[3, 4]], max_new_tokens=23)
    assert (ended.tokens, ended.ended) == (done.tokens[: first + 1], "eos")
    drafts = drafts_on(loaded, [3, 4], ended.tokens, 2)
    assert (ended.drafted, ended.accepted) == simulated(drafts, ended.tokens, 4, 23)
    assert ended.rejections == 0


def test_a_draft_vocabulary_changes_rounds_but_no_token(any_tiny):
    ids = torch.tensor([57, 2, 19, 40, 16, 25, 71, 3, 8, 44])
    references = Autoregressive(any_tiny).decode(PROMPTS, max_new_tokens=30)
    for exit_layer in (2, 4):
        method = SelfSpeculative(any_tiny, exit_layer, 3, draft_vocabulary=ids)
        for done, reference in zip(method.decode(PROMPTS, max_new_tokens=30), references, strict=True):
            check(any_tiny, done, reference, exit_layer, 3, 30, ids)


def test_an_exit_head_stands_before_norm_and_head(tiny):
    class Flip(nn.Module):
        def forward(self, residual):
            return -residual

    references = Autoregressive(tiny).decode(PROMPTS, max_new_tokens=20)
    plain = SelfSpeculative(tiny, 4, 3).decode(PROMPTS, max_new_tokens=20)
    flipped = SelfSpeculative(tiny, 4, 3, exit_head=Flip()).decode(PROMPTS, max_new_tokens=20)
    assert [done.tokens for done in flipped] == [done.tokens for done in references]
    assert [done.accepted for done in flipped] != [done.accepted for done in plain]


def test_a_threshold_drafts_less_and_keeps_the_tokens(tiny):
    references = Autoregressive(tiny).decode(PROMPTS, max_new_tokens=30)
    method = SelfSpeculative(tiny, 3, 6, policy=ConfidenceThreshold(0.05))
    together = method.decode(PROMPTS, max_new_tokens=30)
    assert [done.tokens for done in together] == [done.tokens for done in references]
    assert {length for done in together for length in done.drafted[:-1]} > {1, 6}
    for index, prompt in enumerate(PROMPTS):
        assert method.decode([prompt], max_new_tokens=30, indices=[index])[0] == together[index]
    eager = SelfSpeculative(tiny, 3, 6, policy=ConfidenceThreshold(1.0)).decode(PROMPTS, max_new_tokens=30)
    assert {length for done in eager for length in done.drafted} <= {0, 1}


@pytest.mark.parametrize("draft_length", [0, -1, 1.5, True, None])
def test_impossible_draft_lengths_are_refused(tiny, draft_length):
    with pytest.raises(InputError, match="draft length must be a whole number of at least 1"):
        SelfSpeculative(tiny, 2, draft_length)


@pytest.mark.parametrize("exit_layer", [0, 5, 99])
def test_impossible_exits_are_refused(tiny, exit_layer):
    with pytest.raises(InputError, match=r"exits 1\.\.4"):
        SelfSpeculative(tiny, exit_layer, 2)


@pytest.mark.parametrize("ids", [[], [[1]], [1.5], [1, 1], [97], [-1]])
def test_impossible_draft_vocabularies_are_refused(tiny, ids):
    with pytest.raises(InputError, match="draft vocabulary"):
        SelfSpeculative(tiny, 2, 2, draft_vocabulary=torch.tensor(ids))
