"""Models in memory, in the states that people have them in: every token is that model's own `generate`'s."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch
from models.held_states import STATES, adapted, fresh, quantised_by_torchao, scaled_by_hand, switched_off
from torch import nn

import probekit
from probekit.costs.profile import Costs
from probekit.costs.roofline import Dimensions, roofline_costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import InputError, SelfCheckError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.hooks.fast_forward import fast_forward
from probekit.lens.exit_heads import fit_heads
from probekit.lens.lens import Lens
from probekit.models.states import hash_in_memory, unwrapped
from probekit.prediction.predict import predict
from probekit.tracing.inspect_prompt import inspect_prompt
from probekit.tracing.tracer import trace
from probekit.validation.run import validate

PROMPTS = [[5, 9, 17, 3, 44], [7, 7, 1]]
NEW = 12
SLOW = {
    "LoRA, merged and unloaded", "LoRA on every map", "mixed adapters", "AdaLoRA", "LoKr", "OFT", "VeRA",
    "weight norm by hooks", "int4 weights (torchao)", "float8 weights (torchao)", "8 bits (bitsandbytes)",
    "4 bits (bitsandbytes)", "offloaded to disk", "dispatched over CPU and disk", "compiled", "compiled layers",
    "data parallel", "eager attention", "made for inference", "frozen in parts", "classes of one's own",
}  # fmt: skip
"""States that are looked at in the second part: variants of others, or slow ones."""


def generated(model: nn.Module, ids: list[int], new: int = NEW) -> list[int]:
    """What the model's own `generate` says, in the state that it is in."""
    whole = getattr(model, "module", model).generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)).long(),
        max_new_tokens=new,
        do_sample=False,
    )
    return whole[0, len(ids) :].tolist()


def some_costs(loaded) -> Costs:
    """Costs that take no time to make: what is validated here is counts."""
    return roofline_costs(loaded, bandwidth=1e10, flops=1e10, dtype="float32")


def as_it_was(model: nn.Module) -> dict[str, object]:
    """All of a model that a borrower could leave otherwise."""
    modules = dict(unwrapped(model).named_modules())
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "mode": {name: module.training for name, module in modules.items()},
        "own": {name: sorted(map(str, module.__dict__)) for name, module in modules.items()},
        "hooks": {name: (*module._forward_hooks, *module._forward_pre_hooks) for name, module in modules.items()},
        "gradients": {name: each.requires_grad for name, each in unwrapped(model).named_parameters()},
        "weights": hash_in_memory(unwrapped(model)),
        "config": unwrapped(model).config.to_dict(),
    }


def _param(name: str):
    return pytest.param(name, marks=pytest.mark.second) if name in SLOW else name


@pytest.fixture(scope="module", params=list(map(_param, STATES)))
def state(request):
    model = STATES[request.param]()
    model.eval()
    expected = [generated(model, ids) for ids in PROMPTS]
    return request.param, model, expected


def test_tokens_and_rounds_are_the_models_own(state, record_property):
    _, model, expected = state
    record_property("counted", "kinds of wrapped model equal to their generate")
    before = as_it_was(model)
    loaded = probekit.wrap(model, name="mine")
    assert [each.tokens for each in Autoregressive(loaded).decode(PROMPTS, max_new_tokens=NEW)] == expected
    for ids, tokens in zip(PROMPTS, expected, strict=True):
        assert SelfSpeculative(loaded, 3, 3).decode([ids], max_new_tokens=NEW)[0].tokens == tokens
    run = trace(loaded, PROMPTS, max_new_tokens=NEW)
    assert [run.outputs(prompt).tolist() for prompt in run.prompts] == expected
    assert predict(run).cells
    assert validate(loaded, run, [(2, 3)], costs=some_costs(loaded)).holds
    assert as_it_was(model) == before


