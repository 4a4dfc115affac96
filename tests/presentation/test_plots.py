"""Pictures: what is drawn is what the tables say, with units, intervals and nothing that cannot be read."""

from __future__ import annotations

import warnings
from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from presentation.fabricate_study import fabricate_costs, fabricate_trace

from probekit.choice.choose import choose
from probekit.errors import InputError
from probekit.prediction.predict import predict
from probekit.presentation import plots, tables
from probekit.presentation.plots import lens, style


@pytest.fixture
def ax():
    with matplotlib.rc_context(plots.STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that no font has is a warning of matplotlib's
        axes = Figure(figsize=(6.9, 3)).subplots()
        yield axes
        axes.figure.draw_without_rendering()


@pytest.fixture(scope="module")
def trace():
    return fabricate_trace("tales-tied", depth=4, prompts=4, tokens=16, seed=3)


@pytest.fixture(scope="module")
def layers(trace):
    other = tables.layers_table(fabricate_trace("tales-untied", depth=4, prompts=4, seed=1), "cost $a$ and $b$")
    return pd.concat([tables.layers_table(trace, "tied"), other], ignore_index=True)


@pytest.fixture(scope="module")
def cells(trace):
    prediction = predict(trace, draft_lengths=(1, 2, 5))
    return tables.cells_table(prediction, choose(prediction, fabricate_costs(4, 5)), "tied")


def labels(ax: Axes) -> tuple[str, str]:
    return ax.get_xlabel(), ax.get_ylabel()


def written(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


# -- the lens table
def test_lens_table_holds_every_token_once(ax, trace):
    prompt = max(trace.prompts, key=lambda prompt: len(trace.outputs(prompt)))
    table = tables.lens_table(trace, prompt).window(6, before=2)
    colours = plots.colours_of(plots.lens_table(table.frame, ax=ax))
    tokens = written(ax)[: 5 * len(table.inputs) + 3]
    assert len([text for text in tokens if text.strip() not in ("prompt", "continuation", "• the model's token")]) == (
        5 * len(table.inputs)
    )
    rows = [tick.get_text() for tick in ax.get_yticklabels()]
    assert rows == ["embedding, 0", "1", "2", "3", "model, 4"]
    bottom, top = ax.get_ylim()
    assert bottom < top  # the embedding is the lowest row
    assert [tick.get_text() for tick in ax.get_xticklabels()][2] == table.inputs[2]
    assert colours.get_clim() == (0.0, 1.0)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(dots) == int(table.frame.query("layer < 4")["agrees"].sum())


def test_lens_table_greys_the_prompt(ax, trace):
    table = tables.lens_table(trace, 0).window(5, before=2)
    plots.lens_table(table.frame, ax=ax)
    meshes = [mesh for mesh in ax.collections if isinstance(mesh, QuadMesh)]
    assert len(meshes) == 2
    greys = meshes[0].get_cmap()(np.linspace(0, 1, 5))[:, :3]
    assert np.allclose(greys, greys[:, :1])


def test_lens_table_of_a_deep_model_shows_some_layers_and_the_model(ax, trace):
    plots.lens_table(tables.lens_table(trace, 0).frame, every=3, ax=ax)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["embedding, 0", "model, 4"]


@pytest.mark.parametrize("statistic", sorted(plots.STATISTICS))
def test_lens_table_takes_every_statistic(ax, trace, statistic):
    frame = tables.lens_table(trace, 0).window(4).frame
    low, high = plots.colours_of(plots.lens_table(frame, statistic=statistic, ax=ax)).get_clim()
    assert low <= frame[statistic].min()
    assert high >= frame[statistic].max()


def test_tokens_stay_within_their_cells(ax, trace):
    frame = tables.lens_table(trace, 0).frame.copy()
    frame["token"] = "␣incomprehensibilities"
    plots.lens_table(frame, ax=ax)
    width = ax.get_window_extent().width / frame["position"].nunique()
    cells = [text for text in ax.texts if text.get_text().endswith("…")]
    assert len(cells) == len(frame)
    assert max(text.get_window_extent().width for text in cells) <= width


def test_letters_can_be_read_on_every_colour():
    for colours in lens._maps(False):
        for ground in colours(np.linspace(0, 1, 50)):
            light, dark = sorted((luminance(ground), luminance(to_rgb(style.ink_on(ground)))), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 3.5


def luminance(colour) -> float:
    channels = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour[:3]]
    return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))


