"""The map of patches: each cell is the table's number, layer by position."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from probekit.errors import InputError
from probekit.presentation import plots
from probekit.probing.patching import patch

CLEAN, CORRUPTED = [1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6]


@pytest.fixture
def ax():
    with matplotlib.rc_context(plots.STYLE):
        yield Figure(figsize=(4, 3)).subplots()


def shown(ax):
    mesh = ax.collections[0]
    return np.asarray(mesh.get_array(), dtype=float), mesh


@pytest.mark.parametrize(("kind", "rows"), [("residual", 6), ("attention", 5), ("mlp", 5)])
def test_each_cell_is_what_was_restored(tiny, ax, kind, rows):
    found = patch(tiny, CLEAN, CORRUPTED, exits=())
    assert plots.patch_map(found, kind, ax=ax) is ax
    values, mesh = shown(ax)
    mine = [place for place, site in enumerate(found.sites) if site.startswith(kind)]
    assert values.shape == (rows, 6) and np.allclose(values, found.restored[mine])
    assert mesh.norm.vmin == -mesh.norm.vmax == pytest.approx(-np.abs(values).max())
    assert ax.get_yticklabels()[0].get_text() == "0" and len(ax.get_xticklabels()) == 6
    assert ax.get_ylim()[0] < ax.get_ylim()[1]  # layers go upwards
    assert plots.colours_of(ax).norm.vmax == mesh.norm.vmax


def test_an_ablation_shows_its_change_and_some_positions(tiny, ax):
    found = patch(tiny, CLEAN, sites="mlp", positions=[1, 4], how="zero", exits=())
    plots.patch_map(found, ax=ax, high=2.0)
    values, mesh = shown(ax)
    assert np.allclose(values, found.change) and mesh.norm.vmax == 2.0
    with pytest.raises(InputError, match="no 'attention' was patched"):
        plots.patch_map(found, "attention", ax=ax)
    with pytest.raises(InputError, match="no value 'colour'"):
        plots.patch_map(found, ax=ax, value="colour")
    plots.patch_map(found.table().iloc[:0], ax=ax)
    assert "nothing was patched" in ax.texts[-1].get_text()
