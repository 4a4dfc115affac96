"""How far arithmetic may move two logits of a row against one another, when it is computed alone or among others.

Imports no torch: a trace keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from probekit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """The tolerance of near-ties, by row.

    Parameters
    ----------
    by_site: logits, at each residual site 0..L; or one number for all sites.
    rounding: of a decoder that rounds its logits, relative to them: two as large as x may move by x times this. The
        machine epsilon of its dtype; 0 in float32, in which the lens computes.
    """

    by_site: tuple[float, ...] = (0.0,)
    rounding: float = 0.0

    def __post_init__(self) -> None:
        for value in (*self.by_site, self.rounding):
            if not value >= 0:
                raise InputError(f"the noise of the logits must be at least 0, not {value}.")

    @classmethod
    def of(cls, noise: float | Noise) -> Noise:
        """The same for every row, where it is a number of logits."""
        return noise if isinstance(noise, Noise) else cls((noise,))

    def at(self, depth: int) -> tuple[float, ...]:
        """Of the sites 0..L."""
        known = self.by_site if len(self.by_site) > 1 else self.by_site * (depth + 1)
        if len(known) != depth + 1:
            raise InputError(f"the noise is of {len(known)} sites; expected {depth + 1}, or one number for all.")
        return known

    def around(self, base: Tensor, logits: Tensor) -> Tensor:
        """Tolerances. base: of the rows' sites. logits: those that are as large as the contested ones."""
        return base + self.rounding * logits.abs() if self.rounding else base