def test_the_sequential_map_is_monotonic_in_grey():
    shades = [luminance(colour) for colour in lens._maps(False)[0](np.linspace(0, 1, 64))]
    assert all(later < earlier for earlier, later in pairwise(shades))


# -- glyphs
def test_what_no_font_can_draw_is_not_drawable():
    with matplotlib.rc_context(plots.STYLE):
        assert plots.drawable("a")
        assert plots.drawable("␣")
        assert plots.drawable("⟨")
        assert not plots.drawable("\U000f0000")
        assert plots.families("the") == ["DejaVu Sans"]


def test_any_token_is_drawn_without_a_missing_glyph(ax, trace):
    frame = tables.lens_table(trace, 0).window(4).frame.copy()
    strange = ["\U000f0000", "王", "القمر", "हिन्दी", "𓀀", "😀", "\u200d", "�", "$x$", "\\frac", "^_{", "\ufe0f"]
    frame["token"] = [strange[place % len(strange)] for place in range(len(frame))]
    frame["input"] = frame["position"].map(lambda position: strange[position % len(strange)])
    plots.lens_table(frame, ax=ax)
    assert "⟨F0000⟩" in written(ax)
    assert "$x$" in written(ax)


# -- curves
@pytest.mark.parametrize(
    ("draw", "statistic"), [(plots.agreement_by_layer, "agreement"), (plots.echo_by_layer, "echo")]
)
def test_curves_are_the_table(ax, layers, draw, statistic):
    own = layers[layers["lens"] == "final-norm"]
    draw(own, ax=ax)
    curves = [line for line in ax.lines if len(line.get_xdata()) == 5]
    for line, (_, group) in zip(curves, own.groupby("model", sort=False), strict=True):
        assert np.allclose(np.asarray(line.get_ydata(), float), group[statistic])
    assert len(ax.collections) == 2  # a band for each model
    assert labels(ax) == ("layer (0: embedding, last: model)", f"{statistic} (share of tokens)")
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["tied", r"cost \$a\$ and \$b\$"]
    assert len({line.get_linestyle() + str(line._dash_pattern) for line in curves}) == 2  # told apart without colour


