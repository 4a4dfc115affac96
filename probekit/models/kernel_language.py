"""What kernels in Triton share: where they are launched, rounding, products. Imported only where Triton is used.

Without a GPU kernels run in Triton's interpreter, when TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 16  # the fewest rows of a matrix that tensor cores multiply


def launched_on(tensor: Tensor) -> AbstractContextManager:
    """The context to launch in: Triton asks for the present device, not for the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def warps(numbers: int) -> int:
    """Of a program that holds so many numbers at once."""
    return max(1, min(16, numbers // 512))


# mypy: disable-error-code="no-untyped-def"
# Triton would read annotations as its own types.
@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 rounded to `dtype` and back, to nearest and to even: bfloat16 by its bits, which Triton's interpreter
    only cuts off."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(dtype).to(tl.float32)


WIDEN = tl.constexpr(not isinstance(round_to, triton.JITFunction))  # the interpreter does not multiply bfloat16


@triton.jit
def product(left, right):
    """left @ right, added up in float32."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")
