"""Rounds: against a step-by-step simulation for greedy text, enumeration and Monte Carlo for sampled text."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces.fabricate import fabricate

from probekit.errors import InputError
from probekit.prediction.intervals import bootstrap_ratio, drawn_indices
from probekit.prediction.predict import predict
from probekit.prediction.rounds import closed_form_tokens_per_round, expected_rounds, rounds_of
from probekit.prediction.table import SCHEMA

END = 0
CONVENTIONS = ("prefill", "draft")


def simulate(agrees, draft_length, budget, first_round, ends):
    """The truth, slowly: a decoder that writes token by token, drafting with a drafter that agrees where it is told.

    The model's text is 1, 2, 3, ... and, where `ends`, END as its last token.
    """
    model = [*range(1, len(agrees)), END if ends else len(agrees)]
    written, rounds = [], []
    if first_round == "prefill":
        written.append(model[0])
    while not (written and written[-1] == END) and len(written) < budget:
        room = budget - len(written)
        drafts, right = [], True
        while len(drafts) < draft_length and len(drafts) < room - 1:
            place = len(written) + len(drafts)
            # past a mistake, or past the end of the text, the drafter writes something that nobody will see
            right = right and place < len(agrees) and bool(agrees[place])
            drafts.append(model[place] if right else -1)
        start, accepted, ended = len(written), 0, False
        for draft in drafts:
            if draft != model[len(written)]:
                break
            written.append(draft)
            accepted += 1
            if draft == END:
                ended = True
                break
        rejected = not ended and accepted < len(drafts)
        if not ended:
            written.append(model[len(written)])
        rounds.append((start, len(drafts), accepted, len(written) - start, rejected))
    assert written == model
    return rounds


@st.composite
def texts(draw):
    """(agrees, budget, ends): a text is as long as its budget, or ends before, or ends right there."""
    agrees = draw(st.lists(st.booleans(), min_size=1, max_size=40))
    if draw(st.booleans()):  # long runs are where the corners are
        agrees = [draw(st.integers(0, 9)) > 0 for _ in agrees]
    spare = draw(st.integers(0, 12))
    ends = spare > 0 or draw(st.booleans())
    return agrees, len(agrees) + spare, ends


@given(texts(), st.integers(1, 12), st.sampled_from(CONVENTIONS))
def test_rounds_equal_a_step_by_step_simulation(text, draft_length, first_round):
    agrees, budget, ends = text
    rounds = rounds_of(np.array(agrees), draft_length, budget, first_round)
    found = list(zip(*(column.tolist() for column in rounds), strict=True))
    assert found == simulate(agrees, draft_length, budget, first_round, ends)


@given(texts(), st.integers(1, 12), st.sampled_from(CONVENTIONS))
def test_certain_acceptance_is_the_greedy_case(text, draft_length, first_round):
    agrees, budget, _ = text
    rounds = rounds_of(np.array(agrees), draft_length, budget, first_round)
    expected = expected_rounds(np.array(agrees, dtype=np.float32), draft_length, budget, first_round)
    counts = (len(rounds.start), rounds.drafted.sum(), rounds.accepted.sum(), rounds.rejected.sum())
    assert (expected.rounds, expected.drafted, expected.accepted, expected.rejections) == counts
    assert np.flatnonzero(expected.start_probability).tolist() == rounds.start.tolist()
    assert expected.tokens == rounds.emitted.sum()


@given(
    st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=7),
    st.integers(1, 6),
    st.integers(0, 3),
    st.sampled_from(CONVENTIONS),
)
def test_expected_rounds_equal_enumeration(w, draft_length, spare, first_round):
    """Each position is decided at most once, so the expectation is a sum over all 2^N agreement strings."""
    budget = len(w) + spare
    counts = dict.fromkeys(("rounds", "drafted", "accepted", "rejections"), 0.0)
    starts, positions, lengths = np.zeros(len(w)), np.zeros(draft_length), np.zeros(draft_length + 1)
    for bits in itertools.product([False, True], repeat=len(w)):
        chance = np.prod([each if bit else 1 - each for each, bit in zip(w, bits, strict=True)])
        rounds = rounds_of(np.array(bits), draft_length, budget, first_round)
        counts["rounds"] += chance * len(rounds.start)
        counts["drafted"] += chance * rounds.drafted.sum()
        counts["accepted"] += chance * rounds.accepted.sum()
        counts["rejections"] += chance * rounds.rejected.sum()
        starts[rounds.start] += chance
        positions += chance * (rounds.accepted[:, None] > np.arange(draft_length)).sum(axis=0)
        np.add.at(lengths, rounds.drafted, chance)
    expected = expected_rounds(np.array(w), draft_length, budget, first_round)
    for name, value in counts.items():
        assert getattr(expected, name) == pytest.approx(value, abs=1e-12), name
    np.testing.assert_allclose(expected.start_probability, starts, atol=1e-12)
    np.testing.assert_allclose(expected.accepted_by_position, positions, atol=1e-12)
    np.testing.assert_allclose(expected.rounds_by_drafted, lengths, atol=1e-12)


def test_expected_rounds_equal_a_running_decoder_on_a_toy_chain():
    """Texts of a Markov chain, read for w, against real speculative decoding (accept or reject, residual) of them."""
    random = np.random.default_rng(0)
    # next token given the last; token 0 ends
    p, q = (random.dirichlet([0.3, 2, 2, 2], size=4) for _ in range(2))
    budget, draft_length, texts = 12, 3, 1500

    def decode():
        written, rounds, drafted, accepted = [random.choice(4, p=p[1])], 0, 0, 0
        while written[-1] != 0 and len(written) < budget:
            k = min(draft_length, budget - len(written) - 1)
            drafts, last = [], written[-1]
            for _ in range(k):
                drafts.append(last := random.choice(4, p=q[last]))
            rounds, drafted = rounds + 1, drafted + k
            for draft in drafts:
                last = written[-1]
                if random.random() >= p[last][draft] / q[last][draft]:
                    rest = np.maximum(p[last] - q[last], 0)
                    written.append(random.choice(4, p=rest / rest.sum()))
                    break
                written.append(draft)
                accepted += 1
                if draft == 0:
                    break
            else:
                written.append(random.choice(4, p=p[written[-1]]))
        return rounds, drafted, accepted

    def read():
        text = [random.choice(4, p=p[1])]
        while text[-1] != 0 and len(text) < budget:
            text.append(random.choice(4, p=p[text[-1]]))
        before = [1, *text[:-1]]
        w = np.minimum(1, q[before, text] / p[before, text])
        found = expected_rounds(w, draft_length, budget)
        return found.rounds, found.drafted, found.accepted

    measured, predicted = (np.array([one() for _ in range(texts)], dtype=float) for one in (decode, read))
    error = np.sqrt((measured.var(axis=0) + predicted.var(axis=0)) / texts)
    difference = np.abs(measured.mean(axis=0) - predicted.mean(axis=0))
    assert (difference < 4 * error).all(), (difference, error)
    assert (error < 0.05 * measured.mean(axis=0)).all()  # else the test could not fail
    assert (predicted.var(axis=0) < measured.var(axis=0)).all()  # the reader knows the expectation, given the text


def test_a_text_worked_by_hand():
    """y0 | y1 y2 x3 | x4 | y5 y6 end7: budget 10, K = 2. Agreements at 1, 2, 5, 6, 7."""
    agrees = np.array([0, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    rounds = rounds_of(agrees, 2, 10)
    assert rounds.start.tolist() == [1, 4, 5]
    assert rounds.drafted.tolist() == [2, 2, 2]
    assert rounds.accepted.tolist() == [2, 0, 2]
    assert rounds.emitted.tolist() == [3, 1, 3]
    assert rounds.rejected.tolist() == [False, True, False]
    # with K = 4 the last round meets the end inside its draft: no bonus token follows
    rounds = rounds_of(agrees, 4, 10)
    assert rounds.start.tolist() == [1, 4, 5]
    assert rounds.drafted.tolist() == [4, 4, 4]
    assert rounds.accepted.tolist() == [2, 0, 3]
    assert rounds.emitted.tolist() == [3, 1, 3]
    assert rounds.rejected.tolist() == [True, True, False]
    # under `draft` the first round starts at 0, and is rejected there
    assert rounds_of(agrees, 4, 10, "draft").start.tolist() == [0, 1, 4, 5]


def test_a_budget_cuts_the_last_drafts():
    everything = np.ones(6, dtype=bool)
    rounds = rounds_of(everything, 3, 6)
    assert rounds.start.tolist() == [1, 5]
    assert rounds.drafted.tolist() == [3, 0]  # one token is left: nothing is drafted for it
    assert rounds.emitted.tolist() == [4, 1]
    assert rounds_of(np.array([True]), 3, 1).start.tolist() == []  # the prefill wrote it all
    alone = rounds_of(np.array([True]), 3, 1, "draft")
    assert (alone.drafted.tolist(), alone.emitted.tolist(), alone.rejected.tolist()) == ([0], [1], [False])


def test_closed_form():
    assert closed_form_tokens_per_round(0.5, 3) == pytest.approx((1 - 0.5**4) / 0.5)
    assert closed_form_tokens_per_round(1.0, 3) == 4
    assert closed_form_tokens_per_round(0.0, 3) == 1
    assert closed_form_tokens_per_round(None, 3) is None


@pytest.mark.parametrize("first_round", CONVENTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_every_cell_is_the_sum_of_its_texts(seed, first_round):
    trace = fabricate(depth=5, prompts=7, tokens=20, seed=seed, drafter=True)
    prediction = predict(trace, draft_lengths=(1, 3, 8, 30), first_round=first_round, with_rounds=True)
    assert len(prediction.cells) == (4 + 1) * 4
    listed = {(row.prompt, row.exit_layer, row.draft_length): row for row in prediction.rounds}
    assert len(listed) == 7 * len(prediction.cells)
    for cell in prediction.cells:
        accepted, rejections = [], 0
        for place, prompt in enumerate(trace.prompts):
            agrees = (
                trace.drafter_agreement(prompt) if cell.exit_layer is None else trace.agreement(prompt)[cell.exit_layer]
            )
            rounds = rounds_of(agrees, cell.draft_length, 20, first_round)
            row = listed[prompt, cell.exit_layer, cell.draft_length]
            assert row.drafted == tuple(rounds.drafted.tolist())
            assert row.accepted == tuple(rounds.accepted.tolist())
            assert cell.rounds_of_prompt[place] == len(rounds.start)
            assert cell.drafted_of_prompt[place] == rounds.drafted.sum()
            assert cell.tokens_of_prompt[place] == rounds.emitted.sum()
            accepted += rounds.accepted.tolist()
            rejections += int(rounds.rejected.sum())
        assert cell.accepted_by_position == [sum(a > j for a in accepted) for j in range(cell.draft_length)]
        assert cell.accepted == sum(accepted)
        assert cell.rejections == rejections
        assert cell.acceptance_rate == cell.accepted / cell.drafted
        assert cell.alpha == cell.accepted / (cell.accepted + rejections)
        assert cell.tokens_per_round == cell.tokens / cell.rounds
        low, high = cell.acceptance_rate_interval
        assert low <= cell.acceptance_rate <= high


def test_expected_cells_are_the_sum_of_their_texts():
    trace = fabricate(depth=5, prompts=7, tokens=20, seed=1, text="sampled", drafter=True)
    prediction = predict(trace, draft_lengths=(2, 7), with_rounds=True)
    assert prediction.exact
    for cell in prediction.cells:
        of = {
            prompt: trace.drafter_accept_probability(prompt)
            if cell.exit_layer is None
            else trace.accept_probability(prompt)[cell.exit_layer]
            for prompt in trace.prompts
        }
        expected = [expected_rounds(w, cell.draft_length, 20) for w in of.values()]
        for name in ("rounds", "drafted", "accepted", "rejections", "tokens"):
            assert getattr(cell, name) == pytest.approx(sum(getattr(each, name) for each in expected)), name
        positions = sum(each.accepted_by_position for each in expected)
        np.testing.assert_allclose(cell.accepted_by_position, positions)
        low, high = cell.counts_interval["accepted"]
        assert low < cell.accepted < high
    row = prediction.rounds[0].to_json()
    assert set(row) == {"prompt", "exit_layer", "draft_length", "drafter", "accept_probability"}
    assert row["accept_probability"] == pytest.approx(trace.accept_probability(0)[1])
    overlap = np.concatenate([trace.values(prompt, "overlap")[2] for prompt in trace.prompts]).mean()
    assert prediction.cell(2, 7).expected_acceptance == pytest.approx(overlap, rel=1e-5)


def test_many_prompts_in_chunks_equal_them_at_once(monkeypatch):
    trace = fabricate(prompts=9, tokens=16, text="greedy")
    whole = predict(trace, with_rounds=True).to_json()
    monkeypatch.setattr("probekit.prediction.predict._CHUNK", 1)
    assert predict(trace, with_rounds=True).to_json() == whole


def test_a_decoder_of_16_bits_compares_rounded_logits():
    trace = fabricate(dtype="bfloat16")
    layers = trace.layers.assign(agrees_rounded=False)
    rounded = type(trace).from_frames(trace.manifest, trace.texts, trace.tokens, layers)
    assert predict(trace).cell(5, 2).accepted > 0
    assert predict(rounded).cell(5, 2).accepted == 0


def test_given_text_is_not_exact():
    prediction = predict(fabricate(text="given"))
    assert (prediction.text, prediction.exact) == ("given", False)


def test_json_has_the_contract_keys():
    trace = fabricate()
    document = json.loads(json.dumps(predict(trace, with_rounds=True).to_json()))
    assert document["schema"] == SCHEMA
    assert {"model", "text", "decoding", "first_round", "cells", "exact", "budget", "rounds"} <= set(document)
    assert set(document["decoding"]) == {"temperature", "top_k", "top_p"}
    assert document["budget"] == 24
    keys = {
        "exit_layer", "draft_length", "prompts", "tokens", "rounds", "drafted", "accepted", "acceptance_rate",
        "acceptance_rate_interval", "alpha", "tokens_per_round", "tokens_per_round_interval", "accepted_by_position",
    }  # fmt: skip
    for cell in document["cells"]:
        assert keys <= set(cell)
        assert len(cell["accepted_by_position"]) == cell["draft_length"]
        assert all(isinstance(cell[name], int) for name in ("tokens", "rounds", "drafted", "accepted"))
    assert {"prompt", "exit_layer", "draft_length", "drafted", "accepted"} <= set(document["rounds"][0])


def test_nothing_to_count_is_null():
    trace = fabricate(tokens=1)  # one token each, which the prefill writes
    cell = predict(trace).cells[0]
    assert (cell.rounds, cell.tokens, cell.drafted) == (0, 0, 0)
    document = cell.to_json()
    assert document["acceptance_rate"] is document["alpha"] is document["tokens_per_round"] is None
    assert document["acceptance_rate_interval"] is document["tokens_per_round_interval"] is None


def test_frames_and_html():
    prediction = predict(fabricate(drafter=True))
    frame = prediction.to_pandas()
    assert len(frame) == len(prediction.cells)
    assert {"acceptance_rate_low", "acceptance_rate_high", "tokens_per_round_low"} <= set(frame.columns)
    assert frame["exit_layer"].isna().sum() == 8  # the draft model has no exit layer
    page = prediction._repr_html_()
    assert page.count("<table") == 2
    assert page.count("<td") == 2 * len(prediction.cells)


def test_another_source_of_agreement():
    trace = fabricate(depth=4)
    always = predict(trace, agreement=lambda prompt: np.ones((5, len(trace.outputs(prompt))), dtype=bool))
    assert all(cell.alpha == 1 for cell in always.cells)
    with pytest.raises(InputError, match=r"shape \(3,\); expected \(5, "):
        predict(trace, agreement=lambda prompt: np.ones(3, dtype=bool))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layers": [0]}, r"exit layer 0 is out of range: this model has exits 1\.\.5"),
        ({"exit_layers": [6]}, "exit layer 6 is out of range"),
        ({"exit_layers": [99]}, "exit layer 99 is out of range"),
        ({"draft_lengths": [0]}, "draft length 0 is out of range"),
        ({"draft_lengths": []}, "no draft length"),
        ({"first_round": "bonus"}, "first round 'bonus' is not known: it is one of prefill, draft"),
        ({"drafter": True}, "no draft model"),
    ],
)
def test_wrong_use(settings, message):
    with pytest.raises(InputError, match=message):
        predict(fabricate(), **settings)


def test_a_text_beyond_its_budget():
    with pytest.raises(InputError, match="5 tokens does not fit a budget of 4"):
        rounds_of(np.ones(5, dtype=bool), 2, 4)


# ------------------------------------------------------------------------------------------------ intervals
def test_bootstrap_covers_a_known_ratio():
    """Of 200 samples of 30 prompts, about 95 % of the intervals hold the true ratio."""
    random = np.random.default_rng(5)
    drafted = random.integers(50, 150, size=(200, 30))
    chance = random.beta(20, 12, size=drafted.shape)
    low, high = bootstrap_ratio(random.binomial(drafted, chance), drafted)
    covered = ((low <= 20 / 32) & (high >= 20 / 32)).mean()
    assert 0.88 <= covered <= 0.99


@pytest.mark.parametrize("sign", [1, -1])
def test_bootstrap_t_draw_by_draw(sign):
    """The same interval, spelled out; logarithms where there is no sign to lose."""
    random = np.random.default_rng(1)
    above, below = sign * random.integers(1, 20, 12), random.integers(20, 40, 12)

    def judged(a, b):
        ratio = a.sum() / b.sum()
        error = np.sqrt(12 / 11 * ((a - ratio * b) ** 2).sum()) / b.sum()
        return (np.log(ratio), error / ratio) if sign > 0 else (ratio, error)

    centre, error = judged(above, below)
    drawn = [judged(above[take], below[take]) for take in drawn_indices(12)]
    reach = np.quantile([abs(one - centre) / own for one, own in drawn], 0.95) * error
    ends = (np.exp(centre - reach), np.exp(centre + reach)) if sign > 0 else (centre - reach, centre + reach)
    assert bootstrap_ratio(above, below) == (pytest.approx(ends[0]), pytest.approx(ends[1]))


def test_few_prompts_take_students_t():
    """4 prompts: ratio 1/2, standard error sqrt(4/3 x 4 x 1/4) / 8 = .1443; t of 3 degrees of freedom is 3.182."""
    low, high = bootstrap_ratio([1.5, 0.5, 1.5, 0.5], np.full(4, 2.0))
    reach = np.exp(3.1824 * 0.14434 / 0.5)
    assert (low, high) == (pytest.approx(0.5 / reach, rel=1e-3), pytest.approx(0.5 * reach, rel=1e-3))
    assert bootstrap_ratio([1.5, 0.5, 1.5, 0.5], np.full(4, 2.0), bounds=(0.0, 1.0))[1] == 1.0


def test_bootstrap_is_seeded_and_vectorised():
    random = np.random.default_rng(3)
    above, below = random.random((2, 3, 9)), 1 + random.random(9)
    low, high = bootstrap_ratio(above, below)
    assert low.shape == high.shape == (2, 3)
    assert (low < high).all()
    again = bootstrap_ratio(above[1, 2], below)
    assert (low[1, 2], high[1, 2]) == (pytest.approx(again[0]), pytest.approx(again[1]))


def test_bootstrap_at_its_limits():
    assert np.isnan(bootstrap_ratio([1.0], [2.0])).all()  # one prompt says nothing about other prompts
    assert np.isnan(bootstrap_ratio([0.0, 0.0], [0.0, 0.0])).all()
    low, high = bootstrap_ratio([1.0, 0.0], [2.0, 0.0])  # a draw of the second alone counts nothing
    assert low == high == 0.5
    one_differs = bootstrap_ratio([1.0] * 9 + [0.5], np.ones(10))  # draws without it have no spread
    assert one_differs[0] < 0.95 < one_differs[1] < 1.5


# ------------------------------------------------------------------------------------------------ how it runs
def test_the_whole_table_of_a_thirty_layer_model_takes_under_a_second():
    trace = fabricate(depth=30, prompts=24, tokens=96, statistics="agreement")
    predict(trace, exit_layers=[1], draft_lengths=[1])  # reads the table
    started = time.perf_counter()
    prediction = predict(trace)
    assert time.perf_counter() - started < 2  # about 0.1 s alone on a machine
    assert len(prediction.cells) == 29 * 8


def test_prediction_needs_no_torch():
    code = "import sys; import probekit.choice.choose, probekit.prediction.predict; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
