"""Probes by layer and who wrote a logit: what is drawn is what the table says."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from presentation.fabricate_study import fabricate_probes

from probekit.errors import InputError
from probekit.presentation import plots
from probekit.probing.attribution import attribute


@pytest.fixture
def ax():
    with matplotlib.rc_context(plots.STYLE):
        yield Figure(figsize=(4, 3)).subplots()


@pytest.mark.parametrize(
    ("label", "names"),
    [
        ("accepted", {"probe": "residual", "confidence": "lens's figures", "together": "both",
                      "position": "position only", "control": "shuffled labels"}),
        ("answer", {"probe": "linear map", "lens": "lens", "control": "mean residual"}),
    ],
)  # fmt: skip
def test_each_kind_is_a_line_of_its_values(ax, label, names):
    table = fabricate_probes("m", 6).sample(frac=1.0, random_state=1)  # in any order
    assert plots.probes_by_layer(table, label, ax=ax) is ax
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == list(names.values()) == [text.get_text() for text in ax.get_legend().get_texts()]
    for kind, name in names.items():
        own = table[(table["label"] == label) & (table["kind"] == kind)].sort_values("layer")
        np.testing.assert_allclose(lines[name].get_xydata(), own[["layer", "value"]])
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(looks) == len(lines)
    banded = [name for name in names if name != "position"]
    assert len(ax.collections) == len(banded)
    first = ax.collections[0].get_paths()[0].vertices
    own = table[(table["label"] == label) & (table["kind"] == "probe")]
    assert first[:, 1].min() == pytest.approx(own["low"].min()) and first[:, 1].max() == pytest.approx(
        own["high"].max()
    )


def test_what_was_not_probed_is_said_and_what_is_unclear_refused(ax):
    table = fabricate_probes("m", 4)
    with pytest.raises(InputError, match="several models"):
        plots.probes_by_layer(pd.concat([table, table.assign(model="n")]), ax=ax)
    with pytest.raises(InputError, match="accepted and answer"):
        plots.probes_by_layer(table, "agrees", ax=ax)
    plots.probes_by_layer(table[table["label"] == "answer"], ax=ax)
    assert "no probes of 'accepted'" in ax.texts[0].get_text() and not ax.lines


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_each_cell_is_what_was_written(tiny, ax, kind):
    ids = [1, 2, 3, 4, 5]
    found = attribute(tiny, ids)
    table = found.table().assign(input=lambda rows: rows["position"].map(lambda at: f"t{at}"))
    assert plots.attribution_map(table.assign(generated=table["position"] >= 2), kind, ax=ax) is ax
    columns = [place for place, term in enumerate(found.terms) if term.startswith(kind)]
    mesh = ax.collections[0]
    np.testing.assert_allclose(np.asarray(mesh.get_array(), float), found.values[:, columns].T)
    assert mesh.norm.vmin == -mesh.norm.vmax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2", "3", "4", "5"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["t0", "t1", "t2", "t3", "t4"]
    assert [line.get_xdata()[0] for line in ax.lines] == [2], "a line between prompt and continuation"
    shades = [label.get_color() for label in ax.get_xticklabels()]
    assert shades[0] == shades[1] != shades[2] == shades[4]


def test_one_text_of_a_known_kind(tiny, ax):
    table = attribute(tiny, [1, 2, 3]).table().assign(input="t")
    with pytest.raises(InputError, match="several texts"):
        plots.attribution_map(pd.concat([table, table]), ax=ax)
    with pytest.raises(InputError, match="attention and mlp"):
        plots.attribution_map(table, "head", ax=ax)
    plots.attribution_map(table[table["term"] == "embedding"], ax=ax)
    assert "not known" in ax.texts[0].get_text()
