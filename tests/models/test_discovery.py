"""Families that probekit does not know: found by accessors, held against the model, traced, not decoded."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import probekit
from probekit.decoding.engine import Engine
from probekit.errors import InputError, SelfCheckError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.hooks.stop_resume import Resume, Stop
from probekit.lens.lens import Lens
from probekit.models.discovery import NO_NORM
from probekit.models.families import FAMILIES
from probekit.models.loaded import describe

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
LATENT = {
    "intermediate_size": 48, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
UNKNOWN = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 40},
    "bloom": {"apply_residual_connection_post_layernorm": True},
    "falcon": {"alibi": True},
    "deepseek_v3": LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                             "moe_intermediate_size": 24, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "mpt": {},
    "gpt_bigcode": {"multi_query": True},
    "persimmon": {},
    "biogpt": {},
    "xglm": {},
    "ctrl": {},
    "minicpm3": LATENT,
    "moshi": {},
    "nanochat": {"final_logit_softcapping": 6.0},
    "doge": {},
}  # fmt: skip
FAST = {"gpt2", "bloom", "falcon", "deepseek_v3"}
PROMPTS = [[5, 9, 17, 3, 44, 12, 30], [7, 7, 1]]
NEW = 10


def fresh(family: str, **settings) -> nn.Module:
    torch.manual_seed(2)
    config = AutoConfig.for_model(family, **SMALL | UNKNOWN.get(family, {}) | settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(
    scope="module",
    params=[name if name in FAST else pytest.param(name, marks=pytest.mark.second) for name in UNKNOWN],
)
def loaded(request):
    return probekit.wrap(fresh(request.param), name="mine")


@pytest.fixture(scope="module")
def run(loaded):
    return probekit.trace(loaded, PROMPTS, max_new_tokens=NEW)


def test_none_of_them_is_known():
    assert not set(UNKNOWN) & set(FAMILIES)


def test_the_text_is_generates_and_the_lens_ends_at_the_model(loaded, run, unchanged):
    model = unchanged(loaded.model)
    for prompt, ids in enumerate(PROMPTS):
        whole = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        assert run.outputs(prompt).tolist() == whole[0, len(ids) :].tolist()
        with torch.no_grad(), Capture(model) as capture:
            truth = model(whole, output_hidden_states=True)
        for site in range(loaded.depth):
            assert torch.equal(capture[site], truth.hidden_states[site])
        mine = Lens(loaded.anatomy)(capture[loaded.depth][0], loaded.depth)
        torch.testing.assert_close(mine, truth.logits[0], atol=2e-4, rtol=1e-4)
        rows = truth.logits[0, len(ids) - 1 : -1].softmax(-1)
        found = run.values(prompt, "probability")[loaded.depth]
        torch.testing.assert_close(torch.tensor(found), rows.max(-1).values, atol=1e-4, rtol=1e-3)
    assert probekit.predict(run).cells


def test_agreement_only_has_the_same_bits(loaded, run):
    fast = probekit.trace(loaded, PROMPTS, max_new_tokens=NEW, statistics="agreement")
    for prompt in run.prompts:
        assert (fast.agreement(prompt) == run.agreement(prompt)).all()


def test_it_is_not_decoded(loaded, run):
    refused = rf"a '{loaded.anatomy.family.model_type}' model: probekit traces it.*It decodes llama, mistral"
    for door in (
        lambda: probekit.decode(loaded, PROMPTS[0]),
        lambda: probekit.decode(loaded, PROMPTS[0], method="self-speculative", exit_layer=2, draft_length=2),
        lambda: probekit.validate(loaded, run, [(2, 2)]),
        lambda: probekit.measure_costs(loaded, 16),
        lambda: Engine(loaded.anatomy, 1, 8),
    ):
        with pytest.raises(InputError, match=refused) as error:
            door()
        assert "\n" not in str(error.value)
    described = describe(loaded)
    assert (described["decoded"], described["layers"], described["vocabulary"]) == (False, 4, 61)
    assert "a family that probekit does not know" in loaded.remark


def test_a_pass_can_be_stopped_resumed_and_edited(loaded):
    model, ids = loaded.model, torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        truth = loaded.anatomy.decoder(ids, use_cache=False).last_hidden_state
        with Capture(model) as plain:
            model(ids)
        for site in (0, 2, 4):
            with Stop(model, site) as stop:
                residual = stop(input_ids=ids, use_cache=False)
            assert torch.equal(residual, plain[site])
            with Resume(model, site) as resume:
                assert torch.equal(resume(residual, use_cache=False), truth)
        with Edit(model, skip=[1]), Capture(model) as edited:
            model(ids)
        assert torch.equal(edited[2], edited[1])
        assert torch.equal(edited[1], plain[1])
        assert not torch.equal(edited[3], plain[3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A GPT-2 with a tokenizer, as a checkpoint."""
    path = tmp_path_factory.mktemp("gpt2") / "small-gpt2"
    fresh("gpt2", vocab_size=97).save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


