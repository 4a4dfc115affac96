"""Component sites: what a layer's attention and MLP add, in every family, held against the layers' own arithmetic."""

from __future__ import annotations

import pytest
import torch

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.components import Component, all_sites, check_site
from probekit.hooks.edit import Edit
from probekit.hooks.sites import open_hooks
from probekit.hooks.stop_resume import Resume, Stop
from probekit.models.families import FAMILIES
from tests.models.test_families import FAST, small

IDS = torch.tensor([[5, 9, 17, 3, 44, 12, 30, 8, 21, 2, 7, 6]])
PARALLEL = {"phi", "cohere", "cohere2", "cohere2_moe", "stablelm"}  # by their odd settings; a GPT-NeoX below


def everything(parts):
    return [*parts.sites, *all_sites(parts, "attention"), *all_sites(parts, "mlp")]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(
    scope="module",
    params=[name if name in FAST else pytest.param(name, marks=pytest.mark.second) for name in sorted(FAMILIES)],
)
def loaded(request):
    return small(request.param)


def check_sums(loaded):
    parts = loaded.anatomy
    with Capture(parts, everything(parts)) as capture:
        truth = loaded.model(IDS).logits
    for layer in range(parts.depth):
        attention, mlp = capture[f"attention:{layer}"], capture[f"mlp:{layer}"]
        assert attention.abs().max() > 0
        assert mlp.abs().max() > 0
        torch.testing.assert_close(capture[layer] + attention + mlp, capture[layer + 1], atol=2e-5, rtol=2e-5)
    return truth, capture


def test_a_layer_adds_its_two_components(loaded, unchanged):
    unchanged(loaded.model)
    check_sums(loaded)


def test_the_two_branches_of_a_gpt_neox_in_parallel_and_one_after_the_other():
    for parallel in (True, False):
        check_sums(small("gpt_neox", use_parallel_residual=parallel))


def test_without_its_mlp_a_layer_adds_its_attention(loaded, unchanged):
    """Both components away: the layer hands its input on. Where it is parallel, the MLP does not see the attention."""
    unchanged(loaded.model)
    parts = loaded.anatomy
    _, whole = check_sums(loaded)
    away = {"mlp:1": lambda added: added * 0, "attention:1": lambda added: added * 0}
    with Edit(parts, at={"mlp:1": away["mlp:1"]}), Capture(parts, [2]) as capture:
        loaded.model(IDS)
    torch.testing.assert_close(capture[2], whole[1] + whole["attention:1"], atol=2e-5, rtol=2e-5)
    with Edit(parts, at=away), Capture(parts, [2, "mlp:1"]) as capture:
        ablated = loaded.model(IDS).logits
    assert capture["mlp:1"].abs().max() == 0
    with Edit(parts, skip=[1]):
        torch.testing.assert_close(ablated, loaded.model(IDS).logits, atol=5e-4, rtol=1e-4)
    with Edit(parts, at={"attention:1": away["attention:1"]}), Capture(parts, ["mlp:1"]) as capture:
        loaded.model(IDS)
    name = parts.family.model_type
    same = torch.allclose(capture["mlp:1"], whole["mlp:1"], atol=1e-5)
    assert same == (name in PARALLEL)


def test_stop_and_resume_at_components(loaded, unchanged):
    unchanged(loaded.model)
    parts = loaded.anatomy
    truth, whole = check_sums(loaded)
    for site in ("attention:2", "mlp:2"):
        with Stop(parts, site) as stop, Capture(parts, [3]) as capture:
            assert torch.equal(stop(input_ids=IDS, use_cache=False), whole[site])
        assert not capture.passes, "nothing runs behind the site"
        with Resume(parts, site) as resume:
            same = resume(whole[2], whole[site], use_cache=False)
            other = resume(whole[2], whole[site] * 2, use_cache=False)
            assert torch.equal(loaded.model(IDS).logits, truth), "only its own call changes anything"
        logits = parts.family.logits(parts, parts.head(same))
        torch.testing.assert_close(logits, truth, atol=5e-4, rtol=1e-4)
        with Edit(parts, at={site: lambda added: added * 2}):
            doubled = loaded.model(IDS).logits
        torch.testing.assert_close(parts.family.logits(parts, parts.head(other)), doubled, atol=5e-4, rtol=1e-4)


