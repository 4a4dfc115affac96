"""A 2 x 2 over several seeds: what tying does, what early-exit training does, and whether they add up. Needs no torch.

Each seed trains four models from the same start: the effects are differences within a seed, so that a seed's luck
falls out of them, and the interval is Student's t over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from probekit.errors import InputError

EFFECTS = ("tying", "training", "interaction")


def factorial_effects(frame: pd.DataFrame, quantities: Sequence[str], groups: Sequence[str] = ()) -> pd.DataFrame:
    """Effects of tying and of early-exit training on some quantities.

    frame: one row for each model (and group), with columns seed, tied, layerskip, the `groups` and the quantities.

    tying: tied minus untied, mean of both trainings; training: LayerSkip minus plain, mean of tied and untied;
    interaction: tying's effect under LayerSkip minus its effect under plain training. One row for each group, quantity
    and effect: effect, low, high (95 %, Student's t over seeds), seeds, clear (the interval leaves out 0).
    """
    rows = []
    parts = frame.groupby(list(groups), sort=True) if groups else [((), frame)]
    for key, part in parts:
        named = dict(zip(groups, key if isinstance(key, tuple) else (key,), strict=True))
        for quantity in quantities:
            table = part.pivot(index="seed", columns=["tied", "layerskip"], values=quantity)
            cells = [(False, False), (True, False), (False, True), (True, True)]
            if any(cell not in table.columns for cell in cells) or table.isna().any().any():
                raise InputError(f"the 2 x 2 is not whole for {quantity} {named or ''}: each seed needs four models.")
            plain, tied, skip, both = (table[cell].to_numpy(np.float64) for cell in cells)
            per_seed = {
                "tying": (tied - plain + both - skip) / 2,
                "training": (skip - plain + both - tied) / 2,
                "interaction": (both - skip) - (tied - plain),
            }
            for effect in EFFECTS:
                values = per_seed[effect]
                low, high = t_interval(values)
                rows.append(
                    {
                        **named,
                        "quantity": quantity,
                        "effect": effect,
                        "value": values.mean(),
                        "low": low,
                        "high": high,
                        "seeds": len(values),
                        "clear": bool(low > 0 or high < 0),
                    }
                )
    return pd.DataFrame(rows)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean by Student's t; NaN with fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