def test_a_prompt_is_looked_into_step_by_step(folder):
    loaded = probekit.load(folder, device="cpu")
    look = probekit.inspect_prompt(loaded, "abc", max_new_tokens=4)
    assert [states[0].shape[1] for states in look.states] == [3, 1, 1, 1]
    assert [look.exit(step, loaded.depth).token_id for step in range(4)] == look.tokens


def test_the_commands_say_what_they_do_of_it(folder, tmp_path, capsys):
    if find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed")
    from probekit.cli.app import run

    (tmp_path / "prompts.txt").write_text("abc\nde\n")
    traced = ["trace", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "run")]
    for words, status, said in (
        (["inspect", str(folder)], 0, "a family that probekit does not know"),
        (["lens", str(folder), "abc", "--max-new-tokens", "2"], 0, "a family that probekit does not know"),
        ([*traced, "--max-new-tokens", "4"], 0, "a family that probekit does not know"),
        (["predict", str(tmp_path / "run")], 0, ""),
        (["choose", str(tmp_path / "run"), "--costs", "roofline"], 0, ""),
        (["decode", str(folder), "abc"], 2, "small-gpt2 is a 'gpt2' model: probekit traces it"),
        (["validate", str(tmp_path / "run")], 2, "does not decode it"),
        (["study", str(folder), "-o", str(tmp_path / "study")], 2, "does not decode it"),
        ([*traced, "-o", str(tmp_path / "other"), "--backend", "nnsight"], 2, "nnsight reads models of known families"),
        ([*traced, "-o", str(tmp_path / "sampled"), "--temperature", "1"], 2, "which sampling needs"),
    ):
        assert run(words) == status
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: fresh("mamba"), "carry a state from token to token"),
        (lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **SMALL)).eval(), "carry a state"),
        (lambda: fresh("openai-gpt"), "with a cache it says something else than without"),
        (lambda: fresh("bert", is_decoder=True, intermediate_size=40), "its logits are not what its head"),
        (lambda: fresh("opt", word_embed_proj_dim=16, ffn_dim=40), "do not write"),
        (lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        ).eval(), "an encoder-decoder, not a causal decoder"),
        (lambda: _without_its_list(fresh("gpt2")), "holds no list of 4 decoder layers"),
        (lambda: _with_a_map_behind_its_norm(fresh("gpt2")), "its logits are not what its head"),
        (lambda: _that_looks_ahead(fresh("gpt2")), "depends on later ones"),
    ],
)  # fmt: skip
def test_what_is_no_causal_decoder_on_one_stream_is_refused_in_a_line(make, why):
    with pytest.raises((InputError, SelfCheckError), match=why) as error:
        probekit.trace(probekit.wrap(make(), name="mine"), PROMPTS, max_new_tokens=2)
    assert "\n" not in str(error.value)


def _without_its_list(model):
    model.transformer.h = nn.ModuleList([*model.transformer.h, nn.Identity()])
    return model


def _with_a_map_behind_its_norm(model):
    model.transformer.ln_f = nn.Sequential(model.transformer.ln_f, nn.Linear(32, 32))
    return model.eval()


def _that_looks_ahead(model):
    """A layer that reads the mean over all positions."""

    class Mean(nn.Module):
        def forward(self, states):
            return states + states.mean(1, keepdim=True)

    model.transformer.h[1].mlp = Mean()
    return model.eval()


def test_a_model_without_a_final_norm_is_read_as_it_is():
    loaded = probekit.wrap(fresh("gpt2"), name="mine")
    assert loaded.anatomy.norm is loaded.model.transformer.ln_f
    model = fresh("gpt2")
    model.transformer.ln_f = nn.Identity()
    assert probekit.wrap(model, name="mine").anatomy.norm is NO_NORM
    assert probekit.trace(probekit.wrap(model, name="mine"), PROMPTS, max_new_tokens=3).prompts
