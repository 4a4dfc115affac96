"""The head in bfloat16, to prove that a token leads: half the bytes, and a bound on how far each product may lie off.

With x~ and w~ for x and w rounded to bfloat16 (each product of two is exact in float32):

    x.w - x~.w~ = (x - x~).w~ + x.(w - w~), at most |x - x~| |w~| + |x| |w - w~| (Cauchy and Schwarz),

to which come the rounding of the sum and of the result. A row whose own token leads the largest other product by more
than all of that agrees in any arithmetic, and needs no product in float32. The others are told nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probekit.lens.reductions import block_maxima

SLACK = 1.01  # on every bound, for the rounding of the bounds themselves
GAIN = 1.5  # products in bfloat16 must be so many times as fast, or they are not worth their memory
SMALLEST_HEAD = 2**20  # numbers in a head that is worth the trouble
_OUT = torch.finfo(torch.bfloat16).eps / 2


@dataclass(frozen=True, eq=False)
class Bf16Bound:
    """A head, rounded. weight: (vocabulary, width), bfloat16.

    longest: largest norm of a row before rounding; apart: largest norm of what rounding took from a row.
    rounding: of a float32 sum of that length, relative to |x| |w|. buffer: (rows, vocabulary), bfloat16.
    """

    weight: Tensor
    longest: float
    apart: float
    rounding: float
    buffer: Tensor

    @classmethod
    def of(cls, weight: Tensor, longest: float, rounding: float, rows: int) -> Bf16Bound:
        rounded = torch.empty_like(weight, dtype=torch.bfloat16)
        apart = 0.0
        for here, there in zip(weight.split(4096), rounded.split(4096), strict=True):
            there.copy_(here)
            apart = max(apart, float(torch.linalg.vector_norm(here - there.float(), dim=-1).max()))
        return cls(rounded, longest, apart, rounding, rounded.new_empty(rows, len(weight)))

    def products(self, states: Tensor) -> Tensor:
        """(rows, width) -> (rows, vocabulary), bfloat16."""
        return torch.mm(states.to(torch.bfloat16), self.weight.T, out=self.buffer[: len(states)])

    def error(self, states: Tensor) -> Tensor:
        """(rows,): how far any product may lie off before its last rounding. states: (rows, width), float32."""
        rounded = states.to(torch.bfloat16).float()
        norm = torch.linalg.vector_norm(states, dim=-1)
        lost = torch.linalg.vector_norm(states - rounded, dim=-1)
        reach = self.longest + self.apart
        summed = 2 * self.rounding * (norm + lost) * reach
        return SLACK * (lost * reach + norm * self.apart + summed)

    def leads(self, states: Tensor, token: Tensor, own: Tensor, needed: Tensor) -> Tensor:
        """(rows,) bool: the token's logit exceeds every other one by more than `needed`, whatever the rounding.

        states: (rows, width), float32; token: (rows,), its ids; own: (rows,), its logits; needed: (rows,).
        Rows with numbers that are not finite never do.
        """
        products = self.products(states)
        products.scatter_(-1, token[:, None], -torch.inf)
        other = block_maxima(products).amax(-1).float()
        return own - (other + SLACK * _OUT * other.abs()) - self.error(states) > needed

    def holds(self, states: Tensor, logits: Tensor) -> bool:
        """Whether the products of these rows lie within the bound. logits: theirs in float32."""
        products = self.products(states).float()
        allowed = self.error(states)[:, None] + SLACK * _OUT * products.abs()
        return bool(((products - logits).abs() <= allowed).all())


def worthwhile(weight: Tensor) -> bool:
    """Whether a screen could help at all: a large float32 head on the CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST_HEAD


def bf16_bytes(vocabulary: int, width: int, rows: int) -> int:
    """Most bytes that a screen of `rows` rows takes: the head, the products, and what `holds` compares, 16 rows."""
    return 2 * vocabulary * width + (2 * rows + 20 * 16) * vocabulary + 12 * 4096 * width
