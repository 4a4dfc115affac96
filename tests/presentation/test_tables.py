"""The study's tables, on values worked by hand and against plain counting."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from presentation.fabricate_study import fabricate_costs, fabricate_trace
from traces.fabricate import fabricate

from probekit.choice.choose import choose
from probekit.errors import InputError
from probekit.prediction.predict import predict
from probekit.presentation import tables
from probekit.presentation.latex import to_latex
from probekit.traces.trace import Trace


@pytest.fixture(scope="module")
def trace() -> Trace:
    return fabricate_trace("tales-tied", depth=4, prompts=5, tokens=16, seed=3)


# -- layers
def test_layers_are_pooled_over_generated_tokens_only(trace: Trace):
    table = tables.layers_table(trace, "mine").set_index(["lens", "layer"])
    assert set(table["model"]) == {"mine"}
    assert len(table) == 2 * 5
    own = trace.layers[(trace.layers["output"] >= 0) & (trace.layers["lens"] == "raw") & (trace.layers["layer"] == 2)]
    row = table.loc[("raw", 2)]
    assert row["rows"] == len(own) == trace.texts["new_tokens"].sum()
    for name, column in (("agreement", "agrees"), ("echo", "echo"), ("entropy", "entropy"), ("kl", "kl")):
        assert row[name] == pytest.approx(own[column].mean())
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["in_top50"] == pytest.approx((own["model_rank"] < 50).mean())
    gibberish = ~own["agrees"] & ~own["echo"] & (own["model_rank"] >= 50)
    assert row["gibberish"] == pytest.approx(gibberish.mean())
    assert table.loc[("final-norm", 4), "agreement"] == 1


def test_layers_of_an_agreement_trace_leave_the_rest_open():
    table = tables.layers_table(fabricate(depth=3, prompts=3, statistics="agreement"))
    assert set(table["lens"]) == {"final-norm"}
    assert table["agreement"].notna().all()
    assert table[["echo", "entropy", "kl_low", "gibberish"]].isna().all(axis=None)


# -- cells
def test_cells_carry_their_speedup(trace: Trace):
    prediction = predict(trace, draft_lengths=(1, 3))
    choice = choose(prediction, fabricate_costs(4, 3))
    table = tables.cells_table(prediction, choice, "mine")
    assert list(table.columns[:5]) == ["model", "drafter", "exit_layer", "draft_length", "first_round"]
    assert len(table) == 3 * 2
    best = choice.ranking[0]
    row = table[(table["exit_layer"] == best.exit_layer) & (table["draft_length"] == best.draft_length)].iloc[0]
    assert (row["speedup"], row["speedup_low"], row["speedup_high"]) == (best.speedup, *best.interval)
    assert row["acceptance_rate"] == prediction.cell(*best.cell).acceptance_rate
    assert tables.cells_table(prediction)["speedup"].isna().all()


def test_cells_of_a_draft_model_have_no_exit_layer():
    prediction = predict(fabricate(depth=3, prompts=3, drafter=True), draft_lengths=(2,))
    choice = choose(prediction, fabricate_costs(3, 2, drafter=True))
    table = tables.cells_table(prediction, choice)
    own = table[table["drafter"] == "fabricated-drafter"]
    assert own["exit_layer"].isna().all()
    assert own["speedup"].notna().all()


# -- validation
def cell(**given) -> dict:
    counts = {"rounds": 4, "drafted": 8, "accepted": 4, "tokens": 8}
    return {
        "exit_layer": 2, "draft_length": 2, "predicted": counts, "measured": counts | {"accepted": 3},
        "rounds_equal": False, "tokens_equal": True, "ties": 1, "speedup_predicted": 1.5, "speedup_measured": 1.4,
        "speedup_measured_quantiles": [1.3, 1.45], **given,
    }  # fmt: skip


def test_validation_puts_prediction_beside_measurement():
    table = tables.validation_table({"cells": [cell(), cell(exit_layer=None, drafter="small")]}, "mine")
    row = table.iloc[0]
    assert (row["predicted_acceptance_rate"], row["measured_acceptance_rate"]) == (0.5, 0.375)
    assert (row["speedup_measured_20"], row["speedup_measured_80"]) == (1.3, 1.45)
    assert pd.isna(table.iloc[1]["exit_layer"])
    assert table.iloc[1]["drafter"] == "small"


def test_validation_without_timing_or_equality():
    sampled = cell(rounds_equal=None, tokens_equal=None, speedup_measured=None, speedup_measured_quantiles=None)
    row = tables.validation_table({"cells": [sampled]}, "mine").iloc[0]
    assert row[["rounds_equal", "speedup_measured", "speedup_measured_20"]].isna().all()


def test_intervals_of_a_cell_come_from_its_own_rounds():
    rounds = pd.DataFrame(
        [
            # prompt 0: 2 rounds, 4 drafted, 4 accepted; prompt 1: 2 rounds, 4 drafted, none; another cell's in between
            (0, 2, 2, 2, 2, 2), (0, 2, 2, 2, 2, 2), (0, 3, 2, 2, 0, 0), (1, 2, 2, 2, 0, 0), (1, 2, 2, 2, 0, None),
        ],
        columns=["prompt", "exit_layer", "draft_length", "drafted", "accepted_predicted", "accepted_measured"],
    )  # fmt: skip
    row = tables.validation_table({"cells": [cell()]}, "mine", rounds).iloc[0]
    low, high = row["predicted_acceptance_rate_low"], row["predicted_acceptance_rate_high"]
    assert (low, high) == (pytest.approx(0, abs=1e-4), 1)  # two prompts: all of them, and none
    assert (row["predicted_rounds_low"], row["predicted_rounds_high"]) == (4, 4)  # whichever prompts are drawn
    assert row["measured_rounds_low"] * row["measured_rounds_high"] == pytest.approx(
        3**2
    )  # the round that only the prediction has is not counted
    alone = tables.validation_table({"cells": [cell()]}, "mine", rounds[rounds["prompt"] == 0])
    assert "predicted_rounds_low" not in alone or alone["predicted_rounds_low"].isna().all()


# -- run lengths
def test_run_lengths_count_what_is_there():
    trace = fabricate(depth=3, prompts=4, tokens=20, seed=5)
    table = tables.run_lengths_table(trace, [2], "mine")
    runs = []
    for prompt in trace.prompts:
        current = 0
        for agrees in trace.agreement(prompt)[2]:
            if agrees:
                current += 1
            else:
                runs.append(current)
                current = 0
    counts = table.set_index("run")["count"]
    assert counts[counts > 0].to_dict() == pd.Series(runs).value_counts().to_dict()
    assert table["at_least"].tolist() == [sum(length >= run for length in runs) for run in table["run"]]
    assert (table["at_least_low"] <= table["at_least"]).all()
    assert (table["at_least"] <= table["at_least_high"]).all()
    assert table["geometric_at_least"].iloc[0] == pytest.approx(table["geometric"].sum())


# -- the sweep
def test_sweep_puts_measured_cells_first_and_adds_up():
    cells = pd.DataFrame(
        {"drafter": "self", "exit_layer": [1, 1, 2], "draft_length": [1, 2, 1], "speedup": [0.5, 1.0, 2.0]}
    )
    validation = pd.DataFrame({"drafter": ["self"], "exit_layer": [2], "draft_length": [1], "speedup_measured": [1.25]})
    table = tables.sweep_table(cells, validation, autoregressive_s=0.1, tokens=100, trace_s=7.0)
    running = table[table["source"] != "trace"]
    assert running["source"].tolist() == ["measured", "extrapolated", "extrapolated"]
    # 100 tokens x 0.1 s: 8 s at 1.25x, then 20 s at 0.5x, then 10 s at 1x
    assert running["seconds"].tolist() == pytest.approx([8.0, 28.0, 38.0])
    assert table[table["source"] == "trace"]["seconds"].tolist() == [7.0] * 3


# -- the lens table
def test_lens_table_reads_from_the_embedding_to_the_model(trace: Trace):
    table = tables.lens_table(trace, 0)
    positions = len(trace.prompt_ids(0)) + len(trace.outputs(0)) - 1
    assert len(table.inputs) == len(table.generated) == positions
    assert (len(table.cells), len(table.cells[0])) == (5, positions)
    first = table.generated.index(True)
    spoken = trace.tokens[(trace.tokens["prompt"] == 0) & trace.tokens["generated"]]["text"].tolist()
    assert [token for token, _ in table.cells[4]][first:] == spoken  # greedy text is what the model says
    assert table.inputs[first + 1 :] == spoken[:-1]
    assert table.to_json()["layers"][4]["layer"] == 4
    assert "tales-tied" in repr(table)


def test_lens_table_shows_markup_as_text(trace: Trace):
    page = tables.lens_table(trace, 0)._repr_html_()
    shown = {token for row in tables.lens_table(trace, 0).cells for token, _ in row}
    assert "<b>" in shown
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_lens_table_greys_the_prompt_and_marks_the_models_token(trace: Trace):
    table = tables.lens_table(trace, 0)
    page = table._repr_html_()
    assert page.count('<th scope="row">') == 5
    assert page.index("model, 4") < page.index(">3<") < page.index(">0<")
    assert page.count("rgba(128,128,128") == 5 * table.generated.count(False)
    *layers, model = table.cells
    agreeing = sum(cell[0] == own[0] for row in layers for cell, own in zip(row, model, strict=True))
    assert page.count(" •</td>") == agreeing > 0


def test_window_keeps_the_border_between_prompt_and_continuation(trace: Trace):
    prompt = max(trace.prompts, key=lambda prompt: len(trace.outputs(prompt)))
    whole = tables.lens_table(trace, prompt)
    first = whole.generated.index(True)
    window = whole.window(4, before=1)
    assert window.generated == [False, True, True, True]
    assert window.cells[1] == whole.cells[1][first - 1 : first + 3]
    assert whole.window(1000, before=1000).inputs == whole.inputs


def test_lens_table_without_the_top_ten_names_what_it_knows():
    table = tables.lens_table(fabricate(depth=2, prompts=1, tokens=4, seed=1), 0)
    assert all(token.startswith(("␣w", "#", "w")) for row in table.cells for token, _ in row)


def test_lens_table_says_what_is_missing(trace: Trace):
    with pytest.raises(InputError, match="agreement only"):
        tables.lens_table(fabricate(depth=2, prompts=1, statistics="agreement"), 0)
    with pytest.raises(InputError, match="no 'raw' lens: it has final-norm"):
        tables.lens_table(fabricate(depth=2, prompts=1, lenses=("final-norm",)), 0, "raw")
    with pytest.raises(InputError, match="prompt 99 is not in this trace"):
        tables.lens_table(trace, 99)


# -- LaTeX
def test_latex_is_booktabs_and_escaped():
    frame = pd.DataFrame(
        {
            "model": ["a_b & $5", "100 % {x}"],
            "rate": [0.12345, np.nan],
            "rate_low": [0.1, np.nan],
            "rate_high": [0.2, np.nan],
            "equal": [True, None],
            "exit_layer": pd.array([3, None], dtype="Int64"),
        }
    )
    latex = to_latex(frame, "Rates of 50 % & more", "tab:rates")
    assert r"\toprule" in latex
    assert r"\caption{Rates of 50 \% \& more}" in latex
    assert r"{lS[table-format=1.3]@{\;}lcS[table-format=1]}" in latex
    assert r"model & \multicolumn{2}{c}{rate} & equal & {exit layer} \\" in latex
    assert r"a\_b \& \$5 & 0.123 & $[0.100, 0.200]$ & yes & 3 \\" in latex
    assert r"100 \% \{x\} & {--} &  & -- & {--} \\" in latex
    assert "longtable" not in latex


def test_latex_aligns_decimal_marks():
    frame = pd.DataFrame({"x": [0.5, 123.456, -7.0], "x_low": [0.4, 99.0, -8.25], "x_high": [0.6, 200.0, np.nan]})
    latex = to_latex(frame, "Numbers", "tab:n", decimals={"x": 2})
    assert "table-format=-3.2" in latex
    assert r"0.50 & $[\phantom{0}0.40, \phantom{00}0.60]$ \\" in latex
    assert r"123.46 & $[99.00, 200.00]$ \\" in latex
    assert r"-7.00 &  \\" in latex
    whole = to_latex(pd.DataFrame({"n": [3.0, 12.0, np.inf]}), "Whole", "tab:n")
    assert "table-format=2]" in whole
    assert "{--}" in whole


@pytest.mark.parametrize(
    ("values", "decimals"), [((0.2, 0.5, 1.0), 3), ((1.5, 30.0), 1), ((1234.5,), 0), ((0.0, 0.0012), 5)]
)
def test_latex_gives_the_middle_number_three_digits(values, decimals):
    latex = to_latex(pd.DataFrame({"x": values}), "Numbers", "tab:x")
    assert f"{values[-1]:.{decimals}f} \\" in latex


def test_a_wide_table_takes_both_columns():
    narrow, wide = pd.DataFrame({"a": [1]}), pd.DataFrame({f"column_{place}": ["some text"] for place in range(6)})
    assert r"\begin{table}" in to_latex(narrow, "Narrow", "tab:a")
    assert r"\begin{table*}" in to_latex(wide, "Wide", "tab:b")


def test_a_table_too_wide_for_the_page_is_set_smaller():
    frame = pd.DataFrame({f"column_{place}": ["some text of a cell"] for place in range(5)})
    sizes = [
        int(to_latex(frame, "Wide", "tab:w", width=width).partition(r"\fontsize{")[2][0]) for width in (9, 6.5, 5, 2)
    ]
    assert sizes[0] == 8
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 5


def test_a_table_without_rows_is_a_table():
    latex = to_latex(pd.DataFrame({"model": [], "x": pd.Series([], dtype=float)}), "None", "tab:none")
    assert r"\midrule" in latex


def test_latex_heads_may_be_latex():
    frame = pd.DataFrame({"draft_length": [2], "100 %": ["x"]})
    latex = to_latex(frame, "Heads", "tab:heads", headings={"draft_length": r"\shortstack[r]{a\\b}"})
    assert r"{\shortstack[r]{a\\b}} & 100 \% \\" in latex


@pytest.mark.parametrize("sign", [*"_%&#${}\\~^"])
def test_latex_takes_any_sign_as_text(sign: str):
    frame = pd.DataFrame({f"a{sign}b": [f"c{sign}d"]})
    latex = to_latex(frame, f"e{sign}f", "tab:signs")
    named = {"\\": r"\textbackslash", "~": r"\textasciitilde", "^": r"\textasciicircum"}
    expected = named.get(sign, "\\" + sign)
    heads = " " if sign == "_" else expected  # names are written in words
    assert f"a{heads}" in latex
    assert f"c{expected}" in latex
    assert f"e{expected}" in latex


def test_latex_is_set_small_and_the_size_ends_with_the_table():
    short = to_latex(pd.DataFrame({"n": [1]}), "One", "tab:n")
    assert short.index(r"\begin{table}") < short.index(r"\fontsize{8}{9.6}") < short.index(r"\begin{tabular}")
    long = to_latex(pd.DataFrame({"n": range(41)}), "Many", "tab:n")
    assert long.startswith(r"{\fontsize{8}{9.6}")
    assert long.rstrip().endswith("}")
    for latex in (short, long):
        bare = latex.replace(r"\{", "").replace(r"\}", "")
        assert bare.count("{") == bare.count("}")


def test_latex_of_signs_needs_no_unicode_font():
    latex = to_latex(pd.DataFrame({"token": ["␣a⏎", "⟨200B⟩"]}), "Tokens", "tab:tokens")
    assert latex.isascii()
    assert r"\textvisiblespace{}a$\hookleftarrow$" in latex
    assert r"$\langle$200B$\rangle$" in latex


def test_latex_of_many_rows_breaks_over_pages():
    latex = to_latex(pd.DataFrame({"n": range(41)}), "Numbers", "tab:n")
    assert r"\begin{longtable}" in latex


def test_costs_keep_their_model():
    table = tables.costs_table(fabricate_costs(4, 2), "mine")
    assert list(table.columns) == ["model", "step", "exit_layer", "rows", "seconds"]
