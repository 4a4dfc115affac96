"""What a chosen way of drafting lost to the fastest of all that were run: what the analyses of regret share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from benchmarking import QUANTILES

from probekit.prediction.intervals import drawn_indices, spread

RESAMPLES = 1000


def regret_of(seconds: np.ndarray, noise_95: float, mine: int, names: Sequence[Any], kind: str) -> dict[str, Any]:
    """seconds: (ways, prompts) of decoding, plain decoding the first. mine: the place of the chosen way. names: of the
    ways. kind: what a record calls them."""
    total = seconds.sum(axis=1)
    best = int(total.argmin())
    drawn = seconds[:, drawn_indices(seconds.shape[1], RESAMPLES)].sum(axis=-1)  # (ways, draws)
    held = halves(seconds, mine)
    return {
        "prompts": seconds.shape[1],
        kind: len(seconds) - 1,
        "chosen": names[mine],
        "chosen_speedup": total[0] / total[mine],
        "chosen_speedup_interval": [float(end) for end in spread(drawn[0] / drawn[mine])],
        "chosen_rank": int((total < total[mine]).sum()) + 1,
        "best": names[best],
        "best_speedup": total[0] / total[best],
        "regret": 1 - total[best] / total[mine],
        "regret_interval": [float(end) for end in spread(1 - drawn[best] / drawn[mine])],
        "regret_held_out": float(np.mean(held)),
        "regret_held_out_quantiles": np.quantile(held, QUANTILES).tolist(),
        "noise_95": noise_95,
        f"{kind}_within_noise_of_the_best": int((total <= total[best] * (1 + noise_95)).sum()),
    }


def noise(twice: np.ndarray) -> float:
    """How far one method, (2, prompts), is from itself in 95 % of the draws of prompts."""
    first, second = twice[:, drawn_indices(twice.shape[1], RESAMPLES)].sum(axis=-1)
    return float(np.quantile(np.abs(1 - first / second), 0.95))


def halves(seconds: np.ndarray, mine: int) -> np.ndarray:
    """(halvings,) regret on one half of the prompts against the way that was best on the other half, for every way to
    halve them. seconds: (ways, prompts). mine: the place of the chosen way."""
    prompts, found = seconds.shape[1], []
    for first in combinations(range(prompts), prompts // 2):
        here = np.isin(np.arange(prompts), first)
        best = seconds[:, here].sum(axis=1).argmin()
        found.append(1 - seconds[best, ~here].sum() / seconds[mine, ~here].sum())
    return np.array(found)