def test_both_lenses_of_one_model(ax, layers):
    plots.agreement_by_layer(layers[layers["model"] == "tied"], ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["final-norm", "raw"]


def test_models_of_different_depth_share_a_relative_axis(ax, layers):
    deeper = layers.assign(layer=np.where(layers["model"] == "tied", layers["layer"], layers["layer"] * 2))
    plots.agreement_by_layer(deeper[deeper["lens"] == "raw"], ax=ax)
    assert ax.get_xlabel() == "layer / depth"
    assert {float(line.get_xdata()[-1]) for line in ax.lines if len(line.get_xdata()) == 5} == {1.0}


def test_entropy_and_kl_are_in_nats(ax, layers):
    other = ax.figure.add_axes((0.5, 0.1, 0.4, 0.8))
    plots.entropy_and_kl(ax, other, layers[layers["lens"] == "raw"])
    assert "(nats)" in ax.get_ylabel()
    assert other.get_ylabel() == "KL(model ‖ lens) (nats)"
    assert ax.get_ylim()[0] == 0


def test_what_was_not_measured_is_said(ax, layers):
    plots.echo_by_layer(layers.assign(echo=np.nan), ax=ax)
    assert written(ax) == ["no echo in this study"]


def test_a_table_of_something_else_is_refused(ax, layers):
    with pytest.raises(InputError, match="no column agreement"):
        plots.agreement_by_layer(layers.drop(columns="agreement"), ax=ax)
    with pytest.raises(InputError, match="no column gain"):
        plots.by_layer(layers, "gain", ax=ax)
    with pytest.raises(InputError, match="was given a list"):
        plots.echo_by_layer([1, 2], ax=ax)
    with pytest.raises(InputError, match="nothing to draw"):
        plots.echo_by_layer(ax=ax)
    with pytest.raises(InputError, match="type ndarray; expected matplotlib Axes"):
        plots.echo_by_layer(layers, ax=np.array([ax, ax]))


# -- over E and K
def test_grids_show_the_numbers_of_the_cells(ax, cells):
    assert plots.acceptance_grid(cells, ax=ax) is ax
    colours = plots.colours_of(ax)
    assert colours.get_clim() == (0.0, 1.0)
    mesh = next(mesh for mesh in ax.collections if isinstance(mesh, QuadMesh))
    expected = cells.pivot(index="exit_layer", columns="draft_length", values="acceptance_rate")
    assert np.allclose(mesh.get_array().reshape(3, 3), expected)
    assert written(ax) == [f"{value:.2f}" for value in expected.to_numpy().ravel()]
    assert labels(ax) == ("draft length K (tokens)", "exit layer E")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "5"]


def test_tokens_per_round_begin_at_one(ax, cells):
    plots.tokens_per_round_grid(cells, high=6, ax=ax)
    assert plots.colours_of(ax).get_clim() == (1.0, 6.0)


