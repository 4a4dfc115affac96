"""Linear maps on a CPU, each by the kernel that is quickest for its size: of a few rows, and of many.

The default product (MKL's, in torch 2.13) computes two to four rows one after the other, so that a verification of
three rows costs three steps, and takes a single core for one row. A product with the rows on the right reads the
weights once, on all cores; so does oneDNN, which needs some ten microseconds a call and stays quick up to a dozen rows.
The kernel follows from sizes alone, never from a clock: the same product has the same bits in every run. Sizes were
measured with weights that come from memory, as in a pass through a model: in a loop over one map, whose weights stay in
the caches, other kernels win.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Weights of a map, from which on another kernel than the default was the quicker one for ..
SEVERAL = 2**15  # two to five rows
SINGLE = 2**16  # one row
LARGE = 2**18  # more than five rows, and a few where the map narrows
HUGE = 2**20  # dozens of rows and more
ON_THE_RIGHT = 5  # most rows
MOST_ROWS = 16  # beyond them there is little to win, and prompts would make oneDNN build a kernel for every length


def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """`functional.linear` with these weights, (out, in): a function of (..., in) that returns (..., out)."""
    size, (outputs, width) = weight.numel(), weight.shape
    if bias is not None or weight.device.type != "cpu" or weight.dtype != torch.float32 or size < SEVERAL:
        return lambda inputs: functional.linear(inputs, weight, bias)
    onednn = _onednn() if size >= LARGE else functional.linear
    narrowing = size >= LARGE and width > outputs

    def few_rows(inputs: Tensor) -> Tensor:
        rows = inputs.numel() // width
        if rows > MOST_ROWS or (rows == 1 and size < SINGLE):
            return functional.linear(inputs, weight)
        if rows > ON_THE_RIGHT or (rows > 2 and narrowing):
            return onednn(inputs, weight)
        flat = inputs.reshape(rows, width)
        if rows == 1:  # twice the same: a product with a single vector would run on one core
            flat = torch.cat([flat, flat])
        return torch.mm(weight, flat.t()).t()[:rows].contiguous().view(*inputs.shape[:-1], outputs)

    return few_rows


def many_rows(inputs: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write (rows, in) by (out, in) to `out`, (rows, out), for dozens of rows and more.

    MKL packs the weights anew for every product. With a head of 49,152 x 576 on two cores, 124 rows take it 0.50 ms
    each and 2,048 rows 0.34; oneDNN takes 0.31 for either.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= HUGE:
        out.copy_(_onednn()(inputs, weight))
    else:
        torch.mm(inputs, weight.T, out=out)


def _onednn() -> Callable[[Tensor, Tensor], Tensor]:
    """oneDNN's linear map, by the name that torch's compiler calls it; the default where this build has none."""
    found: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    return functional.linear if found is None else lambda inputs, weight: found(inputs, weight, None, "none", [], "")
