import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.decoding.detokenize import TextStream, check_stop, decode_tokens
from probekit.decoding.results import Decoded
from probekit.decoding.sequence import SequenceState
from probekit.errors import InputError
from probekit.models.synthetic import byte_tokenizer

BYTES = byte_tokenizer(257, ends=True)
END = 256


def ids(text):
    return BYTES(text)["input_ids"]


def transcript(budget=20, stop=(), pieces=None):
    on_accept = None if pieces is None else pieces.append
    return SequenceState(0, [1, 2], budget, frozenset([END]), BYTES, stop, on_accept)


def test_rounds_are_booked_and_counted():
    text = transcript(budget=8)
    text.first(5)
    assert text.position == 2
    text.round([6, 7, 8], 3, 3, 9)  # all accepted, bonus
    text.round([1, 1], 2, 0, 10)  # rejected at once
    assert text.limit(5) == 1
    text.round([11], 1, 1, 12)
    done = text.decoded(seconds={}, method="self-speculative", draft_length=5)
    assert done.tokens == [5, 6, 7, 8, 9, 10, 11, 12]
    assert (done.drafted, done.accepted, done.ended) == ([3, 2, 1], [3, 0, 1], "budget")
    assert done.starts == [1, 5, 6]
    assert (done.rounds, done.emitted, done.rejections) == (3, 7, 1)
    assert done.accepted_by_position == [2, 1, 1, 0, 0]
    assert done.acceptance_rate == 4 / 6
    assert done.alpha == 4 / 5
    assert done.tokens_per_round == 7 / 3


def test_an_accepted_end_counts_as_accepted_and_no_bonus_follows():
    text = transcript()
    text.first(5)
    text.round([6, END, 7], 3, 3, 8)
    done = text.decoded(seconds={}, method="self-speculative", draft_length=3)
    assert done.tokens == [5, 6, END]
    assert (done.drafted, done.accepted, done.ended) == ([3], [2], "eos")
    assert done.rejections == 0  # accepted = min(k, N - i)
    assert done.alpha == 1.0
    assert done.text == decode_tokens(BYTES, [5, 6])


def test_an_end_that_verification_adds_is_no_acceptance():
    text = transcript()
    text.first(5)
    text.round([6, 7], 2, 1, END)
    done = text.decoded(seconds={}, method="self-speculative", draft_length=2)
    assert (done.tokens, done.accepted, done.ended, done.rejections) == ([5, 6, END], [1], "eos", 1)


def test_budget_of_one_and_an_end_at_once():
    text = transcript(budget=1)
    text.first(5)
    done = text.decoded(seconds={}, method="autoregressive")
    assert (done.ended, done.rounds, done.acceptance_rate, done.alpha, done.tokens_per_round) == (
        "budget",
        0,
        None,
        None,
        None,
    )
    text = transcript(budget=1)
    text.first(END)
    assert (text.ended, text.text) == ("eos", "")


def test_a_stop_string_that_spans_rounds_cuts_tokens_behind_it_and_text_before_it():
    text = transcript(stop=("stop",))
    text.first(ids("a")[0])
    text.round(ids(" st"), 3, 3, ids("o")[0])
    text.round(ids("p it"), 4, 4, ids("!")[0])
    done = text.decoded(seconds={}, method="self-speculative", draft_length=4)
    assert done.tokens == ids("a stop")
    assert (done.text, done.ended, done.accepted) == ("a ", "stop", [3, 1])


def test_the_earliest_stop_string_cuts_the_text():
    text = transcript(stop=("cd", "bcd", "x"))
    for token in ids("a"):
        text.first(token)
    text.round(ids("bcd"), 3, 3, ids("e")[0])
    assert (text.ended, text.text, text.accepted) == ("stop", "a", [3])


def test_pieces_hold_back_half_characters_and_possible_stops():
    pieces = []
    text = transcript(stop=("ende",), pieces=pieces)
    first, second = ids("é")
    text.first(first)
    text.round([second, *ids("en")], 3, 3, ids("d")[0])
    text.round(ids("x"), 2, 1, ids("e")[0])
    text.round([], 0, 0, END)
    assert [(piece.text, piece.how) for piece in pieces] == [
        ("", "prefill"),
        ("é", "accepted"),
        ("", "bonus"),
        ("endx", "accepted"),
        ("e"[:0], "corrected"),
        ("e", "bonus"),
    ]


