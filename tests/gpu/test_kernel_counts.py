"""How many kernels a step launches at the shapes of real models, counted on a CUDA device that has shapes only."""

from __future__ import annotations

import pytest
import torch
from gpu.fake import faked, launches, llama

from probekit.decoding.device_round import DeviceEngine
from probekit.hooks.fused_layers import copied_bytes
from probekit.models.anatomy import anatomy
from probekit.models.synthetic import SHAPES
from probekit.settings import Sampling

GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.8, top_k=50, top_p=0.9)
SMALL = ("norm", "add_norm", "rotate_and_write", "attend_in_splits", "put_together", "activate")


def a_layer(fused, **setting):
    """Kernels that each further layer adds to an autoregressive step."""
    return (launches(fused, layers=16, **setting).number - launches(fused, layers=8, **setting).number) / 8


@pytest.fixture(autouse=True)
def _device(device_guard):
    with faked():
        yield


@pytest.mark.parametrize(
    ("dtype", "visible"), [(torch.bfloat16, 128), pytest.param(torch.float32, 8192, marks=pytest.mark.second)]
)
def test_at_most_twelve_kernels_a_layer(dtype, visible):
    """Ten: six small ones and four products; twelve is what 80 % of the bandwidth leaves room for."""
    found = a_layer(True, dtype=dtype, visible=visible)
    assert found == 10 <= 12
    whole = launches(True, dtype=dtype, visible=visible)
    assert whole.number / SHAPES["llama-3-8b"].layers <= 12  # the head, and what the round decides, with it
    assert not whole.waits and whole.copies == 1  # of the log
    layers = SHAPES["llama-3-8b"].layers
    small = {name: whole.of(name) for name in SMALL}
    assert small == {
        "norm": 1, "add_norm": 2 * layers, "rotate_and_write": layers, "attend_in_splits": layers,
        "put_together": layers, "activate": layers,
    }  # fmt: skip
    assert whole.of("best_in_blocks") == whole.of("best_of_blocks") == 1 and whole.of("argmax") == 0


def test_the_models_own_layers_take_three_times_as_many():
    """The slow truth, which every other family keeps."""
    found = a_layer(False)
    assert 25 <= found <= 40
    assert launches(False).number > 900 > 400 > launches(True).number


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.second)])
def test_a_round_of_drafts_waits_for_nothing(rows, sampling):
    """Four drafts: five early passes of E layers, four heads, a late pass and its head."""
    found = launches(True, draft_length=4, rows=rows, sampling=sampling)
    assert not found.waits
    early = SHAPES["llama-3-8b"].layers // 8
    assert found.of("attend_in_splits") == 5 * early + SHAPES["llama-3-8b"].layers - early
    assert found.of("best_in_blocks") == (5 if sampling.greedy else 0)


def test_the_copies_of_weights_are_what_they_say():
    """Query, key and value, gate and up: 9.1 GB of an 8B shape's 16."""
    parts = anatomy(llama("llama-3-8b", torch.bfloat16))
    made = DeviceEngine(parts, 1, 64, fused=True).fused
    assert sum(each.numel() * each.element_size() for each, _ in made._sources) == copied_bytes(parts)
    assert copied_bytes(parts) == pytest.approx(9.1e9, rel=0.01)
