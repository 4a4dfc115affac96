"""Changed heads: what they are, that nothing else changes, and that the lens reads through them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.lens.lens import Lens
from probekit.prediction.predict import predict
from probekit.tracing.tracer import trace
from probekit.tying.head_swaps import (
    changed_head,
    embedding_head,
    head_effects,
    read_with,
    rotated_head,
    standard_heads,
    swapped_head,
    weights_digest,
)

PROMPTS = ["abc", "the cat", "hello"]


@pytest.fixture(scope="module")
def traces(tiny, tiny_tied):
    return {id(loaded): trace(loaded, PROMPTS, max_new_tokens=10, top_prompts=0) for loaded in (tiny, tiny_tied)}


def test_a_rotation_keeps_lengths_and_angles(any_tiny):
    own, turned = any_tiny.anatomy.head.weight, rotated_head(any_tiny.anatomy, seed=3)
    assert torch.allclose(turned @ turned.T, own @ own.T, atol=1e-3)
    assert not torch.allclose(turned, own, atol=0.1)
    assert torch.equal(turned, rotated_head(any_tiny.anatomy, seed=3))


def test_a_swap_deals_every_row_to_another_token(any_tiny):
    own, swapped = any_tiny.anatomy.head.weight, swapped_head(any_tiny.anatomy)
    assert not (swapped == own).all(dim=1).any()
    assert torch.equal(swapped.sum(dim=1).sort().values, own.sum(dim=1).sort().values)


def test_the_embedding_at_the_heads_scale(tiny):
    head, own, embedding = embedding_head(tiny.anatomy), tiny.anatomy.head.weight, tiny.anatomy.embedding.weight
    assert head.square().mean() == pytest.approx(own.square().mean().item(), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(head, embedding).min() > 0.9999


def test_standard_heads(tiny, tiny_tied):
    assert list(standard_heads(tiny.anatomy)) == ["rotated", "swapped", "embedding"]
    assert list(standard_heads(tiny_tied.anatomy)) == ["rotated", "swapped"]


def test_the_model_is_the_same_afterwards(any_tiny, unchanged):
    model = unchanged(any_tiny.model)
    before, head = weights_digest(model), model.lm_head
    with changed_head(any_tiny, rotated_head(any_tiny.anatomy), "rotated") as changed:
        assert changed.name == f"{any_tiny.name}+rotated"
        assert changed.anatomy.head is model.lm_head is not head
        assert not changed.anatomy.tied
        assert weights_digest(model) != before
        assert weights_digest(model.model) is not None
    assert model.lm_head is head
    assert weights_digest(model) == before
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == any_tiny.anatomy.tied


def test_the_head_comes_back_after_an_exception(any_tiny):
    before, head = weights_digest(any_tiny.model), any_tiny.model.lm_head
    with pytest.raises(RuntimeError, match="in the middle"), changed_head(any_tiny, head.weight * 2, "double"):
        raise RuntimeError("in the middle")
    assert any_tiny.model.lm_head is head
    assert weights_digest(any_tiny.model) == before


def test_a_head_that_does_not_fit(tiny):
    with pytest.raises(InputError, match="does not fit"), changed_head(tiny, torch.ones(3, 3), "small"):
        pass


def test_reading_with_the_own_head_is_the_trace(any_tiny, traces):
    made = traces[id(any_tiny)]
    read = read_with(any_tiny, made, any_tiny.anatomy.head.weight)
    for prompt in made.prompts:
        assert (read.agrees[prompt] == made.agreement(prompt)).all()
        assert (read.agrees[prompt][-1]).all()
    generated = made.layers[(made.layers["output"] >= 0) & (made.layers["lens"] == "final-norm")].groupby("layer")
    assert read.echo.values == pytest.approx(generated["echo"].mean().to_numpy())
    assert read.kl.values == pytest.approx(generated["kl"].mean().to_numpy(), abs=1e-4)


def test_a_swapped_model_says_the_same_under_other_names(tiny, traces):
    """Model and lens swapped: tokens are renamed, so on the same text agreement at every layer stays as it was."""
    made = traces[id(tiny)]
    with changed_head(tiny, swapped_head(tiny.anatomy), "swapped") as changed, torch.no_grad():
        lens = Lens(changed.anatomy)
        for prompt in made.prompts:
            context = made.prompt_ids(prompt)
            sequence = np.concatenate([context, made.outputs(prompt)])[:-1].astype(np.int64)
            with Capture(changed.anatomy) as capture:
                logits = changed.model(torch.from_numpy(sequence)[None]).logits
            said = torch.stack([lens(capture[site][0], site).argmax(-1) for site in changed.anatomy.sites])
            assert torch.equal(said[-1], logits[0].argmax(-1))
            assert torch.equal((said == said[-1])[:, len(context) - 1 :], torch.tensor(made.agreement(prompt)))
            assert not (said[-1, len(context) - 1 :] == torch.tensor(made.outputs(prompt))).any()


def test_effects(any_tiny, traces, unchanged):
    model, made = unchanged(any_tiny.model), traces[id(any_tiny)]
    before = weights_digest(model)
    heads = {"own again": any_tiny.anatomy.head.weight, **standard_heads(any_tiny.anatomy)}
    layers, cells = head_effects(any_tiny, made, heads, draft_length=2)
    assert weights_digest(model) == before
    assert set(layers["changed"]) == {"nothing", "lens", "model and lens"}
    assert len(layers) == (1 + 2 * len(heads)) * (any_tiny.depth + 1)
    assert len(cells) == (1 + 2 * len(heads)) * (any_tiny.depth - 1)
    own = layers[layers["head"] == "own again"]
    assert own["echo_change"].abs().max() == 0  # the own head in its own place changes nothing
    assert own["agreement_change"].abs().max() == 0
    last = layers[layers["layer"] == any_tiny.depth].set_index(["head", "changed"])
    assert last["agreement"]["swapped", "lens"] < 0.2  # the lens alone: other names than the model's
    assert last["agreement"]["swapped", "model and lens"] == 1
    silent = head_effects(any_tiny, made, heads, draft_length=2, speak=False)
    for whole, quiet in zip((layers, cells), silent, strict=True):
        pd.testing.assert_frame_equal(quiet, whole[whole["changed"] != "model and lens"].reset_index(drop=True))
    expected = predict(made, None, [2]).to_pandas()["acceptance_rate"].tolist()
    assert cells[cells["head"] == "own again"]["acceptance_rate"].tolist() == pytest.approx(expected * 2)


def test_untying_takes_the_echo_and_tying_brings_it(tiny, tiny_tied, traces):
    tied = read_with(tiny_tied, traces[id(tiny_tied)], tiny_tied.anatomy.head.weight).echo.values[0]
    untied = read_with(tiny_tied, traces[id(tiny_tied)], rotated_head(tiny_tied.anatomy)).echo.values[0]
    assert (tied > 0.8, untied < 0.2) == (True, True)
    own = read_with(tiny, traces[id(tiny)], tiny.anatomy.head.weight).echo.values[0]
    embedded = read_with(tiny, traces[id(tiny)], embedding_head(tiny.anatomy)).echo.values[0]
    assert (own < 0.2, embedded > 0.8) == (True, True)


def test_effects_are_of_greedy_text(tiny):
    from probekit.settings import Sampling

    sampled = trace(tiny, PROMPTS, max_new_tokens=4, sampling=Sampling(temperature=1.0), top_prompts=0)
    with pytest.raises(InputError, match="greedy text"):
        head_effects(tiny, sampled, {})