def test_half_a_character_at_the_end_comes_out_as_a_replacement():
    pieces = []
    text = transcript(budget=2, pieces=pieces)
    first, _ = ids("é")
    text.first(ids("a")[0])
    text.round([], 0, 0, first)
    assert text.text == "a\ufffd" == "".join(piece.text for piece in pieces)


@given(st.lists(st.integers(0, 256), min_size=1, max_size=12), st.text(max_size=8))
def test_streamed_text_is_the_decoded_text(tokens, spelled):
    tokens = [*ids(spelled), *tokens]
    stream = TextStream(BYTES)
    assert "".join([stream.push(token) for token in tokens]) + stream.rest() == decode_tokens(BYTES, tokens)


@given(
    st.lists(st.sampled_from(ids("abc é")), min_size=1, max_size=30),
    st.lists(st.integers(0, 4), min_size=30, max_size=30),
    st.lists(st.text("abc ", min_size=1, max_size=3), max_size=2),
    st.booleans(),
)
def test_the_same_tokens_end_alike_however_they_are_accepted(tokens, runs, stops, ends):
    """One token a round, or in runs: the same text, the same end, and pieces that add up to it."""
    budget = len(tokens)
    tokens = [*tokens[:-1], END] if ends else tokens
    single = transcript(budget, tuple(stops))
    single.first(tokens[0])
    while single.ended is None:
        single.round([], 0, 0, tokens[len(single.tokens)])

    pieces = []
    grouped = transcript(budget, tuple(stops), pieces)
    grouped.first(tokens[0])
    for length in [*runs, *[0] * budget]:
        if grouped.ended is None:
            at, limit = len(grouped.tokens), grouped.limit(length)
            grouped.round(tokens[at : at + limit], limit, limit, tokens[at + limit])
    assert (grouped.tokens, grouped.text, grouped.ended) == (single.tokens, single.text, single.ended)
    assert "".join(piece.text for piece in pieces) == single.text
    assert [token for piece in pieces for token in piece.tokens] == single.tokens
    if single.ended == "stop":
        whole = decode_tokens(BYTES, single.tokens)
        assert any(stop in whole for stop in stops)
        assert not any(stop in single.text for stop in stops)
    else:
        assert not any(stop in single.text for stop in stops)


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]])
def test_empty_stop_strings_are_refused(stop):
    with pytest.raises(InputError, match="stop strings must be texts that are not empty"):
        check_stop(stop, BYTES)


def test_stop_strings_need_a_tokenizer_and_one_string_is_one_stop():
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        check_stop("a", None)
    assert check_stop("abc", BYTES) == ("abc",)
    assert check_stop((), None) == ()


def test_a_result_goes_to_json_and_says_what_it_is():
    done = Decoded("early-exit", 0, [1], [2, 3], "x", "stop", [0], [0], exit_layer=2, lossless=False)
    document = json.loads(json.dumps(done.to_json()))
    assert document["method"] == "early-exit"
    assert document["rounds"] == 1
    assert "ended by a stop string" in done.summary()
    assert "Not verified" in done.summary()
    spoken = Decoded("self-speculative", 0, [1], [2, 3, 4], "x", "eos", [2], [1], seconds={"total": 0.5}).summary()
    assert "6.0 tokens/s" in spoken
    assert "1 rounds accepted 1 of 2 drafts (50.0%), 2.00 tokens per round" in spoken


def test_it_shows_its_text_and_turns_into_a_row_a_round():
    text = transcript(budget=30)
    for token in ids("<b>&"):
        text.first(token) if not text.tokens else text.round([], 0, 0, token)
    text.round(ids("no"), 3, 2, END)
    done = text.decoded(seconds={"total": 0.5}, method="self-speculative", exit_layer=2, draft_length=3)
    rounds = done.to_pandas()
    assert rounds["emitted"].sum() == done.emitted
    assert rounds.iloc[-1].to_dict() == {"start": 4, "drafted": 3, "accepted": 2, "emitted": 3}
    page = done._repr_html_()
    assert "&lt;b&gt;&amp;no" in page
    assert "<b>" not in page
    assert f"{done.rounds} rounds" in page


@pytest.mark.parametrize("end", [3, 5])
def test_any_of_several_ends_ends_a_text(end):
    state = SequenceState(0, [1], 9, frozenset({3, 5}))
    state.first(7)
    state.round([8, end, 8], 3, 3, 2)
    assert (state.tokens, state.ended, state.accepted) == ([7, 8, end], "eos", [2])
