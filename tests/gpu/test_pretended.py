"""The tensors, syncs and layouts of a CUDA device, without one: what would raise there raises here."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from gpu.pretend import LOG

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.device_decoding import on_engine
from probekit.decoding.self_check import check_engine
from probekit.decoding.speculative import SelfSpeculative
from probekit.models.memory import free_bytes
from probekit.models.synthetic import Shape, synthetic
from probekit.settings import Sampling

SHAPE = Shape(4, 32, 48, 4, 2, 64, 256, 8)
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9] * 20]
SAMPLED = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)
GREEDY_FIRST = pytest.mark.parametrize(
    "sampling", [Sampling(), pytest.param(SAMPLED, marks=pytest.mark.second)], ids=["greedy", "sampled"]
)
MOVES = ("wait", "to host", "to device")


def model(device="cpu", dtype="float32"):
    return synthetic(SHAPE, dtype=dtype, device=device, exit_layer=1, dial=0.3)


def ways(loaded):
    return {"plain": Autoregressive(loaded), "self": SelfSpeculative(loaded, 1, 3)}


@GREEDY_FIRST
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_runs_whole(cuda, rows, dtype, sampling):
    """No tensor of the host meets one of the device, no layout is taken for granted; float32 gives the same tokens."""
    loaded = model(cuda, dtype)
    check_engine(loaded)  # which runs transformers' own attention too
    LOG.clear()
    found = {
        name: way.decode(PROMPTS[:rows], max_new_tokens=12, sampling=sampling) for name, way in ways(loaded).items()
    }
    assert {kernel for kernel, _, _ in LOG.attention} <= {"flash", "efficient"}
    if dtype == "float32":
        expected = {
            name: way.decode(PROMPTS[:rows], max_new_tokens=12, sampling=sampling)
            for name, way in ways(model()).items()
        }
        for name, texts in expected.items():
            assert [text.tokens for text in found[name]] == [text.tokens for text in texts], name


def test_a_mask_goes_to_the_kernel_that_takes_one_and_shapes_are_few(cuda):
    """cuDNN's attention would plan anew for each length: it is never asked, and passes see whole buckets."""
    loaded = model(cuda, "bfloat16")
    check_engine(loaded)
    LOG.clear()
    SelfSpeculative(loaded, 1, 3).decode([[1] * 50], max_new_tokens=30)
    steps = LOG.attention[SHAPE.layers :]  # after the prefill
    assert {(kernel, masked) for kernel, _, masked in steps} == {("efficient", True)}
    assert {keys for _, keys, _ in steps} == {64, 128}
    assert {kernel for kernel, _, _ in LOG.attention[: SHAPE.layers]} == {"flash"}


def test_torchs_settings_come_back(cuda):
    products = torch.backends.cuda.matmul
    before = torch.backends.cuda.cudnn_sdp_enabled(), products.allow_bf16_reduced_precision_reduction
    Autoregressive(model(cuda)).decode(PROMPTS[:1], max_new_tokens=2)
    assert before == (torch.backends.cuda.cudnn_sdp_enabled(), products.allow_bf16_reduced_precision_reduction)
    assert before == (True, True)


def test_products_add_up_in_float32_while_the_model_runs(cuda, monkeypatch):
    """Of every pass and every head, by the host's engine and by recorded rounds."""
    loaded, seen = model(cuda, "bfloat16"), set()
    linear = torch.nn.functional.linear

    def watched(*given):
        seen.add(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
        return linear(*given)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    check_engine(loaded)
    seen.clear()
    for way in ways(loaded).values():
        way.decode(PROMPTS[:1], max_new_tokens=3)
        on_engine(way, "cuda").decode(PROMPTS[:1], max_new_tokens=3)
    assert seen == {False}


def test_memory_that_torch_keeps_for_the_next_array_is_free(cuda):
    """70 GiB of the device's, and one of the two that torch has reserved."""
    assert free_bytes(cuda) == 71 * 2**30


def test_kernels_are_launched_on_the_device_of_their_tensors(cuda, monkeypatch):
    """Triton asks for the present device, which may be another."""
    kernel_language = pytest.importorskip("probekit.models.kernel_language", reason="Triton is not installed")
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    with kernel_language.launched_on(torch.zeros(2, device=cuda)):
        pass
    assert asked == [cuda]


def moves(way, sampling, tokens):
    """Copies and waits of a decode call, and its rounds."""
    LOG.clear()
    (done,) = way.decode(PROMPTS[:1], max_new_tokens=tokens, sampling=sampling)
    return LOG.count("to device"), LOG.count("wait", "to host"), done.rounds


@GREEDY_FIRST
@pytest.mark.parametrize("name", ["plain", "self"])
def test_a_round_sends_nothing_to_the_device_and_reads_once(cuda, name, sampling):
    """More rounds cost no more copies to the device, and one wait each. (The last may be cut by the budget.)"""
    way = ways(model(cuda))[name]
    moves(way, sampling, 4)
    few, many = moves(way, sampling, 10), moves(way, sampling, 30)
    assert many[2] > few[2] + 4
    assert many[0] - few[0] <= 1
    assert many[1] - few[1] == many[2] - few[2]
