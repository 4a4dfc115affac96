"""Loops, kinds of tokens, and acceptance apart by kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces.fabricate import fabricate
from tying.toys import toy

from probekit.prediction.predict import predict
from probekit.prediction.rounds import expected_rounds, rounds_of
from probekit.traces.token_text import looped
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace
from probekit.tying.text_kinds import (
    acceptance_by_kind,
    before_loops,
    loop_start,
    looped_share,
    positions_by_kind,
    side_by_side,
    token_kind,
    token_kinds,
)

LOOP = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]


def test_loop_start():
    assert loop_start([1, 2, 1, 2, 3], length=2) == 2
    assert loop_start([5, 5, 5], length=2) == 1  # the two runs overlap
    assert loop_start([1, 2, 3], length=2) == 3
    assert loop_start([], length=2) == 0


@given(st.lists(st.integers(0, 2), max_size=30))
def test_a_text_is_looped_from_its_loop_start_on(tokens):
    start = loop_start(tokens, 3)
    assert (looped(tokens, 3) > 0) == (start < len(tokens))
    assert looped(tokens[: start + 2], 3) == 0  # the run that repeats is not whole yet


def test_texts_are_cut_where_they_begin_to_loop():
    trace = toy([[[0] * 4 + [1] * 8], [[0] * 4]], outputs=[LOOP, [5, 6, 7, 8]])
    assert looped_share(trace) == pytest.approx(8 / 16)
    cut = before_loops(trace)
    assert [len(cut.outputs(prompt)) for prompt in cut.prompts] == [4, 4]
    assert cut.agreement(0)[0].tolist() == [False] * 4
    assert looped_share(cut) == 0
    assert len(trace.outputs(0)) == 12


@pytest.mark.parametrize("accept", [None, [[[1.0] * 12] * 2] * 2])
def test_rounds_of_a_text_that_was_cut_end_with_it(accept):
    """From index 1 of 4: two drafts, which agree, and the last token; not a third draft, which nothing could accept."""
    cut = before_loops(toy([[[1] * 12, [1] * 12]] * 2, outputs=[LOOP, LOOP], accept=accept))
    assert cut.texts["new_tokens"].tolist() == [4, 4]
    assert set(cut.texts["ended"]) == {"cut"}
    cell = predict(cut, [1], [4]).cells[0]
    assert cell.drafted_of_prompt.tolist() == [2, 2]
    assert cell.accepted_of_prompt.tolist() == [2, 2]
    assert cell.tokens_of_prompt.tolist() == [3, 3]


@pytest.mark.parametrize("text", ["greedy", "sampled"])
def test_every_cut_text_has_a_budget_of_its_own(text):
    """One prediction of texts that were cut at different places is the predictions of each by itself."""
    trace = fabricate(2, prompts=5, tokens=20, text=text)
    cuts = np.array([7, 99, 11, 3, 99])
    whole = trace.texts["new_tokens"].to_numpy()
    texts = trace.texts.assign(new_tokens=np.minimum(whole, cuts), ended=np.where(cuts < 99, "cut", "budget"))
    short = dict(zip(texts["prompt"], texts["new_tokens"], strict=True))
    tokens, layers = (frame[frame["output"] < frame["prompt"].map(short)] for frame in (trace.tokens, trace.layers))
    cells = predict(Trace.from_frames(trace.manifest, texts, tokens, layers), [1], [1, 3]).cells
    for cell in cells:
        for place, prompt in enumerate(trace.prompts):
            n = short[prompt]
            most = n if cuts[place] < 99 else 20
            if text == "greedy":
                alone = rounds_of(trace.agreement(prompt)[1, :n], cell.draft_length, most)
                assert cell.drafted_of_prompt[place] == alone.drafted.sum()
                assert cell.accepted_of_prompt[place] == alone.accepted.sum()
                assert cell.rounds_of_prompt[place] == len(alone.start)
            else:
                alone = expected_rounds(trace.accept_probability(prompt)[1, :n], cell.draft_length, most)
                assert cell.drafted_of_prompt[place] == pytest.approx(alone.drafted)
                assert cell.accepted_of_prompt[place] == pytest.approx(alone.accepted)
                assert cell.rejections_of_prompt[place] == pytest.approx(alone.rejections)


def test_a_selection_can_be_cut():
    cut = before_loops(toy([[[0] * 12], [[0] * 12]], outputs=[LOOP, LOOP]).select([1]))
    assert cut.prompts == [1]
    assert len(cut.outputs(1)) == 4


@pytest.mark.parametrize(
    ("text", "before", "kind"),
    [
        ("␣house", "the", "word start"),
        ("house", "␣the", "word inside"),
        ("House", "⏎", "word start"),
        ("House", "", "word start"),
        ("House", '"', "word start"),
        ("s", "'", "word start"),
        ("␣7", "", "digit"),
        ("42", "a", "digit"),
        (".", "a", "punctuation"),
        ("␣“", "a", "punctuation"),
        ("'t", "don", "punctuation"),
        ("⏎⏎", "a", "white space"),
        ("␣", "a", "white space"),
        ("é", "caf", "word inside"),
    ],
)
def test_token_kind(text, before, kind):
    assert token_kind(text, before) == kind


def test_token_kinds_know_the_end():
    trace = toy([[[0, 0, 0]]], outputs=[[3, 4, 0]], words=[["␣ca", "ts", "<|end|>"]])
    assert token_kinds(trace)[0].tolist() == ["word start", "word inside", "end of text"]


def test_acceptance_by_kind():
    trace = toy(
        [[[1, 0, 1, 0, 1]], [[1, 1, 1, 0, 0]]],
        words=[["␣one", "ce", "␣the", ".", "␣7"], ["␣a", "␣b", "c", "d", "!"]],
        kinds=["story", "list"],
    )
    table = acceptance_by_kind(trace, [0]).set_index(["by", "group"])
    assert table["acceptance"]["all", "all"] == pytest.approx(6 / 10)
    assert table["acceptance"]["kind of prompt", "story"] == pytest.approx(3 / 5)
    assert table["acceptance"]["kind of prompt", "list"] == pytest.approx(3 / 5)
    assert table["acceptance"]["kind of token", "word start"] == pytest.approx(4 / 4)
    assert table["acceptance"]["kind of token", "word inside"] == pytest.approx(1 / 3)
    assert table["acceptance"]["kind of token", "punctuation"] == pytest.approx(0)
    assert table["acceptance"]["kind of token", "digit"] == pytest.approx(1)
    assert table["positions"]["place in the text", "0-7"] == 10
    assert ("place in the text", "8-15") not in table.index


def test_sampled_text_counts_chances():
    trace = toy([[[1, 0]]], accept=[[[0.25, 0.75]]])
    assert acceptance_by_kind(trace, [0])["acceptance"].iloc[0] == pytest.approx(0.5)


def test_each_way_of_parting_parts_all_positions():
    trace = fabricate(prompts=5, tokens=80)
    marks = positions_by_kind(trace)
    for by in {by for by, _ in marks}:
        for prompt in trace.prompts:
            total = np.sum([marked[prompt] for (way, _), marked in marks.items() if way == by], axis=0)
            assert (total == 1).all()


def test_side_by_side_has_each_text_with_and_without_loops():
    by_layer = [[0] * 12, [0] * 4 + [1] * 8]
    greedy = toy([by_layer] * 2, outputs=[LOOP, LOOP])
    table = side_by_side({"greedy": greedy, "sampled": fabricate(depth=2, text="sampled")}, [1], [2])
    assert table[["text", "loops"]].apply(tuple, axis=1).tolist() == [
        ("greedy", "with"),
        ("greedy", "without"),
        ("sampled", "with"),
        ("sampled", "without"),
    ]
    with_loops, without = table["acceptance"][0], table["acceptance"][1]
    assert (with_loops, without) == (pytest.approx(8 / 12), 0.0)
    assert (table["looped"][0], table["looped"][1]) == (pytest.approx(8 / 12), 0.0)


def test_a_text_that_was_cut_keeps_its_residuals(tiny, tmp_path):
    kept = trace(tiny, [[1, 2], [3]], tmp_path / "run", max_new_tokens=30, keep_residuals=[2])
    cut = before_loops(kept)
    whole, short = kept.residuals(2), cut.residuals(2)
    assert len(short) == len(cut.tokens) <= len(whole)
    for prompt in cut.prompts:
        rows = cut.residuals_of(prompt, 2)
        assert len(rows) == len(cut.outputs(prompt))
        assert np.array_equal(rows, kept.residuals_of(prompt, 2)[: len(rows)])
