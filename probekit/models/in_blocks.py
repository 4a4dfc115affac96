"""A map of rows in blocks of one size: the same kernel, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class InBlocks:
    """A function of rows, called with `rows` of them at a time.

    The last block is filled up, and every block is copied into memory of its own: a product's last bits may depend on
    its size and on where its rows lie. Attributes are those of the function.

    function: (rows, 1, width) -> (rows, 1, out).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], rows: int) -> None:
        self._function, self._rows = function, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_function"], name)

    def __call__(self, states: Tensor) -> Tensor:
        """(..., width) -> (..., out)."""
        found = []
        for block in states.reshape(-1, 1, states.shape[-1]).split(self._rows):
            whole = block.new_empty(self._rows, *block.shape[1:])
            whole[: len(block)] = block
            whole[len(block) :] = block[-1]
            found.append(self._function(whole)[: len(block)])
        return torch.cat(found).reshape(*states.shape[:-1], -1)
