"""Direct logit attribution adds up to the model's logits, in every family, and equals a hand-written one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probekit.errors import InputError
from probekit.hooks.sites import open_hooks
from probekit.models.families import FAMILIES
from probekit.probing.attribution import attribute
from tests.models.test_families import FAST, small

IDS = [5, 9, 17, 3, 44, 12, 30, 8, 21, 2]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.second) for name in sorted(FAMILIES)]
)
def test_shares_add_up_to_the_models_logits(name, unchanged):
    loaded = small(name)
    for index, parameter in enumerate(loaded.anatomy.norm.parameters()):  # with a gain and a bias
        torch.nn.init.normal_(parameter, mean=1.0 - index, std=0.5, generator=torch.Generator().manual_seed(index))
    unchanged(loaded.model)
    with torch.no_grad():
        logits = loaded.model(torch.tensor([IDS]), use_cache=False).logits[0].float()
    found = attribute(loaded, IDS)
    assert list(found.tokens) == logits.argmax(-1).tolist()
    expected = logits.amax(-1).numpy()
    size = np.abs(found.values).sum(-1)
    np.testing.assert_allclose(found.values.sum(-1), expected, atol=2e-5 * size.max(), rtol=1e-5)
    other = attribute(loaded, IDS, [7] * len(IDS))
    np.testing.assert_allclose(other.values.sum(-1), logits[:, 7].numpy(), atol=2e-5 * size.max(), rtol=1e-5)
    config = loaded.model.config
    assert ("soft cap" in found.terms) == (getattr(config, "final_logit_softcapping", None) is not None)
    assert len([term for term in found.terms if ":" in term]) == 2 * loaded.depth
    assert open_hooks(loaded.model) == []


def test_it_equals_one_written_by_hand(tiny):
    """RMS norm of a Llama, spelled out: c . (g W[t]) / sqrt(mean h^2 + eps)."""
    kept = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, name=name: kept.__setitem__(name, (out[0] if isinstance(out, tuple) else out)[0])
        )
        for layer, block in enumerate(tiny.model.model.layers)
        for name, module in ((f"attention:{layer}", block.self_attn), (f"mlp:{layer}", block.mlp))
    ]
    ids = [each % 90 for each in IDS]
    try:
        with torch.no_grad():
            logits = tiny.model(torch.tensor([ids])).logits[0]
            embedded = tiny.model.model.embed_tokens(torch.tensor(ids))
    finally:
        for handle in handles:
            handle.remove()
    last = embedded + sum(kept.values())
    norm, head = tiny.model.model.norm, tiny.model.lm_head.weight
    scale = (last.square().mean(-1) + norm.variance_epsilon).rsqrt()
    reads = head[logits.argmax(-1)] * norm.weight
    found = attribute(tiny, ids)
    for term, value in {"embedding": embedded, **kept}.items():
        expected = ((value * reads).sum(-1) * scale).detach().numpy()
        np.testing.assert_allclose(found.values[:, found.terms.index(term)], expected, atol=1e-4, rtol=1e-4)
    table = found.table()
    assert table.groupby("position").logit.sum().to_numpy() == pytest.approx(logits.amax(-1).numpy(), abs=1e-4)


def test_what_cannot_be_shared_out_is_refused_by_name(tiny, unchanged):
    unchanged(tiny.model)
    with pytest.raises(InputError, match="2 tokens were named for a text of 3"):
        attribute(tiny, [1, 2, 3], [1, 2])
    with pytest.raises(InputError, match="97 is no token"):
        attribute(tiny, [1], [97])

    class Odd(torch.nn.Module):
        weight = torch.ones(36)

        def forward(self, states):
            return states.tanh() + states.square()

    from probekit.probing.attribution import held_norm

    parts = replace(tiny.anatomy, norm=Odd(), sizes=None)
    with pytest.raises(InputError, match=r"final norm of this 'llama' model \(Odd\) is no scaled linear map"):
        held_norm(parts, torch.randn(3, 36))