@pytest.mark.second
def test_agreement_only_and_a_smaller_draft_head(state):
    """The same bits by the quick method, and drafts from some rows of the head, where the head is no plain map."""
    _, model, expected = state
    loaded = probekit.wrap(model, name="mine")
    whole, quick = (
        trace(loaded, PROMPTS[:1], max_new_tokens=8, statistics=statistics) for statistics in ("all", "agreement")
    )
    assert (whole.values(0, "agrees") == quick.values(0, "agrees")).all()
    drafts = SelfSpeculative(loaded, 3, 2, draft_vocabulary=range(0, 61, 2))
    assert drafts.decode(PROMPTS[:1], max_new_tokens=NEW)[0].tokens == expected[0]


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantised_but_the_head(model):
    head, model.lm_head = model.lm_head, nn.Identity()
    model = quantised(model)
    model.lm_head = head
    return model


def quantised_with_activations(model):
    return quantised_by_torchao("Int8DynamicActivationInt8WeightConfig")


@pytest.mark.parametrize("make", [quantised, quantised_but_the_head, quantised_with_activations])
def test_arithmetic_that_depends_on_what_is_computed_together_is_traced_and_not_decoded(make):
    """Dynamic quantisation scales activations by all rows of a call: a row alone is another number."""
    model = make(fresh())
    loaded = probekit.wrap(model, name="mine")
    with pytest.raises(SelfCheckError, match="dynamic quantisation"):
        Autoregressive(loaded).decode(PROMPTS, max_new_tokens=4)
    run = trace(loaded, PROMPTS, max_new_tokens=8)
    for prompt, ids in enumerate(PROMPTS):
        assert run.outputs(prompt).tolist() == generated(model, ids, 8)
    assert run.values(0, "probability").shape == (6, 8)
    with pytest.raises(InputError, match="which sampling needs"):
        trace(loaded, PROMPTS, max_new_tokens=4, sampling=probekit.Sampling(temperature=1.0))


def test_a_compiled_model_is_decoded_and_says_that_hooks_come_too_late():
    compiled = torch.compile(fresh(), backend="eager")
    for context in (Capture, Edit):
        with pytest.raises(InputError, match="this model is compiled"):
            context(compiled)
    within = fresh()
    within.model = torch.compile(within.model, backend="eager")
    in_place = fresh()
    in_place.compile(backend="eager")
    for model in (within, in_place):
        with pytest.raises(InputError, match="this model is compiled"):
            Capture(model)
        loaded = probekit.wrap(model, name="mine")
        for work in (
            lambda one: Autoregressive(one).decode(PROMPTS, max_new_tokens=2),
            lambda one: trace(one, PROMPTS),
        ):
            with pytest.raises(InputError, match="this model is compiled"):
                work(loaded)


PROMPT_LEARNING = {
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "AdaptionPromptConfig": {"adapter_len": 3, "adapter_layers": 2},
}


@pytest.mark.parametrize("kind", list(PROMPT_LEARNING))
def test_adapters_before_the_text_are_refused_by_name(kind):
    model = adapted(kind, task_type="CAUSAL_LM", **PROMPT_LEARNING[kind])
    with pytest.raises(InputError, match=r"has an adapter \([A-Z_]+\) that puts states of its own before the text"):
        probekit.wrap(model, name="mine")


@pytest.fixture(scope="module")
def texted():
    """A wrapped model that reads text, and the model itself."""
    from probekit.models.synthetic import byte_tokenizer

    model = adapted()
    return probekit.wrap(model, byte_tokenizer(61, False), name="mine"), model


PUBLIC = {
    "trace": lambda one: trace(one, PROMPTS, max_new_tokens=2),
    "decode": lambda one: probekit.decode(one, PROMPTS[0], max_new_tokens=2),
    "speculative": lambda one: probekit.decode(
        one, PROMPTS[0], method="speculative", draft_model=one, draft_length=2, max_new_tokens=2
    ),
    "Autoregressive": lambda one: Autoregressive(one).decode(PROMPTS, max_new_tokens=2),
    "measure_costs": lambda one: probekit.measure_costs(one, 8, draft_lengths=[2], repeats=1),
    "roofline_costs": lambda one: roofline_costs(one, bandwidth=1e9, flops=1e9),
    "inspect_prompt": lambda one: inspect_prompt(one, "abc", max_new_tokens=2).table(),
}


