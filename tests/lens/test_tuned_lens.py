"""Tuned-lens checkpoints: what the public format's own modules say, round trips, and what is refused."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.lens.exit_heads import ExitHead, load_heads, save_tuned_lens
from probekit.lens.lens import Lens
from probekit.lens.tuned_lens import read_tuned_lens
from probekit.tracing.tracer import trace

IDS = torch.tensor([[5, 9, 17, 3, 44]])


@pytest.fixture
def published(tiny, tmp_path):
    """As the package writes one: a ModuleList of linear layers, one for each of h[0]..h[L-1]; and the layers."""
    torch.manual_seed(0)
    width, depth = tiny.anatomy.width, tiny.depth
    layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
    torch.save(layers.state_dict(), tmp_path / "params.pt")
    config = {"base_model_name_or_path": "tiny", "d_model": width, "num_hidden_layers": depth, "bias": True,
              "base_model_revision": None, "unembed_hash": None, "lens_type": "linear_tuned_lens"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, layers


def change(folder, **more):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@torch.no_grad()
def test_it_says_what_the_formula_says(tiny, published):
    """head(norm(h + W h + b)), spelled out on the model's own modules."""
    folder, layers = published
    lens = Lens(tiny.anatomy, heads=load_heads(folder, tiny.anatomy))
    with Capture(tiny.model, [1, 3]) as capture:
        tiny.model(IDS)
        for layer in (1, 3):
            h = capture[layer]
            expected = tiny.model.lm_head(tiny.model.model.norm(h + layers[layer](h)))
            torch.testing.assert_close(lens(h, layer), expected.float(), atol=1e-4, rtol=1e-4)


def test_a_trace_reads_and_drafts_through_one(tiny, published, tmp_path):
    run = trace(tiny, [[1, 2, 3]], max_new_tokens=6, exit_heads=published[0])
    assert run.manifest.settings.exit_heads is not None
    plain = trace(tiny, [[1, 2, 3]], max_new_tokens=6)
    assert (run.values(0, "argmax")[1:-1] != plain.values(0, "argmax")[1:-1]).any()
    assert (run.values(0, "argmax")[-1] == plain.values(0, "argmax")[-1]).all()


def test_round_trip(tiny, tmp_path):
    width = tiny.anatomy.width
    heads = {layer: ExitHead(torch.randn(width, width), torch.randn(width)) for layer in (1, 4)}
    folder = save_tuned_lens(tmp_path / "lens", heads, tiny.anatomy, "tiny")
    again = load_heads(folder, tiny.anatomy)
    assert sorted(again) == [1, 2, 3, 4] and not again[2].change.any()
    for layer, head in heads.items():
        assert torch.equal(again[layer].change, head.change) and torch.equal(again[layer].offset, head.offset)
    modules = nn.ModuleList(nn.Linear(width, width) for _ in range(tiny.depth))  # as the package loads it
    modules.load_state_dict(torch.load(folder / "params.pt", weights_only=True))
    assert torch.equal(modules[4].weight, heads[4].change)
    assert json.loads((folder / "config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_without_a_bias_and_in_half_precision(published):
    folder, layers = published
    torch.save({name: each.half() for name, each in layers.state_dict().items() if "weight" in name},
               folder / "params.pt")  # fmt: skip
    change(folder, bias=False)
    found = read_tuned_lens(folder)
    assert found[2].weight.dtype == torch.float32 and not found[2].bias.any()


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_what_is_refused(tiny, tiny_tied, published):
    folder, _ = published
    with pytest.raises(InputError, match="a lens of 5 layers; this model has 6"):
        load_heads(folder, tiny_tied.anatomy)
    change(folder, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"promises: '4\.bias'"):
        read_tuned_lens(folder)
    change(folder, num_hidden_layers=5, d_model=7)
    with pytest.raises(InputError, match=r"expected \(7,\)"):
        read_tuned_lens(folder)
    change(folder, d_model=tiny.anatomy.width, lens_type="mlp")
    with pytest.raises(InputError, match="of type 'mlp'"):
        read_tuned_lens(folder)
    change(folder, lens_type="linear_tuned_lens", num_hidden_layers="5")
    with pytest.raises(InputError, match="no d_model"):
        read_tuned_lens(folder)
    change(folder, num_hidden_layers=5)
    for content in (b"", b"no", pickle.dumps(Trap())):
        (folder / "params.pt").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a tuned lens"):
            read_tuned_lens(folder)
    torch.save([1, 2], folder / "params.pt")
    with pytest.raises(InputError, match="is not the lens of 5 layers"):
        read_tuned_lens(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError):
        load_heads(folder, tiny.anatomy)
