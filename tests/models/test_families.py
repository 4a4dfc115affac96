"""The contract of a family, on small random models with its odd settings switched on, past their windows.

What is printed at the end is families x properties passed.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.batch_invariant import open_engine
from probekit.decoding.engine import Engine
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import InputError, Remark, SelfCheckError
from probekit.lens.lens import Lens
from probekit.models.anatomy import anatomy
from probekit.models.families import FAMILIES, register, unregister
from probekit.models.family import SLIDING, Family
from probekit.models.loaded import Loaded, batch_invariant
from probekit.prediction.predict import predict
from probekit.prediction.rounds import rounds_of
from probekit.settings import Sampling
from probekit.tracing.tracer import trace
from probekit.tying.geometry import reading_rows
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted

WINDOW = 7
ADDED = "nanochat"
VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.35, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MIXED = [SLIDING, "full_attention", SLIDING, SLIDING, "full_attention"]
WINDOWS = {"sliding_window": WINDOW, "layer_types": MIXED}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
ODD = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED, "attention_bias": True},
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW,
                "layer_types": MIXED},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": MIXED, "final_logit_softcapping": 6.0,
                    "query_pre_attn_scalar": 12},
    "gemma2": {"sliding_window": WINDOW, "layer_types": MIXED, "final_logit_softcapping": 6.0,
               "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 12},
    "granite": MULTIPLIERS,
    "cohere": {"logit_scale": 0.4, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.4} | WINDOWS,
    "cohere2_moe": {"logit_scale": 0.4} | EXPERTS | WINDOWS,
    "ministral": WINDOWS,
    "ministral3": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW} | LOCAL_EXPERTS,
    "qwen2_moe": {"use_sliding_window": True, "shared_expert_intermediate_size": 20} | EXPERTS | WINDOWS,
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": WINDOW} | EXPERTS,
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phimoe": {"sliding_window": WINDOW} | LOCAL_EXPERTS,
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": False, "num_key_value_heads": 4},
    "olmo": {"clip_qkv": 0.7, "attention_bias": True},
    "olmo3": WINDOWS,
    "olmoe": {"clip_qkv": 0.7} | EXPERTS,
    "flex_olmo": EXPERTS,
    "gemma": {"attention_bias": True},
    "vaultgemma": WINDOWS | {"final_logit_softcapping": 6.0, "attn_logit_softcapping": 5.0,
                             "query_pre_attn_scalar": 12},
    "granite_swa": MULTIPLIERS | WINDOWS,
    "granitemoe": MULTIPLIERS | LOCAL_EXPERTS,
    "hyperclovax": MULTIPLIERS,
    "gpt_oss": LOCAL_EXPERTS | WINDOWS,
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True,
                 "use_parallel_residual": True},
    "nemotron": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "glm": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "glm4_moe": {"partial_rotary_factor": 0.5} | ROUTED_EXPERTS,
    "exaone4": WINDOWS,
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1,
                     "use_bias": True},
    "hunyuan_v1_dense": {"attention_bias": True},
    "dots1": {"n_shared_experts": 1} | ROUTED_EXPERTS | WINDOWS,
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "apertus": {"attention_bias": True},
    "helium": {"attention_bias": True},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2} | WINDOWS,
    "jais2": {"attention_bias": True},
    "bitnet": {},
    "diffllama": {"attention_bias": True},
    ADDED: {"final_logit_softcapping": 6.0, "attention_bias": True},
}  # fmt: skip
# transformers 5.23 runs all layers of these in its early exit, with the cache of a few
WITHOUT_EARLY_EXIT = {"cohere2", "cohere2_moe", "nemotron", "exaone4", "stablelm", "gpt_oss", "gpt_neox"}
FAST = {
    ADDED, "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "olmo", "olmo2", "smollm3", "gemma2",
    "gemma3_text", "granite", "cohere", "cohere2",
}  # fmt: skip
PROMPTS = [[5, 9, 17, 3, 44, 12, 30, 8, 21, 2], [7, 7, 1], [50, 11, 23, 42, 6, 19, 33, 28, 14, 4, 39, 10]]
NEW = 24  # so that every text ends well past the window


def page_blocks() -> list[str]:
    """The code of the page that adds a family."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "extend.md").read_text(encoding="utf-8")
    return re.findall(
        r"^```python\n(.*?)^```", page.partition("\n## A family\n")[2].partition("\n## ")[0], re.MULTILINE | re.DOTALL
    )


def small(name: str, **settings) -> Loaded:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(3)
    config = AutoConfig.for_model(name, **SMALL | ODD[name] | settings)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Loaded(model, None, anatomy(model), f"small-{name}", f"small-{name}", None, None, f"random:{name}")


