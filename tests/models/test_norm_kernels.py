"""RMS norm in few steps against a slow float64 truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probekit.models.norm_kernels import FEW, rms_norm


def truth(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = inputs.double()
    return weight.double() * x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


@given(
    rows=st.integers(1, 12), width=st.sampled_from([1, 3, 64, 576]), seed=st.integers(0, 999),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 300.0, 1e15]), epsilon=st.sampled_from([1e-12, 1e-5, 2.0]),
)  # fmt: skip
def test_few_and_many_rows_are_the_float64_norm(rows: int, width: int, seed: int, size: float, epsilon: float) -> None:
    drawn = torch.Generator().manual_seed(seed)
    inputs, weight = size * torch.randn(1, rows, width, generator=drawn), torch.randn(width, generator=drawn)
    found = rms_norm(weight, epsilon)(inputs)
    assert found.shape == inputs.shape
    torch.testing.assert_close(found.double(), truth(inputs, weight, epsilon), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_zeros_and_what_is_no_number_come_out_as_torch_has_them(rows: int) -> None:
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for value in (0.0, float("nan"), float("inf"), 1e30):  # 1e30: the square is infinite
        inputs = torch.ones(rows, 4)
        inputs[0, 1] = value
        inputs[0] = inputs[0] if value else 0.0
        expected = torch.rms_norm(inputs, (4,), weight, 1e-5)
        torch.testing.assert_close(rms_norm(weight, 1e-5)(inputs), expected, equal_nan=True)
    flat = torch.zeros(rows, 4)
    assert torch.equal(rms_norm(weight, 0.0)(flat).isnan(), torch.rms_norm(flat, (4,), weight, 0.0).isnan())


def test_a_row_of_several_has_the_same_bits_in_every_place() -> None:
    weight, drawn = torch.rand(128) + 0.5, torch.Generator().manual_seed(3)
    norm, rows = rms_norm(weight, 1e-5), torch.randn(16, 128, generator=drawn)
    found = norm(rows)
    for shift in range(1, 16):
        assert torch.equal(norm(rows.roll(shift, 0)).roll(-shift, 0), found)
    assert torch.equal(norm(rows[:2]), found[:2])


def test_prompts_and_other_types_are_torch_s_own_to_the_bit() -> None:
    drawn = torch.Generator().manual_seed(5)
    weight, many = torch.randn(64, generator=drawn), torch.randn(FEW // 64 + 1, 64, generator=drawn)
    assert torch.equal(rms_norm(weight, 1e-5)(many), torch.rms_norm(many, (64,), weight, 1e-5))
    few = torch.randn(2, 64, generator=drawn).bfloat16()
    assert torch.equal(rms_norm(weight.bfloat16(), 1e-5)(few), torch.rms_norm(few, (64,), weight.bfloat16(), 1e-5))


@pytest.mark.parametrize("given", [torch.randn(2, 3, 128).transpose(0, 1), torch.randn(1, 128, 2)[..., 0][None]])
def test_states_of_any_strides(given: Tensor) -> None:
    weight = torch.randn(128)
    torch.testing.assert_close(rms_norm(weight, 1e-5)(given).double(), truth(given, weight, 1e-5), rtol=2e-6, atol=0)
