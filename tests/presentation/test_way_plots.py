"""The ladder of ways of drafting and the oracle's map: what is drawn is what the table says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from traces.fabricate import fabricate

from probekit.choice.rank import oracle_of, rank
from probekit.costs.roofline import roofline_costs
from probekit.drafting.drafters import traced_drafters
from probekit.errors import InputError
from probekit.presentation import plots


@pytest.fixture
def ax():
    return Figure().subplots()


def test_the_ladder_has_a_point_and_its_number_for_each_rung(ax):
    made = fabricate(prompts=6, tokens=30, vocabulary=6, drafter=True)
    rungs = rank(made, roofline_costs(made, drafter=made.manifest.drafter), draft_lengths=[1, 3]).ladder()
    assert rungs["rung"].tolist() == [
        "autoregressive", "best fixed pair", "best policy", "best lookup", "draft model", "best tree", "oracle",
    ]  # fmt: skip
    assert plots.ladder(rungs, ax=ax) is ax
    points = ax.collections[-1].get_offsets()
    assert np.allclose(points[:, 0], rungs["speedup"]) and points[-1, 0] == rungs["speedup"].max()
    texts = [text.get_text() for text in ax.texts]
    assert all(f"{gain:.2f}" in texts for gain in rungs["speedup"])
    assert [label.get_text() for label in ax.get_yticklabels()] == rungs["rung"].tolist()
    assert (
        ax.get_xlim()[0] < rungs[["speedup", "speedup_low"]].min(axis=None)
        and ax.get_xlim()[1] > rungs["speedup_high"].max()
    )


def test_one_wide_interval_does_not_push_the_points_together(ax):
    rungs = pd.DataFrame(
        {"rung": ["autoregressive", "best tree"], "way": ["", "layer 11, tree:3/3/1/1/0/0/0/0/0, best shape"],
         "speedup": [1.0, 2.0],
         "speedup_low": [np.nan, 0.04], "speedup_high": [np.nan, 166.7]}
    )  # fmt: skip
    plots.ladder(rungs, ax=ax)
    assert "layer 11, tree:3/3/1/1/0/0/0/…" in [text.get_text() for text in ax.texts]
    assert 4.0 < ax.get_xlim()[1] < 6.0
    ends = [path.vertices[:, 0].max() for path in ax.collections[0].get_paths()]
    assert max(ends) == 4.0
    assert [list(each.get_offsets()[0]) for each in ax.collections[1:2]] == [[4.0, 1.0]], "an arrow goes on"


def test_the_map_covers_each_text_once(ax):
    made = fabricate(prompts=3, tokens=20)
    exits = traced_drafters(made, draft_model=False)
    way = oracle_of(made, exits, roofline_costs(made), 4).way
    assert way is not None
    rounds = pd.DataFrame(
        {"prompt": [0, 0, 0, 1], "start": [1, 3, 4, 1], "emitted": [2, 1, 3, 6], "exit_layer": [2, plots.NO_EXIT, 5, 1]}
    )
    plots.exit_map(rounds, 5, ax=ax)
    bars = [path.get_extents() for collection in ax.collections for path in collection.get_paths()]
    assert sorted(round(bar.width) for bar in bars) == [1, 2, 3, 6]
    colours = plots.exit_colours(5)
    assert len({tuple(colours.to_rgba(layer)) for layer in range(1, 6)}) == 5


def test_nothing_to_show_says_so(ax):
    plots.ladder(pd.DataFrame(columns=["rung", "way", "speedup", "speedup_low", "speedup_high"]), ax=ax)
    assert "nothing was ranked" in ax.texts[0].get_text()
    with pytest.raises(InputError, match="has no column"):
        plots.exit_map(pd.DataFrame({"prompt": [1]}), 3, ax=ax)