def below(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Both tables' rows; pandas 2 warns of `concat` where a column of one is empty."""
    return pd.DataFrame([*one.to_dict("records"), *other.to_dict("records")])


def test_the_draft_model_has_its_own_row_at_the_bottom(ax, cells):
    small = cells.iloc[:3].assign(exit_layer=pd.NA, drafter="tales-draft", speedup=[0.9, 1.1, 1.2])
    plots.speedup_surface(below(cells, small), (None, 2), ax=ax)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["drafter", "1", "2", "3"]
    frames = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert {patch.get_xy() for patch in frames} == {(1, 0)}


def test_a_draft_model_that_was_not_weighed_has_no_row(ax, cells):
    small = cells.iloc[:3].assign(exit_layer=pd.NA, drafter="tales-draft", speedup=np.nan)
    plots.speedup_surface(below(cells, small), ax=ax)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["1", "2", "3"]


def test_speedup_is_framed_where_chosen_and_parted_at_one(ax):
    cells = pd.DataFrame(
        {"drafter": "self", "exit_layer": [1, 1, 2, 2], "draft_length": [1, 2, 1, 2], "speedup": [0.8, 0.9, 1.2, 0.7]}
    )
    plots.speedup_surface(cells, (2, 1), ax=ax)
    assert {patch.get_xy() for patch in ax.patches} == {(0, 1)}
    border = next(lines for lines in ax.collections if isinstance(lines, LineCollection))
    assert {tuple(map(tuple, segment)) for segment in border.get_segments()} == {
        ((1.0, 1.0), (1.0, 2.0)),  # to the right of (2, 1)
        ((0.0, 1.0), (1.0, 1.0)),  # below it
    }


@pytest.mark.parametrize("speedups", [(0.4, 0.9, 1.1, 2.5), (0.3, 0.5, 0.7, 0.9), (1.1, 1.2, 1.3, 1.9), (1.0,) * 4])
def test_speedups_are_red_below_one_and_blue_above(ax, speedups):
    cells = pd.DataFrame({"exit_layer": [1, 1, 2, 2], "draft_length": [1, 2, 1, 2], "speedup": speedups})
    colours = plots.colours_of(plots.speedup_surface(cells, ax=ax))
    red, green, blue, _ = colours.to_rgba(1.0)
    assert max(red, green, blue) - min(red, green, blue) < 0.02, "one is neutral"
    for value in speedups:
        red, _, blue, _ = colours.to_rgba(value)
        if abs(value - 1.0) > 0.05:
            assert (blue > red) == (value > 1.0)
    low, high = colours.get_clim()
    assert low <= 1.0 <= high
    assert low <= min(speedups) <= max(speedups) <= high


def test_equal_distances_from_one_are_equally_strong():
    norm, colours = style.diverging(0.5, 2.0)
    neutral, loss, gain, double = (np.array(to_rgb(colours(norm(value)))) for value in (1.0, 0.5, 1.5, 2.0))
    assert np.ptp(loss) == pytest.approx(np.ptp(gain), abs=0.15)
    assert np.ptp(neutral) < np.ptp(gain) < np.ptp(double)


@pytest.mark.parametrize("draw", [plots.acceptance_grid, plots.tokens_per_round_grid, plots.speedup_surface])
def test_an_empty_heat_map_says_why(ax, cells, draw):
    empty = cells.assign(acceptance_rate=np.nan, tokens_per_round=np.nan, speedup=np.nan)
    draw(empty, ax=ax)
    assert written(ax)[0].startswith("no ")
    with pytest.raises(InputError, match="no heat map"):
        plots.colours_of(ax)
    plots.one_bar(ax.figure, [ax], "nothing")
    plots.write_numbers([ax], "{:.2f}")


def test_cells_of_several_models_are_refused(ax, cells):
    with pytest.raises(InputError, match="several models"):
        plots.acceptance_grid(pd.concat([cells, cells.assign(model="other")]), ax=ax)


def test_no_frame_without_a_choice(ax, cells):
    plots.speedup_surface(cells, None, ax=ax)
    assert not ax.patches


def test_numbers_that_do_not_fit_are_left_out(cells):
    with matplotlib.rc_context(plots.STYLE):
        small = Figure(figsize=(0.7, 0.7)).subplots()
        plots.acceptance_grid(cells, ax=small)
    assert written(small) == []


def test_heat_maps_beside_one_another_have_numbers_of_one_size(cells):
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.9, 2), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=(3, 1))
        for ax in axes:
            plots.acceptance_grid(cells, numbers=False, ax=ax)
            assert written(ax) == []
        figure.draw_without_rendering()
        plots.write_numbers(axes, plots.NUMBERS["acceptance_rate"])
        figure.draw_without_rendering()
    assert len({text.get_fontsize() for ax in axes for text in ax.texts}) == 1
    for ax in axes:
        assert len(ax.texts) == len(cells)
        cell = ax.get_window_extent().width / 3
        assert max(text.get_window_extent().width for text in ax.texts) < cell


def test_numbers_are_left_out_of_all_or_none(cells):
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(3, 2), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=(20, 1))
        for ax in axes:
            plots.acceptance_grid(cells, numbers=False, ax=ax)
        plots.write_numbers(axes, "{:.2f}")
    assert [len(ax.texts) for ax in axes] == [0, 0]


def test_a_cell_without_a_value_has_no_number(ax, cells):
    plots.acceptance_grid(cells.assign(acceptance_rate=[np.nan, *cells["acceptance_rate"].iloc[1:]]), ax=ax)
    assert len(written(ax)) == len(cells) - 1


# -- evidence
@pytest.fixture
def validation():
    return pd.DataFrame(
        {
            "model": ["one", "one", "two"],
            "predicted_rounds": [10, 20, 30],
            "measured_rounds": [10, 20, 31],
            "predicted_acceptance_rate": [0.5, 0.7, np.nan],
            "measured_acceptance_rate": [0.5, 0.7, np.nan],
            "predicted_acceptance_rate_low": [0.4, 0.6, np.nan],
            "predicted_acceptance_rate_high": [0.7, 0.8, np.nan],
            "speedup_predicted": [1.0, 1.2, 0.7],
            "speedup_measured": [0.9, 1.3, 0.7],
            "speedup_measured_20": [0.8, 1.25, 0.65],
            "speedup_measured_80": [1.0, 1.4, 0.75],
        }
    )


