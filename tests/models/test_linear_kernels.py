import pytest
import torch
from torch.nn import functional

from probekit.models import linear_kernels as products
from probekit.models.linear_kernels import many_rows, product

SIZES = [(36, 52), (128, 352), (352, 128), (128, 4096), (576, 576), (1536, 576), (576, 1536)]


def of_size(width, outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(width + outputs)
    weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64) / width**0.5
    inputs = torch.randn(1, 40, width, generator=generator, dtype=torch.float64)
    return weight.to(dtype), inputs.to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 16, 17, 40])
@pytest.mark.parametrize(("width", "outputs"), SIZES)
@torch.inference_mode()
def test_every_kernel_is_as_exact_as_the_default(width, outputs, rows):
    """Against float64: within the bound of any float32 sum of that length (Higham, section 3.1), and far below it."""
    weight, inputs = of_size(width, outputs)
    linear = product(weight)
    inputs = inputs[:, :rows]
    truth = functional.linear(inputs.double(), weight.double())
    found = linear(inputs)
    assert found.shape == (1, rows, outputs)
    assert found.is_contiguous()
    bound = width * 2.0**-24 * functional.linear(inputs.double().abs(), weight.double().abs())
    assert ((found - truth).abs() <= bound).all()
    assert (found - truth).abs().max() < bound.max() / 5
    assert torch.equal(linear(inputs), found)  # the same bits each time
    assert torch.equal(linear(inputs[0]), found[0])
    torch.testing.assert_close(linear(inputs.transpose(0, 1))[:, 0], found[0])


@torch.inference_mode()
def test_rows_among_others_are_the_rows_alone():
    """So that a verification judges by the logits of an autoregressive step, but for rounding."""
    weight, inputs = of_size(576, 1536)
    linear = product(weight)
    for rows in (2, 3, 5, 9):
        alone = torch.cat([linear(inputs[:, at : at + 1]) for at in range(rows)], 1)
        torch.testing.assert_close(linear(inputs[:, :rows]), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 7])
@torch.inference_mode()
def test_without_onednn_the_default_takes_its_place(monkeypatch, rows):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products._onednn() is functional.linear
    weight, inputs = of_size(1536, 576)
    torch.testing.assert_close(product(weight)(inputs[:, :rows]), functional.linear(inputs[:, :rows], weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.inference_mode()
def test_other_types_and_maps_with_a_bias_are_the_default(dtype):
    weight, inputs = of_size(576, 576, dtype)
    assert torch.equal(product(weight)(inputs[:, :3]), functional.linear(inputs[:, :3], weight))
    bias = weight[:, 0].clone()
    assert torch.equal(product(weight, bias)(inputs[:, :3]), functional.linear(inputs[:, :3], weight, bias))


@pytest.mark.parametrize(("width", "outputs"), [(36, 52), (512, 2048)])
@torch.inference_mode()
def test_many_rows_fill_a_part_of_a_buffer(width, outputs):
    """Beside oneDNN's size, and from it on: as exact as float32 sums are, and nothing else is written."""
    weight, inputs = of_size(width, outputs)
    assert (weight.numel() >= products.HUGE) == (width == 512)
    buffer = torch.full((40, outputs + 7), 3.0)
    many_rows(inputs[0], weight, buffer[:, 5:-2])
    truth = inputs[0].double() @ weight.double().T
    bound = width * 2.0**-24 * (inputs[0].double().abs() @ weight.double().abs().T)
    assert ((buffer[:, 5:-2] - truth).abs() <= bound).all()
    assert (buffer[:, :5] == 3).all()
    assert (buffer[:, -2:] == 3).all()