@pytest.fixture(
    scope="module",
    params=[
        name if name in FAST else pytest.param(name, marks=pytest.mark.second) for name in (*sorted(FAMILIES), ADDED)
    ],
)
def loaded(request):
    """Each family in turn, and the one that the documentation adds, as it adds it."""
    if request.param != ADDED:
        yield small(request.param)
        return
    exec(page_blocks()[0], {})
    try:
        yield small(ADDED)
    finally:
        unregister(ADDED)


@pytest.fixture(scope="module")
def run(loaded):
    return trace(loaded, PROMPTS, max_new_tokens=NEW)


def alone(loaded: Loaded, ids: list[int]) -> list[int]:
    out = loaded.model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_every_family_has_its_odd_settings():
    assert set(ODD) == {*FAMILIES, ADDED}


def test_a_family_is_added_in_under_forty_lines():
    blocks = page_blocks()
    assert "register(" in blocks[0]
    assert len("".join(blocks).splitlines()) < 40


def test_a_family_is_added_once_and_can_go_again():
    assert ADDED not in FAMILIES
    with pytest.raises(InputError, match="there is a family 'llama' already"):
        register(Family("llama"))
    added = register(Family("llama_of_mine"))
    try:
        assert FAMILIES["llama_of_mine"] is added
    finally:
        unregister("llama_of_mine")
    assert "llama_of_mine" not in FAMILIES


def test_tokens_are_generates_alone_and_in_a_batch(loaded):
    expected = [alone(loaded, ids) for ids in PROMPTS]
    assert [run.tokens for run in Autoregressive(loaded).decode(PROMPTS, max_new_tokens=NEW)] == expected
    for ids, tokens in zip(PROMPTS, expected, strict=True):
        assert Autoregressive(loaded).decode([ids], max_new_tokens=NEW)[0].tokens == tokens


def test_the_last_row_of_the_lens_is_the_model(loaded, run):
    ids = torch.tensor([[*run.prompt_ids(0), *run.outputs(0)]])
    engine = Engine(loaded.anatomy, 1, ids.shape[1])
    with torch.inference_mode():
        logits = loaded.model(ids).logits[0]
        normed = engine.full(ids, engine.places([0], ids.shape[1]))
        torch.testing.assert_close(engine.logits(normed)[0], logits, atol=2e-4, rtol=1e-4)
        residual = engine.early(ids, engine.places([0], ids.shape[1]), 3)
        torch.testing.assert_close(engine.late(residual, engine.places([0], ids.shape[1]), 3), normed)
    assert (torch.tensor(run.outputs(0)) == logits.argmax(-1)[len(run.prompt_ids(0)) - 1 : -1]).all()
    parts, config = loaded.anatomy, loaded.model.config
    states = parts.decoder(ids, output_hidden_states=True).hidden_states[2][0]
    expected = parts.family.logits(parts, parts.head(parts.norm(states)).clone())
    mine = Lens(parts)(states, 2)
    torch.testing.assert_close(mine, expected, atol=2e-4, rtol=1e-4)
    cap = getattr(config, "final_logit_softcapping", None)
    assert cap is None or float(mine.abs().max()) < cap


def test_the_rows_of_the_head_read_as_the_model_does(loaded):
    """What geometry compares: head(norm(h)), row by row, for a residual stream h of mean 0 (LayerNorm) and rms 1."""
    parts = loaded.anatomy
    weights = [parameter.data for parameter in parts.norm.parameters()][:1]  # OLMo's has none
    before = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(2))
        h = torch.randn(3, parts.width)
        h = h - h.mean(-1, keepdim=True)
        h = h / h.square().mean(-1, keepdim=True).sqrt()
        with torch.no_grad():
            bias = 0.0 if parts.head.bias is None else parts.head.bias
            found = h @ reading_rows(parts).T + bias
            torch.testing.assert_close(found, parts.head(parts.norm(h)), atol=1e-3, rtol=1e-3)
    finally:
        for weight, values in zip(weights, before, strict=True):
            weight.copy_(values)


def test_rounds_are_those_of_the_trace(loaded, run):
    found = validate(loaded, run, [(1, 3), (2, 2), (4, 4)])
    assert found.holds
    assert all(cell.rounds_equal and cell.tokens_equal and not cell.ties for cell in found.cells)
    assert sum(cell.measured["accepted"] for cell in found.cells) > 0, "drafts that are never accepted prove little"
    batch = SelfSpeculative(loaded, 4, 4).decode(PROMPTS, max_new_tokens=NEW)
    for prompt, decoded in zip(run.prompts, batch, strict=True):
        assert decoded.tokens == run.outputs(prompt).tolist()
        rounds = rounds_of(run.agreement(prompt)[4], 4, NEW)
        assert (decoded.drafted, decoded.accepted) == (rounds.drafted.tolist(), rounds.accepted.tolist())


