"""The lens on a pretended CUDA device: what its products are, who reduces its logits, and when the host waits."""

from __future__ import annotations

import pytest
import torch
from gpu.pretend import LOG

from probekit.lens import chunked
from probekit.lens.chunked import StatisticsPlan, layer_statistics
from probekit.lens.lens import Lens, head_logits
from probekit.models.synthetic import Shape, synthetic

SHAPE = Shape(4, 32, 48, 4, 2, 300, 256, 8)


def read(loaded, rows=7):
    generator = torch.Generator().manual_seed(1)
    residuals = torch.randn(SHAPE.layers + 1, rows, SHAPE.width, generator=generator).to(loaded.dtype)
    ids = torch.randint(0, SHAPE.vocabulary, (2, rows), generator=generator)
    return [each.to(loaded.device) for each in (residuals, *ids)]


def warm(logits):
    return (logits / 0.7).log_softmax(-1)


@pytest.mark.second
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, on infinities as planned
@pytest.mark.parametrize("plan", [{}, {"warp": warm, "rounded_dtype": torch.bfloat16, "top": 3, "noise": 0.1}])
def test_the_kernel_reduces_and_the_host_hardly_waits(kernel, cuda, monkeypatch, plan):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 2**14, "else": 2**14})
    plan = StatisticsPlan(chunk_rows=2, **plan)
    mine, theirs = synthetic(SHAPE, device=cuda), synthetic(SHAPE)
    LOG.clear()
    found = layer_statistics(mine.anatomy, *read(mine), plan)
    assert len(kernel) >= 4  # chunks of 7 tokens
    assert LOG.count("wait", "to host") <= 2 * len(kernel)  # is it finite? one question a chunk
    with torch.utils._python_dispatch._disable_current_modes():
        expected = layer_statistics(theirs.anatomy, *read(theirs), plan)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name].elem, values, rtol=2e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_head_is_one_product_that_leaves_float32(cuda, dtype):
    """Widened weights would go without tensor cores."""
    loaded = synthetic(SHAPE, dtype=dtype, device=cuda)
    states = Lens(loaded.anatomy).states(read(loaded)[0][2], 2)
    LOG.clear()
    logits = head_logits(loaded.anatomy, states)
    work = {name: number for (kind, name, _), number in LOG.calls.items() if kind == "kernel"}
    assert work.pop("mm") == 1
    assert not work.keys() - {"empty", "new_empty", "copy_"}
    assert logits.dtype == torch.float32
    expected = states.elem.float() @ loaded.anatomy.head.weight.elem.float().T
    torch.testing.assert_close(logits.elem, expected, rtol=1e-5, atol=1e-5)
