"""Intervals hold the truth as often as they say: on prompts drawn from a bundled model's trace, and on made-up ones."""

from __future__ import annotations

import numpy as np
import pytest

from probekit.prediction.intervals import bootstrap_ratio

LEAST = 0.93


@pytest.mark.parametrize("prompts", [8, 12, 24])
def test_made_up_prompts(prompts):
    """Prompts as different as real ones: rates from a beta law, lengths from 10 to 90. The percentiles had .87 at 8."""
    random = np.random.default_rng(prompts)
    rates = random.beta(3, 2, (2000, prompts))
    drafted = random.integers(10, 90, rates.shape)
    low, high = bootstrap_ratio(random.binomial(drafted, rates), drafted, resamples=500)
    assert ((low <= 0.6) & (high >= 0.6)).mean() >= LEAST


@pytest.mark.long
@pytest.mark.parametrize("model", ["tales-untied", "tales-tied", "tales-layerskip"])
def test_prompts_of_a_bundled_model(model):
    from analyses.coverage_of_intervals import coverage, population
    from probekit.models.loaded import load

    table = coverage(population(load(model)), sizes=(8, 12, 24, 48))
    by_size = table.groupby(["kind", "prompts"])["coverage"].mean()
    assert (by_size["bootstrap-t"] >= LEAST).all(), by_size
    assert (by_size["difference"] >= LEAST).all(), by_size
    assert by_size["percentile", 8] < LEAST  # the simulation can tell
