"""RMS norm of float32 states on a CPU in few steps.

torch composes its `rms_norm` there of nine operations, and for a few rows each costs more than its numbers do: 7 us for
128 of them, where four operations take 3.5 and two, for a single row, 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FEW = 2**14  # numbers, up to which steps cost more than they do


def rms_norm(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, as `torch.rms_norm`: a function of (.., width).

    A few rows on a CPU may differ from torch's in their last bits; everything else is torch's own.
    """
    width = weight.numel()
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not epsilon > 0:
        return lambda inputs: torch.rms_norm(inputs, (width,), weight, epsilon)
    nothing, root, added = torch.zeros(()), width**0.5, width * epsilon  # |x|^2 + added is `width` times the square
    grown, added_root = weight * root, torch.tensor(added**0.5)

    def few_steps(inputs: Tensor) -> Tensor:
        numbers = inputs.numel()
        if numbers > FEW:
            return torch.rms_norm(inputs, (width,), weight, epsilon)
        if numbers == width:
            flat = inputs.reshape(width)
            return torch.addcmul(nothing, inputs, weight, value=root * (float(torch.dot(flat, flat)) + added) ** -0.5)
        length = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        return (inputs * grown).div_(torch.hypot(length, added_root))

    return few_steps