def test_edits_at_residual_sites_and_their_order(tiny, unchanged):
    parts = unchanged(tiny.model) and tiny.anatomy
    ids = IDS % parts.vocabulary
    noise = torch.randn(1, ids.shape[1], parts.width, generator=torch.Generator().manual_seed(1))
    with Capture(parts, [0, 3]) as capture:
        truth = tiny.model(ids).logits
    with Capture(parts, [0, 3]) as first, Edit(parts, at={0: lambda value: value + noise}):
        noisy = tiny.model(ids).logits
    assert torch.equal(first[0], capture[0] + noise), "a Capture reads what an Edit left, also at the embedding"
    embedded = parts.embedding(ids) + noise
    torch.testing.assert_close(tiny.model(inputs_embeds=embedded).logits, noisy)
    with Edit(parts, at={3: lambda _: capture[3], 0: lambda value: value + noise}):
        torch.testing.assert_close(tiny.model(ids).logits, truth)
    with (
        Edit(parts, replace={2: lambda _, after: after * 2}, at={3: lambda value: value + 1}),
        Capture(parts, [3]) as c,
    ):
        tiny.model(ids)
    assert torch.equal(c[3], capture[3] * 2 + 1)
    with Edit(parts, at={0: lambda value: value * 0, "mlp:0": lambda value: value * 0}), Resume(parts, 0) as resume:
        given = resume(capture[0], use_cache=False)
    with Edit(parts, at={"mlp:0": lambda value: value * 0}):
        expected = tiny.model(ids).logits
    torch.testing.assert_close(tiny.model.lm_head(given), expected), "a residual that is given is not edited"


def test_gradients_reach_the_sites(tiny):
    parts, kept = tiny.anatomy, {}

    def leaf(site):
        def function(value):
            kept[site] = torch.zeros_like(value, requires_grad=True)
            return value + kept[site]

        return function

    sites = [0, "attention:1", "mlp:1", 4]
    with torch.enable_grad(), Edit(parts, at={site: leaf(site) for site in sites}):
        tiny.model(IDS % parts.vocabulary).logits[0, -1, 5].backward()
    assert all(kept[site].grad.abs().max() > 0 for site in sites)
    assert open_hooks(tiny.model) == []


def test_a_component_fails_in_the_middle_and_the_model_comes_back(loaded, unchanged):
    unchanged(loaded.model)
    truth = loaded.model(IDS).logits

    def fail(*_):
        raise RuntimeError("in the middle")

    for context in (
        lambda: Edit(loaded.model, at={"attention:1": fail}),
        lambda: Capture(loaded.model, ["mlp:1"], reduce=fail),
    ):
        with pytest.raises(RuntimeError, match="in the middle"), context():
            loaded.model(IDS)
    with pytest.raises(RuntimeError), Resume(loaded.model, "mlp:1") as resume, Edit(loaded.model, at={"mlp:2": fail}):
        resume(torch.zeros(1, 3, 32), torch.zeros(1, 3, 32), use_cache=False)
    assert open_hooks(loaded.model) == []
    assert torch.equal(loaded.model(IDS).logits, truth)


def test_sites_have_names(tiny):
    parts = tiny.anatomy
    assert check_site(parts, "embedding") == check_site(parts, "residual:0") == 0
    assert check_site(parts, "attention:3") == Component("attention", 3)
    assert str(Component("mlp", 2)) == "mlp:2"
    for wrong in ("attention", "attention:", "attention:-1", "mlp:x", "head:3", "5", "", "mlp:٣"):
        with pytest.raises(InputError, match=r"does not exist: this model has sites .* Give its number, or the name"):
            check_site(parts, wrong)
    for wrong in ("attention:5", "mlp:99", Component("mlp", 5), Component("head", 1), Component("mlp", True)):
        with pytest.raises(InputError, match=r"does not exist: this model has attention:N and mlp:N of layers 0\.\.4"):
            check_site(parts, wrong)
    with pytest.raises(InputError, match=r"residual site 6 does not exist: this model has sites 0\.\.5"):
        check_site(parts, "residual:6")
    with Capture(parts, ["mlp:1"]) as capture, pytest.raises(InputError, match=r"site mlp:1 has not been reached"):
        _ = capture["mlp:1"]
    with pytest.raises(InputError, match="distinct"):
        Capture(parts, ["mlp:1", Component("mlp", 1)])
    with Resume(parts, "mlp:1") as resume, pytest.raises(InputError, match="and what the component adds"):
        resume(torch.zeros(1, 2, parts.width))
    with Resume(parts, 1) as resume, pytest.raises(InputError, match="takes the residual alone"):
        resume(torch.zeros(1, 2, parts.width), torch.zeros(1, 2, parts.width))
    with pytest.raises(InputError, match="one by one up to a residual site"):
        Stop(parts, "mlp:1").direct(torch.zeros(1, 2, parts.width))


def test_a_family_whose_branches_are_not_known_is_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11)).eval()
    with pytest.raises(InputError, match=r"what the layers of a 'gpt2' model add to the stream is not known"):
        Capture(model, ["attention:0"])


def test_a_layer_without_its_named_branch_is_refused(tiny, monkeypatch):
    from dataclasses import replace

    from probekit.models.family import Branches

    parts = replace(tiny.anatomy, family=replace(tiny.anatomy.family, branches=Branches("attn", "mlp")), sizes=None)
    with (
        pytest.raises(InputError, match=r"layer 0 of this 'llama' model has no 'attn'"),
        Capture(parts, ["attention:0"]),
    ):
        pass
    assert open_hooks(tiny.model) == []