@pytest.mark.parametrize(("quantity", "points"), [("rounds", 3), ("acceptance_rate", 2), ("speedup", 3)])
def test_predicted_stands_against_measured(ax, validation, quantity, points):
    plots.predicted_against_measured(validation, quantity, ax=ax)
    drawn = np.concatenate([points.get_offsets() for points in ax.collections if len(points.get_offsets())])
    here, there, _ = plots.COMPARED[quantity]
    expected = validation[[here, there]].dropna().to_numpy(float)
    assert len(expected) == points
    assert {tuple(point) for point in expected} <= {tuple(point) for point in drawn}
    diagonal = next(line for line in ax.lines if len(line.get_xdata()) == 2)
    assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert ax.get_xlim() == ax.get_ylim()


def test_bars_reach_from_quantile_to_quantile(ax, validation):
    plots.predicted_against_measured(validation.iloc[:1], "speedup", ax=ax)
    bars = [lines for lines in ax.collections if isinstance(lines, LineCollection)]
    vertical = [segment for lines in bars for segment in lines.get_segments() if np.ptp(segment[:, 1]) > 0]
    assert np.allclose(vertical[0], [[1.0, 0.8], [1.0, 1.0]])


def bars(ax: Axes) -> int:
    """Error bars that have a length."""
    lines = [lines for lines in ax.collections if isinstance(lines, LineCollection)]
    return sum(bool(np.ptp(segment, axis=0).any()) for each in lines for segment in each.get_segments())


@pytest.mark.parametrize("quantity", ["rounds", "acceptance_rate"])
def test_an_exact_prediction_has_no_bars(ax, validation, quantity):
    here, there, _ = plots.COMPARED[quantity]
    ends = {
        f"{side}_{end}": validation[side] * factor
        for side in (here, there)
        for end, factor in (("low", 0.9), ("high", 1.1))
    }
    plots.predicted_against_measured(validation.assign(**ends, rounds_equal=True), quantity, ax=ax)
    assert bars(ax) == 0
    sampled = Figure().subplots()
    plots.predicted_against_measured(validation.assign(**ends, rounds_equal=None), quantity, ax=sampled)
    assert bars(sampled) == len(validation.dropna(subset=[here, there]))


def test_nothing_measured_is_said(ax, validation):
    plots.predicted_against_measured(validation.drop(columns="speedup_measured"), "speedup", ax=ax)
    assert written(ax) == ["no speedup (×) was measured"]


def test_run_lengths_fall_on_a_log_scale(ax, trace):
    plots.run_lengths_against_geometric(tables.run_lengths_table(trace, [1, 3]), ax=ax)
    assert ax.get_yscale() == "log"
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(names) == ["exit 1", "exit 3", "geometric law"]
    assert labels(ax) == ("run length r (tokens)", "runs of at least r (count)")


def test_trace_against_sweep_marks_what_is_extrapolated(ax):
    sweep = pd.DataFrame(
        {
            "cells": [1, 2, 3, 1, 2, 3],
            "source": ["measured", "extrapolated", "extrapolated", "trace", "trace", "trace"],
            "seconds": [8.0, 28.0, 40.0, 4.0, 4.0, 4.0],
        }
    )
    plots.trace_against_sweep(sweep, ax=ax)
    by_name = {line.get_label(): line for line in ax.lines}
    assert by_name["each cell run"].get_ydata().tolist() == [8.0]
    assert by_name["each cell run (extrapolated)"].get_ydata().tolist() == [8.0, 28.0, 40.0]  # goes on from there
    assert by_name["each cell run (extrapolated)"].is_dashed()
    assert "10×" in written(ax)
    assert labels(ax) == ("cells (E, K) known", "time (s)")
