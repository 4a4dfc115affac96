"""Patching and attribution on real models: SmolLM2 (tied) and Gemma 3 (norms behind its branches, windows)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probekit.probing.attribution import attribute
from probekit.probing.patching import patch

CLEAN = "The Eiffel Tower is in the city of"


@pytest.mark.long
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models(name, request, unchanged):
    loaded = request.getfixturevalue(name)
    unchanged(loaded.model)
    ids = loaded.tokenizer(CLEAN)["input_ids"]
    other = [ids[0], *ids[1:]]
    changed = len(ids) // 3
    other[changed] = (ids[changed] + 57) % 10_000
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids])).logits[0].float()
        corrupted = loaded.model(torch.tensor([other])).logits[0].float()
    shares = attribute(loaded, ids)
    size = np.abs(shares.values).sum(-1)
    np.testing.assert_allclose(shares.values.sum(-1), logits.amax(-1).numpy(), atol=1e-4 * size.max())
    layer = loaded.depth // 2
    sites = [layer, f"attention:{layer}", f"mlp:{layer}"]
    found = patch(loaded, ids, other, sites, [changed, -1], answers=[5, 9], exits=[layer - 1])
    block, branches = loaded.anatomy.layers, loaded.anatomy.family.branches
    modules = [
        block[layer - 1],
        block[layer].get_submodule(branches.attention),
        block[layer].get_submodule(branches.mlp),
    ]
    assert found.base.difference == pytest.approx(float(corrupted[-1, 5] - corrupted[-1, 9]), abs=2e-3)
    for row, module in enumerate(modules):
        kept = []

        def keep(_, __, output, kept=kept):
            kept.append((output[0] if isinstance(output, tuple) else output)[0].clone())

        handle = module.register_forward_hook(keep)
        with torch.no_grad():
            loaded.model(torch.tensor([ids]))
        handle.remove()
        for column, position in enumerate(found.positions):

            def put(_, __, output, kept=kept, position=position):
                value = (output[0] if isinstance(output, tuple) else output).clone()
                value[0, position] = kept[0][position]
                return (value, *output[1:]) if isinstance(output, tuple) else value

            handle = module.register_forward_hook(put)
            with torch.no_grad():
                expected = loaded.model(torch.tensor([other])).logits[0, -1].float()
            handle.remove()
            assert found.patched.difference[row, column] == pytest.approx(float(expected[5] - expected[9]), abs=2e-3)
