"""The contract of a family, on small random models with its odd settings switched on, past their windows.

What is printed at the end is families x properties passed.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.engine import Engine
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import InputError, SelfCheckError
from probekit.lens.lens import Lens
from probekit.models.anatomy import anatomy
from probekit.models.families import FAMILIES
from probekit.models.family import SLIDING
from probekit.models.loaded import Loaded
from probekit.prediction.predict import predict
from probekit.prediction.rounds import rounds_of
from probekit.settings import Sampling
from probekit.tracing.tracer import trace
from probekit.tying.geometry import reading_rows
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted

WINDOW = 7
VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.35, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MIXED = [SLIDING, "full_attention", SLIDING, SLIDING, "full_attention"]
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
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.6,
                "attention_multiplier": 0.4},
    "cohere": {"logit_scale": 0.4, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.4, "sliding_window": WINDOW, "layer_types": MIXED},
}  # fmt: skip
PROMPTS = [[5, 9, 17, 3, 44, 12, 30, 8, 21, 2], [7, 7, 1], [50, 11, 23, 42, 6, 19, 33, 28, 14, 4, 39, 10]]
NEW = 24  # so that every text ends well past the window


def small(name: str) -> Loaded:
    torch.manual_seed(3)
    config = AutoConfig.for_model(name, **SMALL | ODD[name])
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Loaded(model, None, anatomy(model), f"small-{name}", f"small-{name}", None, None, f"random:{name}")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def loaded(request):
    return small(request.param)


@pytest.fixture(scope="module")
def run(loaded):
    return trace(loaded, PROMPTS, max_new_tokens=NEW)


def alone(loaded: Loaded, ids: list[int]) -> list[int]:
    out = loaded.model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_every_family_has_its_odd_settings():
    assert set(ODD) == set(FAMILIES)


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
    states = loaded.model.model(ids, output_hidden_states=True).hidden_states[2][0]
    expected = loaded.model.lm_head(loaded.model.model.norm(states))
    mine = Lens(loaded.anatomy)(states, 2)
    config = loaded.model.config
    expected = loaded.anatomy.family.logits(loaded.anatomy, expected.clone())
    torch.testing.assert_close(mine, expected, atol=2e-4, rtol=1e-4)
    cap = getattr(config, "final_logit_softcapping", None)
    assert cap is None or float(mine.abs().max()) < cap


def test_the_rows_of_the_head_read_as_the_model_does(loaded):
    """What geometry compares: head(norm(h)), row by row, for a residual stream h of mean 0 (LayerNorm) and rms 1."""
    parts, before = loaded.anatomy, loaded.anatomy.norm.weight.data.clone()
    try:
        torch.nn.init.normal_(parts.norm.weight, generator=torch.Generator().manual_seed(2))
        h = torch.randn(3, before.numel())
        h = h - h.mean(-1, keepdim=True)
        h = h / h.square().mean(-1, keepdim=True).sqrt()
        with torch.no_grad():
            torch.testing.assert_close(h @ reading_rows(parts).T, parts.head(parts.norm(h)), atol=1e-3, rtol=1e-3)
    finally:
        parts.norm.weight.data.copy_(before)


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


def test_transformers_own_early_exit_makes_these_rounds(loaded, run):
    table = predict(run, [2, 4], [3], "draft", with_rounds=True)
    if loaded.anatomy.family.model_type == "cohere2":  # transformers 5.23 runs all layers with the cache of a few
        with pytest.raises(IndexError):
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


def test_another_family_is_named():
    config = AutoConfig.for_model("gpt2", n_layer=2, n_head=2, n_embd=8, vocab_size=11)
    with pytest.raises(InputError, match=r"a 'gpt2' model .* reads causal language models of llama, mistral"):
        anatomy(AutoModelForCausalLM.from_config(config))


def test_an_engine_that_is_wrong_does_not_believe_itself(monkeypatch):
    """Without its window, a Mistral would be wrong from the window on, silently."""
    from dataclasses import replace

    from probekit.models.family import layer_kinds

    loaded = small("mistral")
    loaded.model.config.layer_types = None
    blind = replace(loaded.anatomy, family=replace(FAMILIES["mistral"], kinds=layer_kinds))
    with pytest.raises(SelfCheckError, match="the engine does not reproduce small-mistral"):
        Autoregressive(replace(loaded, anatomy=blind)).decode(PROMPTS, max_new_tokens=4)
