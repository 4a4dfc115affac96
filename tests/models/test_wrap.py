"""Models in memory, in the states that people have them in: every token is that model's own `generate`'s."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoConfig, AutoModelForCausalLM

import probekit
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import InputError, SelfCheckError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.prediction.predict import predict
from probekit.tracing.tracer import trace
from probekit.validation.run import validate

PROMPTS = [[5, 9, 17, 3, 44], [7, 7, 1]]
NEW = 20


def fresh(family: str = "llama") -> nn.Module:
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        family, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.35, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def with_lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(6)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def with_weight_norm(model):
    for layer in model.model.layers:
        parametrizations.weight_norm(layer.self_attn.q_proj)
        parametrizations.weight_norm(layer.mlp.up_proj)
    return model


def pruned(model):
    for layer in model.model.layers:
        prune.l1_unstructured(layer.mlp.down_proj, "weight", amount=0.3)
    return model


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantised_but_the_head(model):
    head, model.lm_head = model.lm_head, nn.Identity()
    model = quantised(model)
    model.lm_head = head
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model


def scaled_by_hand(model):
    """A module of the user's own in the place of a projection."""

    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return 1.5 * self.inner(states)

    for layer in model.model.layers:
        layer.self_attn.o_proj = Scaled(layer.self_attn.o_proj)
    return model


def with_a_bias_on_the_head(model):
    model.lm_head = nn.Linear(32, 61, bias=True).requires_grad_(False)
    return model.eval()


STATES = {
    "as it is": lambda model: model,
    "LoRA, unmerged": with_lora,
    "weight norm": with_weight_norm,
    "pruned": pruned,
    "gradient checkpointing": checkpointed,
    "a module of one's own": scaled_by_hand,
    "a head with a bias": with_a_bias_on_the_head,
}


@pytest.fixture(scope="module", params=list(STATES))
def state(request):
    model = STATES[request.param](fresh())
    return model, probekit.wrap(model, name="mine")


def test_tokens_and_rounds_are_the_models_own(state):
    model, loaded = state
    expected = [
        model.generate(input_ids=torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
        for ids in PROMPTS
    ]
    assert [each.tokens for each in Autoregressive(loaded).decode(PROMPTS, max_new_tokens=NEW)] == expected
    for ids, tokens in zip(PROMPTS, expected, strict=True):
        assert SelfSpeculative(loaded, 3, 3).decode([ids], max_new_tokens=NEW)[0].tokens == tokens
    run = trace(loaded, PROMPTS, max_new_tokens=NEW)
    assert [run.outputs(prompt).tolist() for prompt in run.prompts] == expected
    assert predict(run).cells
    assert validate(loaded, run, [(2, 3), (4, 2)]).holds


def test_the_model_is_borrowed(state):
    model, loaded = state
    before = {name: str(module) for name, module in model.named_modules()}
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    SelfSpeculative(loaded, 3, 3).decode(PROMPTS, max_new_tokens=4)
    assert {name: str(module) for name, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients


@pytest.mark.parametrize("make", [quantised, quantised_but_the_head])
def test_arithmetic_that_depends_on_what_is_computed_together_is_traced_and_not_decoded(make):
    """Dynamic quantisation scales activations by all rows of a call: a row alone is another number."""
    model = make(fresh())
    loaded = probekit.wrap(model, name="mine")
    with pytest.raises(SelfCheckError, match="dynamic quantisation"):
        Autoregressive(loaded).decode(PROMPTS, max_new_tokens=4)
    run = trace(loaded, PROMPTS, max_new_tokens=8)
    for prompt, ids in enumerate(PROMPTS):
        expected = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        assert run.outputs(prompt).tolist() == expected.tolist()
    assert run.values(0, "probability").shape == (6, 8)
    with pytest.raises(InputError, match="which sampling needs"):
        trace(loaded, PROMPTS, max_new_tokens=4, sampling=probekit.Sampling(temperature=1.0))


def test_a_compiled_model_is_decoded_and_says_that_hooks_come_too_late():
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    loaded = probekit.wrap(compiled, name="mine")
    ids = torch.tensor([PROMPTS[0]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 5:].tolist()
    assert Autoregressive(loaded).decode(PROMPTS[:1], max_new_tokens=8)[0].tokens == expected
    for context in (Capture, Edit):
        with pytest.raises(InputError, match="this model is compiled"):
            context(compiled)
    model.compile(backend="eager")
    with pytest.raises(InputError, match="this model is compiled"):
        Capture(model)


def test_two_states_of_one_model_have_two_hashes():
    plain, scaled = probekit.wrap(fresh(), name="mine"), probekit.wrap(scaled_by_hand(fresh()), name="mine")
    assert plain.weights_hash == probekit.wrap(fresh(), name="yours").weights_hash
    assert len({plain.weights_hash, scaled.weights_hash, probekit.wrap(fresh("qwen3"), name="m").weights_hash}) == 3


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: fresh().train(), "mine", "is in training mode"),
        (lambda: "a path", "mine", "is a str, not a model"),
        (fresh, "two/words", "a word that can be a folder's name"),
        (lambda: nn.Linear(2, 2).eval(), "mine", "a 'Linear' model"),
    ],
)
def test_what_cannot_be_wrapped(make, name, message):
    with pytest.raises(InputError, match=message):
        probekit.wrap(make(), name=name)
