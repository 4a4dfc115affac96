"""A model larger than its device, dealt out over memory and disk: the trace and the text of the whole one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import probekit
from probekit.errors import InputError, ResourceError
from probekit.models.device_map import DeviceMap, dealing_out, dealt_out
from probekit.models.reference import find_checkpoint

TEXTS = ["Once upon a time", "The king", "A fox and a hen"]
ROOM = {"tales-tied": "auto:cpu=4500KB", "tales-untied": "auto:cpu=7500KB"}  # of 11 and 13 MB


def on_disk(loaded: probekit.Loaded) -> list[str]:
    return [name for name, weight in loaded.model.named_parameters() if weight.device.type == "meta"]


@pytest.fixture(scope="module", params=sorted(ROOM))
def pair(request) -> tuple[probekit.Loaded, probekit.Loaded]:
    """A model in memory, and the same with half of its layers on disk."""
    name = request.param
    return probekit.load(name, device="cpu"), probekit.load(name, device_map=ROOM[name])


def test_layers_lie_on_disk_norm_and_head_do_not(pair) -> None:
    whole, dealt = pair
    there = on_disk(dealt)
    assert any("layers.11." in name for name in there)
    assert all(".layers." in name for name in there)
    assert (dealt.anatomy.tied, dealt.anatomy.parameters) == (whole.anatomy.tied, whole.anatomy.parameters)
    assert dealt.anatomy.bytes == whole.anatomy.bytes
    assert dealt.weights_hash == whole.weights_hash
    assert dealt.anatomy.plain_head
    assert torch.equal(dealt.anatomy.head_rows, whole.anatomy.head_rows)


@pytest.mark.parametrize("statistics", ["all", "agreement"])
def test_the_trace_is_the_same_bit_for_bit(pair, statistics) -> None:
    one, other = (probekit.trace(loaded, TEXTS, max_new_tokens=5, statistics=statistics) for loaded in pair)
    for table in ("texts", "tokens", "layers"):
        mine, theirs = getattr(one, table), getattr(other, table)
        assert list(mine.columns) == list(theirs.columns)
        for column in mine.columns:
            assert np.array_equal(
                mine[column].to_numpy(), theirs[column].to_numpy(), equal_nan=mine[column].dtype.kind == "f"
            ), column
    assert one.manifest.but(timings={}) == other.manifest.but(timings={})


@pytest.mark.parametrize("way", [{}, {"method": "self-speculative", "exit_layer": 4, "draft_length": 3}])
def test_decoding_is_the_same_round_by_round(pair, way) -> None:
    one, other = (probekit.decode(loaded, TEXTS[0], max_new_tokens=5, **way) for loaded in pair)
    assert (one.tokens, one.drafted, one.accepted) == (other.tokens, other.drafted, other.accepted)
    sampled = [
        probekit.decode(loaded, TEXTS[0], max_new_tokens=5, sampling=probekit.Sampling(0.8, seed=3), **way)
        for loaded in pair
    ]
    assert sampled[0].tokens == sampled[1].tokens
    assert pair[1].model.model.layers[11].mlp.down_proj.weight.device.type == "meta"  # and lies there again


def test_what_fits_is_loaded_as_ever() -> None:
    loaded = probekit.load("tales-tied", device_map="auto")
    assert on_disk(loaded) == []
    assert not hasattr(loaded.model.model.layers[0], "_hf_hook")
    folder = find_checkpoint("tales-untied").folder
    assert dealt_out(DeviceMap({"cpu": 10**9}), folder, torch.float32) == {"": "cpu"}


def test_lower_precision_halves_what_is_on_disk() -> None:
    found = probekit.load("tales-untied", device_map="auto:cpu=7500KB", dtype="bfloat16")
    assert 0 < len(on_disk(found)) < len(on_disk(probekit.load("tales-untied", device_map="auto:cpu=7500KB")))
    whole = probekit.load("tales-untied", device="cpu", dtype="bfloat16")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(found.model(ids).logits, whole.model(ids).logits)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("balanced", "auto is the one that there is"), ("auto:", "auto is the one"), ("auto:cpu", "no device with its"),
        ("auto:cpu=5", "no device with its memory"), ("auto:disk=5GB", "no device with"),
        ("auto:77=5GB", "names GPU 77"),
    ],
)  # fmt: skip
def test_wrong_maps_are_refused(text, said) -> None:
    with pytest.raises(InputError, match=said):
        probekit.load("tales-tied", device_map=text)
    with pytest.raises(InputError, match=said), dealing_out(text):
        pass


def test_what_cannot_be_dealt_out_is_said(tmp_path) -> None:
    with pytest.raises(ResourceError, match=r"norm and head of this model take .* bytes, more than the 1,000"):
        probekit.load("tales-tied", device_map="auto:cpu=1KB")
    with pytest.raises(InputError, match="both say where the model lies"):
        probekit.load("tales-tied", device="cpu", device_map="auto")


def test_a_command_deals_out_every_model_that_it_loads(capsys) -> None:
    from probekit.cli.app import run

    words = ["decode", "tales-tied", "The king", "--max-new-tokens", "6", "--json"]
    assert run([*words, "--device-map", ROOM["tales-tied"]]) == 0
    dealt = capsys.readouterr().out
    assert run([*words, "--device", "cpu"]) == 0
    import json

    assert json.loads(dealt)["text"] == json.loads(capsys.readouterr().out)["text"]
    assert run([*words, "--device-map", "everywhere"]) == 2
    assert "auto is the one that there is" in json.loads(capsys.readouterr().out)["error"]
