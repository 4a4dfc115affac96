import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from probekit.decoding import engine as engines
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.engine import Engine
from probekit.decoding.speculative import SelfSpeculative
from probekit.hooks.capture import Capture
from probekit.hooks.fast_forward import _fast, attend, fast_forward, rotate
from probekit.models.norm_kernels import FEW
from probekit.models.synthetic import synthetic

PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [30]]


def passes(parts, monkeypatch, fast):
    """Normed states of a ragged batch: a prefill, one token, and three tokens over a cache."""
    monkeypatch.setattr(engines, "fast_forward", fast_forward if fast else lambda parts: parts)
    engine = Engine(parts, rows=2, length=16)
    first = engine.full(torch.tensor([[5, 6, 7, 8], [1, 2, 0, 0]]), engine.places([0, 0], 4))
    second = engine.full(torch.tensor([[9], [3]]), engine.places([4, 2], 1))
    third = engine.full(torch.tensor([[9, 8, 7], [3, 2, 1]]), engine.places([5, 3], 3))
    alone = Engine(parts, rows=1, length=16)
    alone.full(torch.tensor([[5, 6, 7]]), alone.places([0], 3))
    step = alone.full(torch.tensor([[8]]), alone.places([3], 1))
    return [first, second, third, step, alone.full(torch.tensor([[9, 1, 2]]), alone.places([4], 3))]


