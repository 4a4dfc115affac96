"""Files of Jacobian lenses, in the format of the package `jlens` (github.com/anthropics/jacobian-lens; J-lenses of
TransformerLens are the same).

A file that torch.save wrote: {"J": {block: (width, width)}, "n_prompts", "source_layers", "d_model"}, float16 by
default. J of block b moves what that block wrote, h[b + 1] here, to the last residual; a matrix of the last block would
be the identity. The file does not say of which model it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.files import atomic_bytes
from probekit.lens.torch_files import read_tensors

BEGINS = b"PK\x03\x04"
"""The first bytes of what torch.save writes: a zip archive."""
KEYS = ("J", "n_prompts", "source_layers", "d_model")


def read_jacobian_lens(content: bytes, depth: int, width: int, source: str = "this file") -> dict[int, Tensor]:
    """{exit: (width, width), float32 on the CPU}, ascending, for a model of `depth` layers. Only tensors are read.

    Raises InputError for a file that is no Jacobian lens, or not one of such a model.
    """
    state = read_tensors(content, "a Jacobian lens", source)
    found = state.get("J") if isinstance(state, dict) else None
    if not isinstance(found, dict) or not found or not all(map(_is_block, found)):
        raise InputError(f"{source} is no Jacobian lens: it has no matrices under 'J', by block.")
    if beyond := [block for block in found if block not in range(depth)]:
        raise InputError(f"{source} has a matrix of block {beyond[0]}; this model has blocks 0..{depth - 1}.")
    for block, matrix in found.items():
        if not isinstance(matrix, Tensor) or tuple(matrix.shape) != (width, width):
            shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise InputError(f"{source} has {shape} for block {block}; expected a matrix of {width} x {width}.")
    return {block + 1: found[block].float() for block in sorted(found) if block + 1 < depth}


def write_jacobian_lens(path: str | Path, jacobians: Mapping[int, Tensor], texts: int) -> None:
    """Write {exit: (width, width)} as `jlens` does, but in float32, whole or not at all.

    texts: how many they are averages of, which `jlens` weighs lenses by when it merges them.
    """
    blocks = {layer - 1: jacobians[layer].detach().float().cpu() for layer in sorted(jacobians)}
    values: tuple[Any, ...] = (blocks, int(texts), list(blocks), len(next(iter(blocks.values()))))
    buffer = BytesIO()
    torch.save(dict(zip(KEYS, values, strict=True)), buffer)
    atomic_bytes(path, buffer.getvalue())


def _is_block(block: object) -> bool:
    return isinstance(block, int) and not isinstance(block, bool)
