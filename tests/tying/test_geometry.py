"""Geometry of a token's two vectors and of the subspaces that they fill, on matrices worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from traces.fabricate import fabricate

from probekit.errors import InputError
from probekit.tying.geometry import (
    alignment,
    alignment_by_chance,
    echo_of_embedding,
    frequency_groups,
    geometry_table,
    principal_cosines,
    reading_rows,
    row_cosines,
    token_counts,
)


def planes(*axes, width=6, rows=40, seed=0):
    """Rows that spread along some axes only."""
    drawn = torch.zeros(rows, width)
    drawn[:, list(axes)] = torch.randn(rows, len(axes), generator=torch.Generator().manual_seed(seed))
    return drawn


def test_row_cosines():
    found = row_cosines(torch.tensor([[1.0, 0], [1, 1], [2, 0]]), torch.tensor([[0, 3.0], [1, 0], [-1, 0]]))
    assert found.tolist() == pytest.approx([0, 0.5**0.5, -1])


def test_principal_cosines_of_planes():
    assert principal_cosines(planes(0, 1), planes(0, 1, seed=1), 2).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert principal_cosines(planes(0, 1), planes(1, 2, seed=1), 2).tolist() == pytest.approx([1, 0], abs=1e-5)
    assert alignment(planes(0, 1), planes(2, 3), 2) == pytest.approx(0, abs=1e-6)
    assert alignment(planes(0, 1), planes(1, 2), 2) == pytest.approx(1 / 2, abs=1e-5)


def test_principal_angles_of_two_lines():
    line, turned = planes(0), torch.zeros(40, 6)
    turned[:, 0], turned[:, 1] = 3 * line[:, 0], 4 * line[:, 0]  # a 3-4-5 triangle
    assert principal_cosines(line, turned, 1).tolist() == pytest.approx([0.6], abs=1e-5)


def test_alignment_ignores_the_mean_and_is_symmetric():
    one, other = planes(0, 1, 2, 3, 4, 5), planes(0, 1, 2, 3, 4, 5, seed=1)
    assert alignment(one + 100, other, 3) == pytest.approx(alignment(one, other, 3), abs=1e-4)
    assert alignment(other, one, 3) == pytest.approx(alignment(one, other, 3), abs=1e-5)


def test_random_subspaces_are_aligned_by_chance():
    generator = torch.Generator().manual_seed(0)
    found = [
        alignment(torch.randn(200, 32, generator=generator), torch.randn(200, 32, generator=generator), 8)
        for _ in range(20)
    ]
    assert np.mean(found) == pytest.approx(8 / 32, abs=0.03)


def test_alignment_by_chance_of_lines_and_of_everything():
    """A line in 6 dimensions: a squared coordinate of a random unit vector, beta(1/2, 5/2), of variance 5 / 144."""
    found = alignment_by_chance(1, 6)
    assert found.value == pytest.approx(1 / 6)
    assert found.high - found.value == found.value - found.low == pytest.approx(1.96 * (5 / 144) ** 0.5)
    assert alignment_by_chance(6, 6) == (1, 1, 1)


def test_random_subspaces_fall_into_the_interval_of_chance():
    low, high = alignment_by_chance(8, 32)[1:]
    generator = torch.Generator().manual_seed(1)
    found = np.array([
        alignment(torch.randn(200, 32, generator=generator), torch.randn(200, 32, generator=generator), 8)
        for _ in range(300)
    ])  # fmt: skip
    assert 0.92 <= ((low <= found) & (found <= high)).mean() <= 0.98


def test_too_many_dimensions():
    with pytest.raises(InputError, match="7 dimensions do not fit"):
        principal_cosines(planes(0), planes(0), 7)


def test_frequency_groups():
    counts = np.zeros(400, int)
    counts[10:400] = np.arange(390, 0, -1)
    groups = frequency_groups(counts)
    assert {name: len(ids) for name, ids in groups.items()} == {
        "all": 400, "64 most frequent": 64, "next 192": 192, "seen less": 134, "not seen": 10,
    }  # fmt: skip
    assert groups["64 most frequent"][0] == 10
    assert groups["not seen"].tolist() == list(range(10))


def test_token_counts():
    trace = fabricate(prompts=3)
    counts = token_counts(trace)
    assert counts.sum() == (trace.texts["prompt_tokens"] + trace.texts["new_tokens"]).sum()
    assert counts[trace.outputs(0)[-1]] >= 1


def test_a_tied_model_says_its_embedding(any_tiny):
    parts = any_tiny.anatomy
    echoed = echo_of_embedding(parts, torch.arange(parts.vocabulary))
    assert echoed.shape == (parts.vocabulary,)
    table = geometry_table(parts, "tiny", np.arange(parts.vocabulary)).set_index("tokens")
    assert table.loc["all", "count"] == parts.vocabulary
    assert table.loc["all", "echo"] == pytest.approx(echoed.float().mean().item())
    if parts.tied:
        assert torch.allclose(row_cosines(parts.embedding.weight, reading_rows(parts)), torch.ones(parts.vocabulary))
        assert table.loc["all", "alignment"] == pytest.approx(1, abs=1e-4)
        assert echoed.float().mean() > 0.9
    else:
        assert abs(table.loc["all", "cosine"]) < 0.1
        assert echoed.float().mean() < 0.1
    with pytest.raises(InputError, match="3 counts"):
        geometry_table(parts, "tiny", np.ones(3))