@pytest.mark.parametrize(("heads", "groups"), [(2, 1), (6, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_fast_copies_compute_what_the_modules_compute(monkeypatch, heads, groups, dtype):
    loaded = synthetic("tiny", seed=1, heads=heads, key_value_heads=heads // groups, dtype=dtype)
    found = passes(loaded.anatomy, monkeypatch, fast=True)
    for states, expected in zip(found, passes(loaded.anatomy, monkeypatch, fast=False), strict=True):
        torch.testing.assert_close(states, expected)


@torch.inference_mode()
def test_without_sdpa_attention_stays_transformers(monkeypatch):
    loaded = synthetic("tiny", seed=1)
    loaded.model.config._attn_implementation = "eager"
    found = passes(loaded.anatomy, monkeypatch, fast=True)
    for states, expected in zip(found, passes(loaded.anatomy, monkeypatch, fast=False), strict=True):
        torch.testing.assert_close(states, expected)


@pytest.mark.parametrize("width", [8, 36, 128, 576])
def test_the_norm_is_transformers_to_the_bit_or_the_last_ones_of_a_few_rows(width):
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(width, 1e-5).requires_grad_(False)
    norm.weight.copy_(torch.randn(width, generator=generator))
    states = torch.randn(2, FEW // width, width, generator=generator) * 3
    assert torch.equal(_fast(norm)(states), norm(states))
    for few in (states[:1, :1], states[:, :3]):
        torch.testing.assert_close(_fast(norm)(few), norm(few), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rotation_has_transformers_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 3, 10, generator=generator).to(dtype) for heads in (6, 2))
    angle = torch.rand(2, 3, 5, generator=generator).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for _ in range(2):  # the second time with what was kept from the first
        for found, expected in zip(
            rotate(query, key, cos, sin), apply_rotary_pos_emb(query, key, cos, sin), strict=True
        ):
            assert torch.equal(found, expected)


def test_attention_follows_a_slow_truth():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 3, 4, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 4, generator=generator)
    mask = torch.zeros(2, 1, 3, 5).masked_fill(torch.rand(2, 1, 3, 5, generator=generator) < 0.4, -1e9)
    for given, tokens in ((mask, 3), (mask[:1], 3), (None, 1)):
        found, _ = attend(nn.Identity(), query[:, :, :tokens], key, value, given, scaling=0.3)
        for head in range(6):
            scores = query[:, head, :tokens] @ key[:, head // 3].mT * 0.3
            scores = scores if given is None else scores + given[:, 0]
            torch.testing.assert_close(found[:, :, head], scores.softmax(-1) @ value[:, head // 3])
    found, _ = attend(nn.Identity(), query, key[:, :, :3], value[:, :, :3], None, scaling=0.3)
    causal = torch.full((3, 3), -torch.inf).triu(1)
    scores = query[:, 5] @ key[:, 1, :3].mT * 0.3 + causal
    torch.testing.assert_close(found[:, :, 5], scores.softmax(-1) @ value[:, 1, :3])


def test_the_model_is_not_touched(tiny, unchanged):
    unchanged(tiny.model)
    before = {name: dict(vars(module)) for name, module in tiny.model.named_modules()}
    fast_forward(tiny.anatomy)
    Autoregressive(tiny).decode(PROMPTS, max_new_tokens=3)
    assert {name: dict(vars(module)) for name, module in tiny.model.named_modules()} == before
    assert tiny.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "path",
    [
        "layers.2",
        "layers.2.mlp",
        "layers.2.self_attn.q_proj",
        "layers.2.input_layernorm",
        "layers.2.mlp.act_fn",
        "norm",
    ],
)
def test_a_hook_on_any_module_fires_with_that_module(tiny, path):
    module = tiny.anatomy.decoder.get_submodule(path)
    method = SelfSpeculative(tiny, 3, 2)
    expected = method.decode(PROMPTS, max_new_tokens=8)
    seen = []
    handle = module.register_forward_hook(lambda hooked, *_: seen.append(hooked))
    try:
        assert method.decode(PROMPTS, max_new_tokens=8) == expected
    finally:
        handle.remove()
    assert len(seen) > 5
    assert all(hooked is module for hooked in seen)


def test_hooks_on_all_modules_at_once_fire(tiny):
    seen = []
    Autoregressive(tiny).decode([[1]], max_new_tokens=1)  # the first one checks the engine, in passes of its own
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        Autoregressive(tiny).decode([[1]], max_new_tokens=1)
    finally:
        handle.remove()
    assert seen.count("LlamaDecoderLayer") == 5
    assert seen.count("LlamaAttention") == 5


def test_a_replaced_forward_is_obeyed(tiny):
    layer = tiny.anatomy.layers[1]
    plain = Autoregressive(tiny).decode(PROMPTS, max_new_tokens=8)
    layer.__dict__["forward"] = lambda residual, **_: residual
    try:
        skipped = Autoregressive(tiny).decode(PROMPTS, max_new_tokens=8)
    finally:
        del layer.__dict__["forward"]
    assert skipped != plain
    assert Autoregressive(tiny).decode(PROMPTS, max_new_tokens=8) == plain


def test_captured_decoding_writes_the_same_text(any_tiny):
    for method in (Autoregressive(any_tiny), SelfSpeculative(any_tiny, 2, 3)):
        expected = method.decode(PROMPTS, max_new_tokens=20)
        with Capture(any_tiny.model, reduce=lambda site, residual: None):
            assert method.decode(PROMPTS, max_new_tokens=20) == expected


def test_a_hook_on_the_head_fires_for_drafts_and_verification(tiny):
    method = SelfSpeculative(tiny, 3, 2)
    expected = method.decode([PROMPTS[0]], max_new_tokens=8)
    rows = []
    handle = tiny.anatomy.head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[-2]))
    try:
        assert method.decode([PROMPTS[0]], max_new_tokens=8) == expected
    finally:
        handle.remove()
    rounds = expected[0].drafted
    assert rows == [1, *(row for drafted in rounds for row in [*[1] * drafted, drafted + 1])]


def test_what_transformers_leaves_on_its_layers_does_not_slow_decoding():
    """After `output_hidden_states=True` its layers carry hooks for good; they do nothing while nobody asks again."""
    loaded = synthetic("tiny", seed=7)
    loaded.model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert any(layer._forward_hooks or layer._forward_pre_hooks for layer in loaded.anatomy.layers), "else no question"
    assert not any(isinstance(layer, torch.nn.Module) for layer in fast_forward(loaded.anatomy).layers)
