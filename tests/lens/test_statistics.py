"""A statistic of one's own: one entry, and tracer, columns, files, tables and plots have it."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from probekit.errors import InputError
from probekit.lens.lens import Lens
from probekit.lens.statistics import COLOURED, LAYER_COLUMNS, STATISTICS, Statistic, register, unregister
from probekit.presentation.plots import STYLE, lens_table
from probekit.presentation.tables import lens_table as lens_cells
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace


def second_probability(block):
    """The probability of the second most probable token."""
    return block.logits.softmax(-1).topk(2, dim=-1).values[..., 1]


@pytest.fixture
def second():
    register(Statistic("second_probability", label="probability of the second token", high=0.5,
                       reduce=second_probability))  # fmt: skip
    yield
    unregister("second_probability")


def test_one_entry_is_in_the_trace_its_files_and_the_figures(second, tiny, tmp_path):
    made = trace(tiny, [[1, 2, 3], [4, 5]], tmp_path / "run", max_new_tokens=6)
    column = pd.read_parquet(next((tmp_path / "run").glob("layers-*.parquet")))["second_probability"]
    assert column.dtype == "float32" and column.between(0, 0.5).all()
    again = Trace.open(tmp_path / "run")
    ids = torch.tensor([[*made.prompt_ids(0), *made.outputs(0)]])
    states = tiny.model(ids, output_hidden_states=True).hidden_states[2][0]
    expected = Lens(tiny.anatomy)(states, 2).softmax(-1).topk(2).values[2:-1, 1]
    for one in (made, again):
        torch.testing.assert_close(torch.tensor(one.values(0, "second_probability")[2]), expected)
        assert (one.values(0, "second_probability") <= one.values(0, "probability")).all()
        assert "second_probability" in one.to_pandas().columns
    with matplotlib.rc_context(STYLE):
        fig, ax = plt.subplots()
        table = lens_cells(again, 0).to_pandas()
        assert lens_table(ax, table, statistic="second_probability").norm.vmax == 0.5
        plt.close(fig)


def test_a_trace_made_without_it_says_so(tiny):
    plain = trace(tiny, [[1, 2]], max_new_tokens=4)
    with pytest.raises(InputError, match="has no column 'second_probability'"):
        plain.values(0, "second_probability")
    register(Statistic("second_probability", reduce=second_probability))
    try:
        with pytest.raises(InputError, match="of this trace has no second_probability"):
            plain.values(0, "second_probability")
    finally:
        unregister("second_probability")
    assert list(STATISTICS) == list(LAYER_COLUMNS)[5:]
    assert set(COLOURED) < set(STATISTICS)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (Statistic("entropy", reduce=second_probability), "there is a column 'entropy' already"),
        (Statistic("fresh"), "has no reduction"),
    ],
)
def test_what_cannot_be_registered(statistic, message):
    with pytest.raises(InputError, match=message):
        register(statistic)
    assert "fresh" not in LAYER_COLUMNS


def test_what_is_no_statistic():
    with pytest.raises(InputError, match="a type out of float32"):
        Statistic("fresh", "float64", reduce=second_probability)
    with pytest.raises(InputError, match="a name that can be a column"):
        Statistic("two words", reduce=second_probability)
    with pytest.raises(InputError, match="is built in"):
        unregister("entropy")
