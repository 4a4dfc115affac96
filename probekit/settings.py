"""Settings that travel as values: small frozen dataclasses, checked where they are made. Nothing here needs torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from probekit.errors import InputError


def whole_number(what: str, value: Any, least: int = 1) -> int:
    """Return `value`, or raise InputError where it is no whole number of at least `least`.

    what: how the sentence begins: "the context must be".
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{what} a whole number of at least {least}, not {value!r}.")
    return value


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, and is the default.

    Parameters
    ----------
    temperature: >= 0; logits are divided by it.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: in (0, 1]; keep the fewest most probable tokens whose probabilities sum to at least top_p.
    seed: of the random numbers; prompts differ by their index.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"the temperature must be a number of at least 0, not {self.temperature}.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top-k must be a whole number of at least 0 (0 keeps every token), not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must lie in (0, 1], not {self.top_p}.", "1 keeps every token.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"the seed must be a whole number, not {self.seed!r}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
