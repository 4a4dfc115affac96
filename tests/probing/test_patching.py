"""Patching, ablation and its gradient, held against plain PyTorch hooks on the layers' own modules, run one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import probekit
from probekit.errors import InputError
from probekit.hooks.sites import open_hooks
from probekit.models.loaded import Loaded
from probekit.probing.attribution_patching import attribution_patch
from probekit.probing.patching import patch
from tests.models.test_families import small

CLEAN = [5, 9, 17, 3, 44, 12, 30, 8, 21]
CORRUPTED = [5, 9, 40, 3, 44, 12, 2, 8, 21]
ANSWERS = (7, 11)
# The modules whose output a layer adds, spelled out, and the multiplier; None: the branch's own module
MODULES = {
    "llama": ("self_attn", "mlp", 1.0),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm", 1.0),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", 1.0),
    "gpt_neox": ("attention", "mlp", 1.0),
    "cohere": ("self_attn", "mlp", 1.0),
    "granite": ("self_attn", "mlp", 0.6),
}


def plain(loaded: Loaded, ids, site: str, position: int | None = None, value=None):
    """(last logits, what stands at the site): a run with one raw hook, which may put `value` at a position."""
    parts, name = loaded.anatomy, loaded.anatomy.family.model_type
    kind, layer = site.split(":")[0], int(site.split(":")[1])
    attention, mlp, factor = MODULES[name]
    if kind == "residual":
        module = parts.layers[layer - 1] if layer else parts.layers[0]
        factor = 1.0
    else:
        module = parts.layers[layer].get_submodule(attention if kind == "attention" else mlp)
    seen = []

    def put(tensor):
        seen.append(tensor.detach().clone() * factor)
        if value is not None:
            tensor = tensor.clone()
            tensor[0, position] = value / factor
        return tensor

    def after(_, __, output):
        return (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)

    if kind == "residual" and layer == 0:
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: (
                ((put(args[0]), *args[1:]), kwargs)
                if args
                else (args, kwargs | {"hidden_states": put(kwargs["hidden_states"])})
            ),
            with_kwargs=True,
        )
    else:
        handle = module.register_forward_hook(after)
    try:
        with torch.no_grad():
            return loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1], seen[0][0]
    finally:
        handle.remove()


SITES = ["residual:0", "residual:2", "residual:5", "attention:0", "attention:3", "mlp:1", "mlp:4"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_sweep_equals_plain_hooks_one_by_one(name, unchanged):
    loaded = small(name)
    unchanged(loaded.model)
    found = patch(loaded, CLEAN, CORRUPTED, SITES, [2, 5, -1], answers=ANSWERS, batch_size=2)
    assert found.positions == (2, 5, 8)
    clean = plain(loaded, CLEAN, "residual:0")[0].double().log_softmax(-1)
    assert open_hooks(loaded.model) == []
    for row, site in enumerate(SITES):
        values = plain(loaded, CLEAN, site)[1]
        for column, position in enumerate(found.positions):
            logits = plain(loaded, CORRUPTED, site, position, values[position])[0]
            expected = float(logits[7] - logits[11])
            assert found.patched.difference[row, column] == pytest.approx(expected, abs=5e-4, rel=1e-4)
            scores = logits.double().log_softmax(-1)
            kl = float((clean.exp() * (clean - scores)).sum())
            assert found.patched.kl[row, column] == pytest.approx(kl, abs=2e-4, rel=1e-3)
            assert found.patched.agrees[row, column] == (logits.argmax() == clean.argmax())
    assert found.clean.kl == 0
    assert np.abs(found.patched.difference - found.base.difference).max() > 1e-2


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_ablations_equal_plain_hooks(how, unchanged):
    loaded = small("gemma2")
    unchanged(loaded.model)
    others = {"zero": None, "mean": [CORRUPTED, CORRUPTED[2:]], "resample": [CORRUPTED, CORRUPTED[::-1]]}[how]
    found = patch(loaded, CLEAN, others, SITES, [1, 4], how=how, answers=ANSWERS, exits=())
    assert found.restored is None
    for row, site in enumerate(SITES):
        for column, position in enumerate((1, 4)):
            if how == "zero":
                values = [torch.zeros(loaded.anatomy.width)]
            elif how == "mean":
                values = [torch.cat([plain(loaded, ids, site)[1] for ids in others]).mean(0)]
            else:
                values = [plain(loaded, ids, site)[1][position] for ids in others]
            expected = [plain(loaded, CLEAN, site, position, value)[0] for value in values]
            apart = [abs(float(each[7] - each[11]) - found.patched.difference[row, column]) for each in expected]
            assert min(apart) < 5e-4, "the value of one of the texts"


def test_acceptance_by_exit_is_that_of_the_patched_run(tiny):
    """At an exit before the site nothing changes but the model it is held against."""
    ids, other = [each % 90 for each in CLEAN], [each % 90 for each in CORRUPTED]
    found = patch(tiny, ids, other, ["residual:3", "mlp:3"], [2, 8], exits=[2, 3, 4])
    parts, lens = tiny.anatomy, probekit.Lens(tiny.anatomy)
    with torch.no_grad():
        for row, (site, layer) in enumerate([("residual:3", 3), ("mlp:3", 3)]):
            with probekit.Capture(parts, [site]) as clean:
                tiny.model(torch.tensor([ids]))
            for column, position in enumerate((2, 8)):

                def put(value, clean=clean, site=site, position=position):
                    value = value.clone()
                    value[0, position] = clean[site][0, position]
                    return value

                with probekit.Edit(parts, at={site: put}), probekit.Capture(parts, [2, 3, 4, 5]) as capture:
                    tiny.model(torch.tensor([other]))
                model = lens(capture[5][0, -1], 5)
                for place, exit_layer in enumerate((2, 3, 4)):
                    drafts = lens(capture[exit_layer][0, -1], exit_layer)
                    accepted = float(torch.minimum(drafts.softmax(-1), model.softmax(-1)).sum())
                    assert found.patched.exit_acceptance[row, column, place] == pytest.approx(accepted, abs=1e-5)
                    assert found.patched.exit_agrees[row, column, place] == (drafts.argmax() == model.argmax())
                assert layer == 3


def test_the_gradient_is_the_slope_of_the_exact_patch():
    """In double precision: a patch by a little of the way changes what the gradient says, at every kind of site."""
    for name in ("llama", "cohere", "granite"):
        loaded = small(name)
        loaded.model.double()
        estimated = attribution_patch(loaded, CLEAN, CORRUPTED, SITES, [2, 5], answers=ANSWERS)
        base = plain(loaded, CORRUPTED, "residual:0")[0].double()
        step = 2e-3
        for row, site in enumerate(SITES):
            clean, corrupted = plain(loaded, CLEAN, site)[1], plain(loaded, CORRUPTED, site)[1]
            for column, position in enumerate((2, 5)):
                ends = []
                for sign in (1, -1):
                    value = corrupted[position] + sign * step * (clean - corrupted)[position]
                    ends.append(plain(loaded, CORRUPTED, site, position, value)[0].double())
                slope = float(((ends[0] - ends[1])[7] - (ends[0] - ends[1])[11]) / (2 * step))
                assert estimated.change[row, column] == pytest.approx(slope, abs=1e-2, rel=2e-2)
        assert estimated.base.difference == pytest.approx(float(base[7] - base[11]), abs=1e-4)
        assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_patching_everything_the_last_token_writes_gives_the_clean_run(tiny):
    ids, other = [1, 2, 3, 4], [1, 2, 5, 4]
    found = patch(tiny, ids, other, [tiny.depth], [-1])
    assert found.restored == pytest.approx(1, abs=1e-3)
    assert found.patched.kl[0, 0] == pytest.approx(0, abs=1e-6)
    assert found.patched.agrees.all()
    untouched = patch(tiny, ids, other, [0], [0, 1, 3])
    assert np.abs(untouched.change).max() < 1e-4, "where the texts are equal a patch changes nothing"


def test_a_full_sweep_has_every_site_and_is_shown(tiny):
    found = patch(tiny, "abcd", "abxd")
    assert found.change.shape == (6 + 5 + 5, 4)
    table, exits = found.table(), found.exit_table()
    assert len(table) == 16 * 4
    assert len(exits) == 16 * 4 * 4
    assert table.token.tolist()[:4] == ["a", "b", "x", "d"]
    assert set(table.kind) == {"residual", "attention", "mlp"}
    assert found.to_html().count("<table>") == 3
    assert found.to_json()["answers"] == list(found.answers)
    one = table[(table.site == "mlp:2") & (table.position == 2)].iloc[0]
    assert one.change == pytest.approx(found.change[found.sites.index("mlp:2"), 2])


def test_the_model_comes_back_after_an_exception(tiny, unchanged, monkeypatch):
    unchanged(tiny.model)
    calls = []

    broken = tiny.anatomy.layers[3].mlp
    forward = type(broken).forward

    def fail(self, *given):
        if self is broken:
            calls.append(1)
            raise RuntimeError("in the middle")
        return forward(self, *given)

    monkeypatch.setattr(type(broken), "forward", fail)
    for run in (patch, attribution_patch):
        with pytest.raises(RuntimeError, match="in the middle"):
            run(tiny, "abcd", "abxd")
        assert open_hooks(tiny.model) == []
    assert calls
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("abcd", "abc"), {}, "the clean text has 4 tokens and the corrupted one 3"),
        (("abcd",), {}, "'patch' needs a corrupted text"),
        (("abcd", "abxd"), {"how": "zero"}, "'zero' takes no corrupted text"),
        (("abcd",), {"how": "mean"}, "'mean' needs one or more"),
        (("abcd", ["abxd", "abyd"]), {}, "takes one corrupted text, not 2"),
        (("abcd", "abxd"), {"how": "noise"}, "there is no intervention 'noise'"),
        (("abcd", "abxd", ["head:1"]), {}, "does not exist"),
        (("abcd", "abxd", []), {}, "no site to patch"),
        (("abcd", "abxd", None, [4]), {}, r"position 4 does not exist: the text has positions 0\.\.3"),
        (("abcd", "abxd", None, []), {}, "no position to patch"),
        (("abcd", "abxd"), {"answers": ["ab", "c"]}, "is 2 tokens; expected one"),
        (("abcd", "abxd"), {"answers": ["a", "a"]}, "both answers are the token"),
        (("abcd", "abxd"), {"answers": ["a"]}, "answers are two tokens"),
        (("abcd", "abxd"), {"answers": [1, 97]}, "is no token"),
        (("abcd", "abxd"), {"exits": [0]}, "exit layer 0 is out of range"),
        (("abcd", "abxd"), {"batch_size": 0}, "batch_size is 0"),
        (("", "abxd"), {}, "the clean text has no tokens"),
        (([1, 2, 99], "abc"), {}, "has the token 99"),
    ],
)
def test_what_cannot_be_patched_is_said(tiny, arguments, settings, message):
    with pytest.raises(InputError, match=message):
        patch(tiny, *arguments, **settings)


def test_a_model_in_training_is_refused(tiny):
    tiny.model.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            patch(tiny, "abcd", "abxd")
    finally:
        tiny.model.eval()
