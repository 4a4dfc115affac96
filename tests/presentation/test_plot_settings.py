"""Plots are called as in seaborn, and take any look that matplotlib's settings ask for."""

from __future__ import annotations

import inspect
import itertools
import logging
import shutil
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from presentation.fabricate_study import fabricate_costs, fabricate_probes, fabricate_trace

from probekit.choice.choose import choose
from probekit.prediction.predict import predict
from probekit.presentation import plots, tables
from probekit.presentation.plots import style

VALIDATION = pd.DataFrame(
    {"model": ["a_$1$", "b & c"], "predicted_rounds": [10.0, 20.0], "measured_rounds": [10.0, 20.0],
     "rounds_equal": [True, True], "predicted_acceptance_rate": [0.5, 0.6], "measured_acceptance_rate": [0.5, 0.6],
     "speedup_predicted": [0.8, 1.2], "speedup_measured": [0.9, 1.1], "speedup_measured_20": [0.85, 1.0],
     "speedup_measured_80": [0.95, 1.2]}
)  # fmt: skip
SWEEP = pd.DataFrame(
    {"cells": [1, 2, 3, 1, 2, 3], "seconds": [1.0, 2.0, 3.0, 0.5, 0.5, 0.5],
     "source": ["measured", "measured", "extrapolated", "trace", "trace", "trace"]}
)  # fmt: skip
RUNGS = pd.DataFrame(
    {"rung": ["plain", "best fixed pair", "oracle"], "way": ["", "layer 2, K_$1$ & 2", ""], "speedup": [1.0, 1.2, 1.6],
     "speedup_low": [1.0, 1.1, np.nan], "speedup_high": [1.0, 1.3, np.nan]}
)  # fmt: skip
POSITIONS = pd.DataFrame(
    {"position": [1, 2, 3, 1, 2, 3], "kind": ["unconditional"] * 3 + ["conditional"] * 3,
     "rate": [0.7, 0.5, 0.0, 0.7, 0.71, np.nan]}
)  # fmt: skip
ROUNDS = pd.DataFrame({"prompt": [0, 0, 1], "start": [1, 3, 1], "emitted": [2, 3, 4], "exit_layer": [1, 0, 2]})
PATCHES = pd.DataFrame(
    {"kind": ["residual"] * 4 + ["mlp"] * 2, "layer": [0, 0, 1, 1, 0, 0], "position": [0, 1] * 3,
     "token": ["The", " $1_0$ & \u738b"] * 3, "change": [0.0, -1.0, 2.0, 0.5, 0.1, 0.2],
     "restored": [0.0, -0.5, 1.0, 0.25, 0.05, 0.1]}
)  # fmt: skip
SHARES = pd.DataFrame(
    {"position": [0, 0, 1, 1], "input": ["The", "The", " $1_0$ & \u738b", " $1_0$ & \u738b"],
     "generated": [False, False, True, True], "term": ["attention:0", "mlp:0"] * 2, "logit": [0.5, -1.0, 2.0, 0.25]}
)  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    """{function: the table that it draws}, every public plot of one table."""
    trace = fabricate_trace("tales-tied", depth=3, prompts=3, tokens=10, seed=3)
    layers = tables.layers_table(trace, "cost_$a$ & 50 % #1")
    prediction = predict(trace, draft_lengths=(1, 2))
    cells = tables.cells_table(prediction, choose(prediction, fabricate_costs(3, 2)), "tied")
    return {
        plots.lens_table: tables.lens_table(trace, 0),
        plots.agreement_by_layer: layers,
        plots.echo_by_layer: layers,
        plots.entropy_by_layer: layers,
        plots.kl_by_layer: layers,
        plots.by_layer: layers,
        plots.acceptance_grid: prediction,
        plots.tokens_per_round_grid: cells,
        plots.speedup_surface: cells,
        plots.predicted_against_measured: VALIDATION,
        plots.run_lengths_against_geometric: tables.run_lengths_table(trace, [1, 2]),
        plots.trace_against_sweep: SWEEP,
        plots.ladder: RUNGS,
        plots.exit_map: ROUNDS,
        plots.acceptance_by_position: POSITIONS,
        plots.patch_map: PATCHES,
        plots.probes_by_layer: fabricate_probes("cost_$a$ & 50 % #1", 4),
        plots.attribution_map: SHARES,
    }