@pytest.mark.parametrize("name", list(PUBLIC))
def test_public_functions_take_a_wrapped_model_and_name_wrap_for_a_bare_one(texted, name):
    loaded, model = texted
    PUBLIC[name](loaded)
    for bare in (model, unwrapped(model)):
        with pytest.raises(InputError, match=r"probekit\.wrap") as caught:
            PUBLIC[name](bare)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        PUBLIC[name](7)


def test_a_bare_model_is_no_draft_model_either(texted):
    loaded, model = texted
    for work in (
        lambda: trace(loaded, PROMPTS, draft_model=model),
        lambda: probekit.measure_costs(loaded, 8, drafter=model),
        lambda: validate(model, trace(loaded, PROMPTS, max_new_tokens=2)),
    ):
        with pytest.raises(InputError, match=r"probekit\.wrap"):
            work()


def test_hooks_lenses_and_heads_take_a_model_in_any_wrapping(texted):
    loaded, model = texted
    ids = torch.tensor([PROMPTS[0]])
    for given in (loaded, model, unwrapped(model), loaded.anatomy):
        with Capture(given) as seen, torch.no_grad():
            logits = model(ids).logits
        torch.testing.assert_close(Lens(given)(seen[5], 5), logits, atol=1e-3, rtol=0)
        with Edit(given, skip=[1]), torch.no_grad():
            assert not torch.equal(model(ids).logits, logits)
        assert list(fit_heads(given, [ids], [2])) == [2]


def test_a_wrapped_model_that_changed_is_refused():
    """Adapters switched off, other modules, other weights: each is another model than the one that was wrapped."""
    model = adapted()
    loaded = probekit.wrap(model, name="mine")
    run = trace(loaded, PROMPTS, max_new_tokens=4)
    model.base_model.disable_adapter_layers()
    for work in (lambda: trace(loaded, PROMPTS), lambda: probekit.decode(loaded, PROMPTS[0])):
        with pytest.raises(InputError, match=r"has changed since it was wrapped.*Wrap it again"):
            work()
    model.base_model.enable_adapter_layers()
    with torch.no_grad():
        model.get_base_model().model.layers[2].mlp.up_proj.weight[0, 0] += 1
    for work in (lambda: trace(loaded, PROMPTS), lambda: validate(loaded, run, [(2, 2)])):
        with pytest.raises(InputError, match=r"weights of mine have changed since it was wrapped"):
            work()
    again = probekit.wrap(model, name="mine")
    with pytest.raises(InputError, match="is another model"):
        validate(again, run, [(2, 2)])


def test_bytes_are_those_that_are_stored():
    plain = probekit.wrap(fresh(), name="mine").anatomy
    assert plain.bytes == 4 * plain.parameters
    assert plain.stored_bytes is None
    packed = probekit.wrap(quantised(fresh()), name="mine").anatomy
    assert packed.parameters == plain.parameters
    maps = sum(part.weight.numel() for part in fresh().modules() if type(part) is nn.Linear)
    assert packed.bytes == plain.bytes - 3 * maps
    loaded = probekit.wrap(quantised_by_torchao("Int8WeightOnlyConfig"), name="mine")
    scales = sum(part.out_features for part in fresh().modules() if type(part) is nn.Linear)
    assert loaded.anatomy.parameters == plain.parameters
    assert 4 * scales <= loaded.anatomy.bytes - (plain.bytes - 3 * maps) <= 5 * scales  # and zero points, of a byte
    run = trace(loaded, PROMPTS, max_new_tokens=2)
    for source in (loaded, run):
        sizes = Dimensions.of(source)
        assert 61 * (32 + 4) <= sizes.head_bytes <= 61 * (32 + 5)
        assert sizes.layer_bytes < 1.5 * sizes.layer_parameters
        slow = roofline_costs(source, bandwidth=1.0, flops=1e12, dtype="float32", context=0)
        assert slow.autoregressive_s == 5 * sizes.layer_bytes + sizes.head_bytes