BROKEN_IN_5_17 = ["cohere2", "gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "smollm3"]


def test_transformers_own_early_exit_makes_these_rounds(loaded, run):
    if transformers.__version__.startswith("5.17.") and loaded.anatomy.family.model_type in BROKEN_IN_5_17:
        pytest.skip("transformers 5.17's own early exit fails past a sliding window")
    table = predict(run, [2, 4], [3], "draft", with_rounds=True)
    if loaded.anatomy.family.model_type in WITHOUT_EARLY_EXIT:
        with pytest.raises(InputError, match="cannot run its own early exit"):
            transformers_accepted(loaded, run.prompt_ids(0).tolist(), 2, 3, NEW)
        return
    for row in table.rounds:
        found = transformers_accepted(loaded, run.prompt_ids(row.prompt).tolist(), row.exit_layer, 3, NEW)
        assert found.tokens == run.outputs(row.prompt).tolist()
        assert found.accepted == list(row.accepted)


def test_sampled_tokens_do_not_depend_on_the_batch(loaded):
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=4)
    together = SelfSpeculative(loaded, 3, 3).decode(PROMPTS, max_new_tokens=NEW, sampling=sampling)
    for index, ids in enumerate(PROMPTS):
        [one] = SelfSpeculative(loaded, 3, 3).decode([ids], max_new_tokens=NEW, sampling=sampling, indices=[index])
        assert one.tokens == together[index].tokens


def test_agreement_only_has_the_same_bits(loaded, run):
    fast = trace(loaded, PROMPTS, max_new_tokens=NEW, statistics="agreement")
    for prompt in run.prompts:
        assert (fast.agreement(prompt) == run.agreement(prompt)).all()


def test_a_model_comes_back_as_it_was(loaded, unchanged):
    unchanged(loaded.model)
    SelfSpeculative(loaded, 2, 2).decode(PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize(
    ("family", "odd", "message"),
    [
        ("mistral", {"sliding_window": 1}, "the sliding window of this model is 1; expected 2 tokens or more"),
        ("gemma2", {"sliding_window": 0, "layer_types": MIXED}, "the sliding window of this model is 0"),
        ("llama", {"layer_types": ["chunked_attention"] * 5}, "layers of the kind 'chunked_attention'"),
    ],
)
def test_what_transformers_cache_takes_otherwise_than_its_layers_is_refused(family, odd, message):
    loaded = small(family, **odd)
    for door in (lambda: trace(loaded, PROMPTS), lambda: Autoregressive(loaded).decode(PROMPTS, max_new_tokens=2)):
        with pytest.raises(InputError, match=message):
            door()


def test_layers_that_the_engine_cannot_run_are_traced_through_their_own_forward():
    """A GPT-NeoX has as many key/value heads as heads, whatever its configuration says."""
    loaded = small("gpt_neox", num_key_value_heads=2)
    with pytest.raises(SelfCheckError, match="the engine cannot run small-gpt_neox layer by layer"):
        Autoregressive(loaded).decode(PROMPTS, max_new_tokens=2)
    found = trace(loaded, PROMPTS[:1], max_new_tokens=6)
    assert found.outputs(0).tolist() == alone(loaded, PROMPTS[0])[:6]


def test_an_engine_that_is_wrong_does_not_believe_itself(monkeypatch):
    """Without its window, a Mistral would be wrong from the window on, silently."""
    from dataclasses import replace

    from probekit.models.family import layer_kinds

    loaded = small("mistral")
    loaded.model.config.layer_types = None
    blind = replace(loaded.anatomy, family=replace(FAMILIES["mistral"], kinds=layer_kinds))
    with pytest.raises(SelfCheckError, match="the engine does not reproduce small-mistral"):
        Autoregressive(replace(loaded, anatomy=blind)).decode(PROMPTS, max_new_tokens=4)


@torch.inference_mode()
def test_batch_invariant_passes_have_the_same_bits(loaded):
    """Any family, with windows, caps and experts: steps, wide passes and other rows beside it."""
    model = loaded if loaded.anatomy.batch_invariant else batch_invariant(loaded)
    ids = torch.arange(3, 3 + 2 * 20).view(2, 20) % VOCABULARY

    def logits(rows, cuts):
        engine, at, found = open_engine(model.anatomy, len(rows), 20), 0, []
        for size in cuts:
            found.append(engine.logits(engine.full(rows[:, at : at + size], engine.places([at] * len(rows), size))))
            at += size
        return torch.cat(found, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)  # of experts
        steps = logits(ids[:1], [1] * 20)
        assert torch.equal(logits(ids[:1], [11, 9]), steps)
        assert torch.equal(logits(ids, [6] * 3 + [2])[:1], steps)
    torch.testing.assert_close(steps[0].float(), loaded.model(ids[:1]).logits[0], rtol=1e-3, atol=1e-3)