def draw(plot, table, **options) -> Axes:
    more = {plots.by_layer: ("agreement",), plots.exit_map: (3,)}.get(plot, ())
    return plot(table, *more, **options)


def defaults():
    return matplotlib.rcdefaults()


def themed():
    sns.set_theme(context="talk", style="darkgrid", palette="Set2")


def named_font():
    matplotlib.rcParams.update({"font.family": "sans-serif", "font.sans-serif": ["No Such Font", "DejaVu Sans"]})


def several_fonts():
    matplotlib.rcParams.update({"font.family": ["DejaVu Serif", "DejaVu Sans:bold", "monospace"], "font.size": 13})


def sizes_as_words():
    words = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "axes.labelsize", "legend.fontsize"), "x-small")
    matplotlib.rcParams.update(words | {"axes.titlesize": "xx-large", "text.parse_math": False})


def dark():
    plt.style.use("dark_background")


def transparent():
    matplotlib.rcParams.update({"axes.facecolor": "none", "figure.facecolor": "none", "text.color": "white"})


def grey_cycle():
    matplotlib.rcParams.update({"axes.prop_cycle": matplotlib.cycler(linestyle=["-", "--"], color=["0.2", "0.6"])})
    matplotlib.rcParams.update({"lines.marker": "x", "axes.grid": True, "xtick.minor.visible": True})


def sketched():
    plt.xkcd()


SETTINGS = [
    *(defaults, themed, named_font, sizes_as_words, dark),
    *(pytest.param(each, marks=pytest.mark.second) for each in (several_fonts, transparent, grey_cycle, sketched)),
]


@pytest.fixture(params=SETTINGS)
def look(request, caplog):
    caplog.set_level(logging.ERROR, "matplotlib.font_manager")  # a font that is not there is the setting's fault
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        request.param()
        yield request.param
    plt.close("all")


def public() -> set:
    """The public functions that take `ax`."""
    functions = (getattr(plots, name) for name in plots.__all__)
    return {each for each in functions if callable(each) and "ax" in inspect.signature(each).parameters}


def test_every_plot_is_tried(drawn):
    assert public() - {plots.colours_of} == set(drawn)


def test_every_plot_takes_any_settings(look, drawn):
    for plot, table in drawn.items():
        ax = Figure(figsize=(5, 3)).subplots()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert draw(plot, table, ax=ax) is ax
            ax.figure.draw_without_rendering()
        assert ax.has_data()


def test_the_pair_takes_any_settings(look, drawn):
    pair = plots.entropy_and_kl(drawn[plots.by_layer])
    assert [ax.get_ylabel()[:2] for ax in pair] == ["en", "KL"]
    pair[0].figure.draw_without_rendering()


def test_current_axes_are_the_default(drawn):
    for plot, table in drawn.items():
        plt.figure()
        assert draw(plot, table) is plt.gca()
        plt.close("all")


def test_the_cycle_gives_the_colours(drawn):
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=["#123456"])}):
        ax = plots.agreement_by_layer(drawn[plots.agreement_by_layer].query("lens == 'raw'"), ax=Figure().subplots())
    assert {to_rgb(line.get_color()) for line in ax.lines if len(line.get_xdata())} == {to_rgb("#123456")}


def test_nothing_is_drawn_dark_on_a_dark_ground(drawn):
    with matplotlib.rc_context():
        plt.style.use("dark_background")
        ax = plots.lens_table(drawn[plots.lens_table], ax=Figure(figsize=(6, 3)).subplots())
        notes = [text for text in ax.texts if "model's token" in text.get_text()]
        rules = [line for line in ax.lines if len(line.get_xdata()) == 2]
        assert to_rgb(notes[0].get_color()) == (1, 1, 1)
        assert {to_rgb(line.get_color()) for line in rules} == {(1, 1, 1), (0, 0, 0)}
        assert min(style.faint(ax)) > 0.5


def test_ground_without_a_colour_is_what_text_contrasts_with():
    for ink, ground in (("white", "black"), ("black", "white")):
        with matplotlib.rc_context({"axes.facecolor": "none", "figure.facecolor": "none", "text.color": ink}):
            assert style.ground_of(Figure().subplots()) == ground