def test_the_quick_path_takes_only_what_it_knows(monkeypatch):
    """A class whose forward was patched, or a map of another kind of tensor, keeps its own call."""
    plain = fresh()
    norm = plain.model.norm
    assert fast_forward(probekit.anatomy(plain)).norm is not norm
    kind = type(norm)
    monkeypatch.setattr(kind, "forward", lambda self, states, own=kind.forward: 3 * own(self, states))
    assert fast_forward(probekit.anatomy(plain)).norm is norm
    loaded = probekit.wrap(plain, name="mine")
    assert Autoregressive(loaded).decode(PROMPTS[:1], max_new_tokens=8)[0].tokens == generated(plain, PROMPTS[0], 8)


def test_autocast_is_refused():
    """Under it a model computes in another dtype than the one that a run would name."""
    loaded = probekit.wrap(fresh(), name="mine")
    plain = Autoregressive(loaded)
    with torch.autocast("cpu", torch.bfloat16):
        for work in (lambda: plain.decode(PROMPTS, max_new_tokens=2), lambda: trace(loaded, PROMPTS)):
            with pytest.raises(InputError, match=r"torch\.autocast is on"):
                work()


def test_a_model_over_several_devices_is_traced_and_not_decoded(monkeypatch):
    """Its layers are asked where they compute; here one of them says: on a GPU."""
    model = fresh()
    loaded = probekit.wrap(model, name="mine")
    places = {torch.device("cpu"), torch.device("cuda", 1)}
    monkeypatch.setattr("probekit.decoding.self_check.devices_of", lambda model: places)
    with pytest.raises(SelfCheckError, match="spread over cpu, cuda:1"):
        Autoregressive(loaded).decode(PROMPTS, max_new_tokens=2)
    run = trace(loaded, PROMPTS, max_new_tokens=8)
    assert [run.outputs(prompt).tolist() for prompt in run.prompts] == [generated(model, ids, 8) for ids in PROMPTS]


def test_nnsight_says_that_it_reads_no_offloaded_model():
    if find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed")
    loaded = probekit.wrap(STATES["offloaded to the CPU"](), name="mine")
    with pytest.raises(InputError, match="whose weights are offloaded"):
        trace(loaded, PROMPTS, backend="nnsight")


def with_dropout_in_training():
    model = adapted(lora_dropout=0.5)
    unwrapped(model).model.layers[0].self_attn.q_proj.lora_dropout.train()
    return model


def test_two_states_of_one_model_have_two_hashes():
    plain, scaled = probekit.wrap(fresh(), name="mine"), probekit.wrap(scaled_by_hand(), name="mine")
    assert plain.weights_hash == probekit.wrap(fresh(), name="yours").weights_hash
    on, off = (probekit.wrap(make(), name="mine") for make in (adapted, switched_off))
    assert on.weights_hash != off.weights_hash
    assert len({plain.weights_hash, scaled.weights_hash, probekit.wrap(fresh("qwen3"), name="m").weights_hash}) == 3


def with_nameless_outputs():
    model = fresh()
    model.config.return_dict = False
    return model


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: fresh().train(), "mine", "is in training mode"),
        (with_dropout_in_training, "mine", r"is in training mode \(model.layers.0"),
        (lambda: fresh().to("meta"), "mine", r"holds no weights: model\.embed_tokens\.weight is on the meta device"),
        (with_nameless_outputs, "mine", "says return_dict=False"),
        (lambda: "a path", "mine", "is a str, not a model"),
        (fresh, "two/words", "a word that can be a folder's name"),
        (lambda: nn.Linear(2, 2).eval(), "mine", "a 'Linear' model"),
    ],
)
def test_what_cannot_be_wrapped(make, name, message):
    with pytest.raises(InputError, match=message):
        probekit.wrap(make(), name=name)
