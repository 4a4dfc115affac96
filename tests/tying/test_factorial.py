"""Effects of a 2 x 2 over seeds, worked by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probekit.errors import InputError
from probekit.tying.factorial import factorial_effects, t_interval


def runs(values):
    """values: {seed: (untied plain, tied plain, untied LayerSkip, tied LayerSkip)}."""
    cells = [(False, False), (True, False), (False, True), (True, True)]
    return pd.DataFrame(
        {"seed": seed, "tied": tied, "layerskip": skip, "echo": value}
        for seed, row in values.items()
        for (tied, skip), value in zip(cells, row, strict=True)
    )


def test_effects():
    """Tying adds .2 under plain training and .4 under LayerSkip; seeds start at other levels."""
    table = factorial_effects(runs({1: (0.1, 0.3, 0.2, 0.6), 2: (0.5, 0.7, 0.6, 1.0)}), ["echo"]).set_index("effect")
    assert table["value"].to_dict() == pytest.approx({"tying": 0.3, "training": 0.2, "interaction": 0.2})
    assert table["low"].to_dict() == pytest.approx(table["high"].to_dict())  # a seed's level falls out
    assert table["clear"].all()


def test_the_interval_is_students():
    low, high = t_interval(np.array([1.0, 2.0, 3.0]))
    half = 4.3027 / np.sqrt(3)  # t with two degrees of freedom, times 1 / sqrt(3)
    assert (low, high) == (pytest.approx(2 - half, abs=1e-3), pytest.approx(2 + half, abs=1e-3))
    assert np.isnan(t_interval(np.array([1.0]))).all()


def test_an_effect_that_turns_with_the_seed_is_not_clear():
    table = factorial_effects(runs({1: (0.0, 0.1, 0.0, 0.1), 2: (0.1, 0.0, 0.1, 0.0)}), ["echo"]).set_index("effect")
    assert table["value"]["tying"] == pytest.approx(0)
    assert not table["clear"]["tying"]


def test_groups_are_kept_apart():
    one, other = runs({1: (0, 1, 0, 1), 2: (0, 1, 0, 1)}), runs({1: (0, 2, 0, 2), 2: (0, 2, 0, 2)})
    table = factorial_effects(pd.concat([one.assign(layer=0), other.assign(layer=1)]), ["echo"], ["layer"])
    assert table[table["effect"] == "tying"]["value"].tolist() == [1, 2]


def test_a_missing_model_is_named():
    with pytest.raises(InputError, match="2 x 2 is not whole for echo"):
        factorial_effects(runs({1: (0, 1, 0, 1)}).iloc[:3], ["echo"])
