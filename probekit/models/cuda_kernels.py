"""Which kernels of a CUDA device compute attention and products: chosen here, not left to torch's own order.

On recent devices torch tries cuDNN's attention first, which plans anew for every shape; flash attention takes what has
no mask, memory-efficient attention what has one, and the plain kernel what neither takes. Products of bfloat16 add up
in float32 throughout. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""Attention kernels in the order in which they are tried; no others are."""


def attention_order() -> list[str]:
    """The names of ATTENTION, for records."""
    return [backend.name for backend in ATTENTION]


@contextmanager
def chosen_kernels(device: torch.device) -> Iterator[None]:
    """Within it, a CUDA device computes attention by ATTENTION and adds up products in float32."""
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    rounded = products.allow_bf16_reduced_precision_reduction
    products.allow_bf16_reduced_precision_reduction = False
    try:
        with sdpa_kernel(list(ATTENTION), set_priority=True):
            yield
    finally:
        products.allow_bf16_reduced_precision_reduction = rounded
