"""Rounds by fused kernels, in Triton's interpreter: token by token those of the layers that the model has."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from lens import truth

pytest.importorskip("triton", reason="Triton is not installed: it is in the extra `kernel`.")

import probekit
from probekit.decoding import recordings
from probekit.decoding.device_decoding import DeviceAutoregressive, DeviceSelfSpeculative
from probekit.decoding.device_round import DeviceEngine
from probekit.decoding.recordings import check_fused
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import SelfCheckError
from probekit.hooks import fused_layers
from probekit.hooks.capture import Capture
from probekit.hooks.fused_layers import Reading, copied_bytes, reading_of
from probekit.models.synthetic import Shape, synthetic
from probekit.settings import Sampling

SIZES = {
    "vocab_size": 97, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWED = {"sliding_window": 9, "layer_types": MIXED}
GEMMA = {"query_pre_attn_scalar": 12, **WINDOWED}
FAMILIES = {
    "Llama": ("Llama", {"attention_bias": True, "mlp_bias": True}, "sdpa"),
    "Mistral": ("Mistral", {"sliding_window": 9}, "sdpa"),
    "Qwen2": ("Qwen2", {"use_sliding_window": True, **WINDOWED}, "sdpa"),
    "Qwen3": ("Qwen3", {}, "sdpa"),
    "Gemma2": ("Gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **GEMMA}, "eager"),
    "Gemma3": ("Gemma3Text", GEMMA, "sdpa"),
}
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 30, 2, 2]]
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(0.8, top_k=20, top_p=0.9, seed=3)}


@pytest.fixture(autouse=True)
def _interpreter():
    truth.check_interpreter()


@pytest.fixture
def fused(monkeypatch):
    """Recordings are made with fused kernels, on a processor too; the engines that were."""
    made = []

    def engine(*given):
        made.append(DeviceEngine(*given, fused=True))
        return made[-1]

    monkeypatch.setattr(recordings, "DeviceEngine", engine)
    return made


def family(name, **more):
    kind, setting, implementation = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | setting | more)
    config._attn_implementation = implementation
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval().requires_grad_(False)
    for weight in model.parameters():  # norms and biases begin as ones and zeros, which would hide much
        if weight.dim() == 1:
            weight.add_(0.3 * torch.randn_like(weight))
    return probekit.wrap(model, None, name=name)


def as_they_are(model):
    return {name: (weight.data_ptr(), weight.clone()) for name, weight in model.named_parameters()}


@pytest.mark.second
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_pass_is_the_one_of_the_models_own_layers(name):
    """Rows at positions of their own, several tokens, past the window; and the model is left as it was."""
    loaded = family(name)
    before, state = as_they_are(loaded.model), set(vars(loaded.model))
    engine = DeviceEngine(loaded.anatomy, 2, 64, fused=True)
    assert engine.fused is not None and reading_of(loaded.anatomy) is not None
    tokens = torch.randint(0, 97, (2, 23), generator=torch.Generator().manual_seed(1))
    found = []
    for places_at in (engine.places_at, engine.masked_places_at):
        engine.full(tokens[:, :20], engine.places([0], 20))
        positions = torch.tensor([[12], [20]]) + torch.arange(3)
        states = [engine.full(tokens[:, 20:], places_at(positions, 64))]
        early = engine.early(tokens[:, 20:], places_at(positions, 64), 1)
        found.append([*states, early, engine.late(early, places_at(positions, 64), 1), engine.parts.norm(early)])
        found[-1].append(torch.cat([engine.cache.keys, engine.cache.values])[:, :, :, :23])
        engine.cache.clear()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
    assert torch.equal(engine.best(found[0][0]), engine.logits(found[0][0]).argmax(-1))
    check_fused(engine)
    assert set(vars(loaded.model)) == state
    for name, weight in loaded.model.named_parameters():
        assert weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1])


TWO = ("Qwen3", "Gemma3")  # norms of heads, and windows; the others run in the long part


def test_greedy_rounds_token_by_token(fused):
    loaded = synthetic(Shape(3, 24, 40, 4, 2, 64, 128, 6), dial=0.3, exit_layer=1)
    (expected,) = SelfSpeculative(loaded, 1, 2).decode([PROMPTS[0]], max_new_tokens=8)
    (found,) = DeviceSelfSpeculative(loaded, 1, 2).decode([PROMPTS[0]], max_new_tokens=8)
    assert found == expected and fused[0].fused is not None


@pytest.mark.second
@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        *(pytest.param(name, "greedy", marks=[pytest.mark.long] * (name not in TWO)) for name in FAMILIES),
        ("Llama", "sampled"),
    ],
)
def test_rounds_token_by_token(fused, name, sampling):
    """Two rows, past the window, one of them over the edge of a bucket; and steps of autoregressive decoding."""
    loaded, how = family(name), {"max_new_tokens": 7, "sampling": SAMPLINGS[sampling]}
    prompts = [PROMPTS[0], [7] * 60]
    expected = SelfSpeculative(loaded, 1, 2).decode(prompts, **how)
    assert DeviceSelfSpeculative(loaded, 1, 2).decode(prompts, **how) == expected
    if name == "Qwen3":
        (steps,) = DeviceAutoregressive(loaded).decode(prompts[:1], max_new_tokens=4)
        assert steps.tokens == expected[0].tokens[:4]
    assert fused and all(engine.fused is not None for engine in fused)


@pytest.mark.second
def test_exit_heads_and_draft_vocabularies(fused):
    loaded = synthetic(Shape(3, 24, 40, 4, 2, 64, 128, 6), dial=0.3, exit_layer=1)
    for more in ({"draft_vocabulary": torch.tensor([57, 2, 19, 40, 16])}, {"exit_head": torch.neg}):
        found = DeviceSelfSpeculative(loaded, 1, 2, **more).decode(PROMPTS[:2], max_new_tokens=6)
        assert found == SelfSpeculative(loaded, 1, 2, **more).decode(PROMPTS[:2], max_new_tokens=6)


def test_weights_that_change_in_their_place_are_copied_again(fused):
    loaded = synthetic(Shape(2, 24, 40, 4, 2, 64, 128, 6))
    engine = recordings.recordings(loaded, 1, 64).engine
    for name in ("q_proj", "v_proj"):
        getattr(loaded.model.model.layers[1].self_attn, name).weight.mul_(-1)
    loaded.model.model.layers[0].mlp.up_proj.weight.mul_(3)
    with pytest.raises(SelfCheckError, match="fused kernels do not compute what this model's layers do"):
        check_fused(engine)
    assert recordings.recordings(loaded, 1, 64).engine is engine
    check_fused(engine)


@pytest.mark.parametrize("name", ["Qwen3", pytest.param("Gemma3", marks=pytest.mark.second)])
def test_a_family_that_is_read_wrongly_is_found_out(monkeypatch, fused, name):
    monkeypatch.setattr(fused_layers, "READINGS", {**fused_layers.READINGS, name: Reading(behind=name == "Gemma3")})
    with pytest.raises(SelfCheckError, match=r"its logits at token \d+ are .* from the model's own"):
        recordings.recordings(family(name), 1, 64)


def test_what_is_not_known_to_the_letter_keeps_its_own_layers(monkeypatch):
    loaded = family("Llama")
    layer = loaded.anatomy.layers[1]

    def kept(why):
        assert reading_of(loaded.anatomy) is None, why
        assert DeviceEngine(loaded.anatomy, 1, 64, fused=True).fused is None

    assert reading_of(loaded.anatomy) is not None
    with Capture(loaded.model, [2], into=torch.zeros(1, 1, 1, 36)):
        kept("a hook, which replays with the model's own layers")
    for owner, name, other in (
        (layer.mlp, "act_fn", torch.nn.ReLU()),
        (layer.self_attn, "o_proj", torch.nn.Sequential(layer.self_attn.o_proj)),
        (layer, "input_layernorm", torch.nn.RMSNorm(36)),
        (layer.input_layernorm, "variance_epsilon", 1e-3),
        (layer.self_attn.q_proj, "bias", None),
        (layer.self_attn, "is_causal", False),
    ):
        own = getattr(owner, name)
        setattr(owner, name, other)
        try:
            kept(name)
        finally:
            setattr(owner, name, own)
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.mlp), "forward", lambda self, inputs: inputs)
        kept("a class whose forward was patched")
    with monkeypatch.context() as patch:
        patch.setattr(fused_layers, "find_spec", lambda name: None)
        kept("Triton is not installed")
    assert reading_of(loaded.anatomy) is not None
    assert reading_of(family("Gemma2", attn_logit_softcapping=2.0).anatomy) is not None
    loaded.model.config._attn_implementation = "eager"
    assert reading_of(loaded.anatomy) is not None


def test_other_families_keep_their_own_layers():
    config = transformers.OlmoConfig(**{name: size for name, size in SIZES.items() if name != "head_dim"})
    model = transformers.OlmoForCausalLM(config).eval()
    assert reading_of(probekit.wrap(model, None, name="olmo").anatomy) is None


def test_the_copies_bytes(fused):
    loaded = family("Llama")
    made = DeviceEngine(loaded.anatomy, 1, 64, fused=True).fused
    assert sum(copy.numel() * 4 for copy, _ in made._sources) == copied_bytes(loaded.anatomy)


def test_without_memory_for_the_copies_it_runs_the_models_own_layers(monkeypatch):
    from probekit.decoding import device_round

    loaded = synthetic(Shape(2, 24, 40, 4, 2, 64, 128, 6))
    needed = copied_bytes(loaded.anatomy)
    for free, room in ((2 * needed, True), (2 * needed - 1, False), (None, True)):
        monkeypatch.setattr(device_round, "free_bytes", partial(lambda free, device: free, free))
        assert device_round._has_room(loaded.anatomy) is room
