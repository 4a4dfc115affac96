"""Synthetic Llamas: published dimensions, a dial that dials, weights that are really there."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.sites import open_hooks
from probekit.models.loaded import describe
from probekit.models.synthetic import SHAPES, Shape, byte_tokenizer, synthetic


def agreement(loaded, exit_layer: int, rows: int = 400) -> float:
    """Share of rows where the exit and the model have the same argmax, on random text."""
    ids = torch.randint(0, loaded.anatomy.vocabulary, (rows // 20, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Capture(loaded.model, [exit_layer]) as capture:
        model = loaded.model(ids).logits.argmax(-1)
        drafts = loaded.anatomy.head(loaded.anatomy.norm(capture[exit_layer])).argmax(-1)
    return (drafts == model).float().mean().item()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-2-7b", 6_738_415_616),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(name, parameters):
    shape = SHAPES[name]
    config = shape.config()
    heads, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    layer = 2 * shape.width * (heads + keys) + 3 * shape.width * shape.inner + 2 * shape.width
    ends = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    assert shape.layers * layer + shape.width + ends == parameters
    assert config.head_dim == shape.head_dim
    assert config.tie_word_embeddings == shape.tied


def test_llama_3_2_scales_its_rotary_embedding():
    model = synthetic("llama-3.2-1b", layers=1, vocabulary=11, inner=16).model
    frequencies, theta = model.model.rotary_emb.inv_freq, 500_000.0
    assert model.model.rotary_emb.rope_type == "llama3"
    assert frequencies[0] == 1, "the fastest stays"
    assert frequencies[-1].item() == pytest.approx(theta ** (-62 / 64) / 32), "the slowest is divided by the factor"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tiny", "tiny-tied", "tiny-draft", "tiny-chain", "tiny-chain-draft"])
def test_every_dtype_runs(name, dtype):
    loaded = synthetic(name, dtype=dtype)
    assert {str(p.dtype) for p in loaded.model.parameters()} == {f"torch.{dtype}"}
    assert not any(p.requires_grad or p.is_meta for p in loaded.model.parameters())
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    logits = loaded.model(torch.tensor([[0, 1, 2, 3]])).logits
    assert logits.isfinite().all()
    assert 0.3 < logits.float().std() < 3
    assert open_hooks(loaded.model) == []


def test_a_seed_is_a_model():
    same, again, other = (synthetic("tiny", seed=seed) for seed in (3, 3, 4))
    pairs = zip(same.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert same.weights_hash == again.weights_hash != other.weights_hash
    assert not torch.equal(same.anatomy.head.weight, other.anatomy.head.weight)


def test_the_generator_is_its_own():
    state = torch.get_rng_state()
    synthetic("tiny")
    assert torch.equal(torch.get_rng_state(), state)


def test_dial_at_its_ends():
    plain = synthetic("tiny", seed=5)
    untouched = synthetic("tiny", seed=5, dial=1.0, exit_layer=2)
    pairs = zip(plain.model.parameters(), untouched.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert agreement(synthetic("tiny", seed=5, dial=0.0, exit_layer=2), 2) == 1.0


def test_dial_touches_only_what_later_layers_write():
    plain, dialled = synthetic("tiny", seed=5), synthetic("tiny", seed=5, dial=0.25, exit_layer=3)
    for (name, before), after in zip(plain.model.named_parameters(), dialled.model.parameters(), strict=True):
        later = any(f"layers.{layer}." in name for layer in (3, 4))
        written = later and name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(after, before * 0.25 if written else before), name


def test_agreement_falls_as_the_dial_rises():
    shape = {"layers": 8, "width": 64, "inner": 96, "heads": 4, "key_value_heads": 2, "head_dim": 16, "vocabulary": 997}
    dials = (0.0, 0.1, 0.3, 1.0)
    measured = [agreement(synthetic("tiny", dial=dial, exit_layer=2, tokenizer=False, **shape), 2) for dial in dials]
    assert measured[0] == 1.0
    assert all(low < high - 0.1 for high, low in itertools.pairwise(measured))
    assert measured[-1] < 0.4


def test_logit_scale_multiplies_the_logits():
    ids = torch.tensor([[5, 6, 7]])
    once, thrice = (synthetic("tiny", logit_scale=scale).model(ids).logits for scale in (1.0, 3.0))
    assert torch.allclose(thrice, 3 * once, rtol=1e-5, atol=1e-5)


def test_greedy_text_of_tiny_is_no_loop(tiny):
    """The texts that tests stand on visit many tokens."""
    ids = tiny.tokenizer("once upon a time", return_tensors="pt").input_ids
    written = tiny.model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert len(set(written.tolist())) > 10


def test_chain_has_four_tokens_and_no_end(tiny_chain):
    assert tiny_chain.anatomy.vocabulary == 4
    assert tiny_chain.eos_ids == frozenset()
    assert tiny_chain.tokenizer("abcd").input_ids == [0, 1, 2, 3]
    assert tiny_chain.tokenizer.decode([3, 0, 1]) == "dab"


def test_large_shapes_never_end_and_need_no_tokenizer():
    small = {"layers": 2, "width": 64, "inner": 96, "heads": 4, "key_value_heads": 2, "head_dim": 16, "vocabulary": 50}
    loaded = synthetic("llama-3-8b", **small)
    assert loaded.tokenizer is None
    assert loaded.eos_ids == frozenset()
    assert (loaded.name, loaded.path, loaded.revision) == ("llama-3-8b", None, None)
    assert describe(loaded)["tokenizer"] is None


def test_tied_can_be_chosen():
    assert synthetic("tiny", tied=True).anatomy.tied
    loaded = synthetic("tiny-tied", tied=False)
    assert not loaded.anatomy.tied
    assert not torch.equal(loaded.anatomy.head.weight, loaded.anatomy.embedding.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "llama-9"}, r"no shape is named 'llama-9'; there are llama-3-8b"),
        ({"dial": -1.0, "exit_layer": 1}, r"dial must be at least 0"),
        ({"dial": float("nan"), "exit_layer": 1}, r"dial must be at least 0"),
        ({"dial": 0.5}, r"needs the exit layer"),
        ({"dial": 0.5, "exit_layer": 5}, r"exits 1\.\.4"),
        ({"exit_layer": 0}, r"exits 1\.\.4"),
        ({"logit_scale": 0.0}, r"logit scale must exceed 0"),
        ({"tied": True, "logit_scale": 2.0}, r"a tied head cannot be scaled"),
        ({"depth": 3}, r"a shape has no depth; it has .*layers"),
        ({"heads": 7}, r"heads must divide its width.*width 36, 7 heads"),
        ({"key_value_heads": 4}, r"key/value heads its heads"),
        ({"head_dim": 9}, r"head_dim must be even"),
        ({"layers": 0}, r"layers must be at least 1"),
        ({"dtype": "float8"}, r"dtype 'float8' is not known"),
        ({"device": "abacus"}, r"device 'abacus' is not known"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        synthetic(options.pop("shape", "tiny"), **options)


def test_a_shape_of_ones_own():
    shape = Shape(2, 8, 12, 2, 1, 11, 16, 4)
    loaded = synthetic(shape)
    assert (loaded.depth, loaded.name) == (2, "synthetic")


@given(text=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)))
def test_ascii_goes_round(tiny, text):
    assert tiny.tokenizer.decode(tiny.tokenizer(text).input_ids) == text


@given(text=st.text())
def test_every_byte_goes_round(tiny_tied, text):
    assert tiny_tied.tokenizer.decode(tiny_tied.tokenizer(text).input_ids) == text


def test_tokenizer_by_hand():
    tokenizer = byte_tokenizer(97, ends=True)
    assert tokenizer("ab z\n").input_ids == [0, 1, 26, 25, 27]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (96, 96, 97)
    assert tokenizer.decode([0, 96]) == "a<|end|>"
    assert byte_tokenizer(4, ends=False)("abcdef é").input_ids == [0, 1, 2, 3], "bytes beyond the vocabulary drop out"