def test_the_old_order_still_works_and_warns(drawn):
    heat_maps = {plots.lens_table, plots.acceptance_grid, plots.tokens_per_round_grid, plots.speedup_surface}
    for plot, table in drawn.items():
        if plot in (plots.ladder, plots.exit_map, plots.patch_map, plots.probes_by_layer, plots.attribution_map):
            continue  # younger than the old order
        ax = Figure(figsize=(5, 3)).subplots()
        with pytest.warns(DeprecationWarning, match=rf"{plot.__name__}\(table, ax=ax\)"):
            found = plot(ax, table, "agreement") if plot is plots.by_layer else plot(ax, table)
        assert isinstance(found, ScalarMappable) if plot in heat_maps else found is None
        assert ax.has_data()
    one, other = Figure().subplots(1, 2)
    assert plots.entropy_and_kl(one, other, drawn[plots.by_layer]) == (one, other)


def test_a_table_may_be_named(drawn):
    for plot, table in drawn.items():
        name = next(iter(inspect.signature(plot).parameters))
        options = {"statistic": "echo"} if plot is plots.by_layer else {}
        assert plot(**{name: table}, **options, ax=Figure().subplots()).has_data()


@pytest.mark.parametrize("sides", [(False, False), (False, True), (True, True)])
def test_names_of_tokens_do_not_ask_which_ticks_are_shown(drawn, sides):
    below, above = sides
    with matplotlib.rc_context({"xtick.labelbottom": below, "xtick.labeltop": above, "xtick.top": above}):
        for plot in (plots.lens_table, plots.patch_map):
            ax = draw(plot, drawn[plot], ax=Figure(figsize=(5, 3)).subplots())
            ax.figure.draw_without_rendering()
            labels = [label for tick in ax.xaxis.get_major_ticks() for label in (tick.label1, tick.label2)]
            assert {label.get_rotation() for label in labels} == {40}
            assert any(label.get_visible() and label.get_text() for label in labels) == any(sides)


def test_letters_that_the_font_lacks_come_from_another(drawn):
    names = {"model": "\N{GREEK SMALL LETTER ALPHA}\N{DOUBLE VERTICAL LINE} one"}
    layers = pd.concat([drawn[plots.kl_by_layer], drawn[plots.kl_by_layer].assign(**names)])
    with matplotlib.rc_context({"font.family": ["cmss10"], "axes.unicode_minus": False, "text.parse_math": False}):
        figure = Figure(figsize=(5, 3))
        axes = figure.subplots(1, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plots.entropy_and_kl(layers, axes=axes)
            figure.draw_without_rendering()
            plots.one_legend(figure, axes)
            plots.one_bar(figure, [plots.lens_table(drawn[plots.lens_table], ax=axes[0])], "KL(p \N{PARALLEL TO} q)")
            figure.draw_without_rendering()


def test_notes_above_a_table_do_not_cover_one_another(drawn):
    table = drawn[plots.lens_table].to_pandas()
    for last in (table["position"].max(), table.loc[table["generated"], "position"].min()):
        ax = Figure(figsize=(3, 3)).subplots()
        draw(plots.lens_table, table[table["position"] <= last], ax=ax)
        ax.figure.draw_without_rendering()
        notes = [text.get_window_extent().padded(-1) for text in ax.texts if text.get_text().strip() in
                 ("prompt", "continuation", "• the model's token")]  # fmt: skip
        assert len(notes) == 3
        assert not any(one.overlaps(other) for one, other in itertools.combinations(notes, 2))


def test_labels_follow_what_reads_them():
    with matplotlib.rc_context({"text.parse_math": True}):
        assert plots.plain("a_$b$") == r"a_\$b\$"
    with matplotlib.rc_context({"text.parse_math": False}):
        assert plots.plain("a_$b$") == "a_$b$"
    with matplotlib.rc_context({"text.usetex": True}):
        assert plots.plain("50 % of a_$b$ (×)") == r"50 \% of a\_\$b\$ ($\times$)"
    with matplotlib.rc_context({"savefig.format": "pgf"}):
        assert plots.plain("a_b") == r"a\_b"


@pytest.mark.second
@pytest.mark.skipif(shutil.which("latex") is None or shutil.which("dvipng") is None, reason="needs LaTeX")
def test_every_plot_is_set_by_latex(drawn, tmp_path):
    with matplotlib.rc_context({"text.usetex": True}):
        for plot, table in drawn.items():
            figure = Figure(figsize=(5, 3))
            draw(plot, table, ax=figure.subplots())
            figure.savefig(tmp_path / f"{plot.__name__}.pdf")
            assert (tmp_path / f"{plot.__name__}.pdf").read_bytes().startswith(b"%PDF")
