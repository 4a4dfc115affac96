"""The parts of a Llama, and the errors of sites, exits and other families."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForSequenceClassification

from probekit.errors import InputError
from probekit.models.anatomy import anatomy
from probekit.models.synthetic import synthetic


def test_parts_of_tiny(tiny):
    parts = tiny.anatomy
    assert (parts.depth, parts.width, parts.vocabulary, parts.context) == (5, 36, 97, 256)
    assert (parts.sites, parts.exits) == (range(6), range(1, 5))
    assert not parts.tied
    assert (parts.dtype, parts.device) == (torch.float32, torch.device("cpu"))
    # embedding and head 2 x 97 x 36, norms (2 x 5 + 1) x 36; a layer: q and o 36 x 60, k and v 36 x 20, mlp 3 x 36 x 52
    by_hand = 2 * 97 * 36 + 11 * 36 + 5 * (2 * 36 * 60 + 2 * 36 * 20 + 3 * 36 * 52)
    assert parts.parameters == by_hand
    assert parts.bytes == 4 * by_hand


def test_a_tied_head_counts_once(tiny_tied):
    assert tiny_tied.anatomy.tied
    untied = synthetic("tiny-tied", tied=False).anatomy
    assert not untied.tied
    assert untied.parameters - tiny_tied.anatomy.parameters == 257 * 30


def test_parts_make_the_model(any_tiny):
    parts, ids = any_tiny.anatomy, torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        out = any_tiny.model(ids, output_hidden_states=True)
        assert torch.equal(parts.embedding(ids), out.hidden_states[0])
        assert torch.equal(parts.head(parts.decoder(ids).last_hidden_state), out.logits)


def test_sites_and_exits_that_do_not_exist(tiny):
    assert tiny.anatomy.check_site(5) == 5
    assert tiny.anatomy.check_exit(4) == 4
    for exit_layer in (0, 5, 99, -1, True, "1", 1.0):
        with pytest.raises(InputError, match=r"exit layer .* is out of range: this model has exits 1\.\.4"):
            tiny.anatomy.check_exit(exit_layer)
    for site in (6, -1, False, None):
        with pytest.raises(InputError, match=r"site .* does not exist: this model has sites 0\.\.5"):
            tiny.anatomy.check_site(site)


def test_what_has_no_parts_is_named():
    small = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 11, "n_positions": 8}
    with pytest.raises(InputError, match=r"'gpt2' model \(GPT2Model\): it has no language model's head"):
        anatomy(GPT2Model(GPT2Config(**small)))
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    with pytest.raises(InputError, match=r"LlamaForSequenceClassification"):
        anatomy(LlamaForSequenceClassification(config))
    with pytest.raises(InputError, match=r"'Linear' model"):
        anatomy(torch.nn.Linear(1, 1))
