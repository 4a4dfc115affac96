"""The rounds of other engines, by their conventions, against small decoders that count as those engines do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces.fabricate import fabricate

from probekit.errors import InputError, ResourceError
from probekit.prediction.predict import predict
from probekit.prediction.replay import replay
from probekit.prediction.rounds import CONVENTIONS, ENDED, expected_rounds, rounds_of

TEXTS = st.lists(st.booleans(), min_size=2, max_size=24)


def vllm(agrees: list[bool], K: int, M: int) -> list[tuple[int, int]]:
    """(drafted, accepted): `Scheduler.update_from_output` counts what the sampler accepted, then cuts the text."""
    emitted, rounds = 1, []
    while emitted < M:
        accepted = 0
        while accepted < K and agrees[emitted + accepted]:
            accepted += 1
        rounds.append((K, accepted))
        emitted += accepted + 1
    return rounds


def llama_cpp(agrees: list[bool], K: int, M: int, ended: bool) -> list[tuple[int, int]]:
    """`get_n_draft_max`, `common_sampler_sample_and_accept_n`: nothing is accepted after an end, which is the last."""
    emitted, rounds, N = 1, [], len(agrees)
    while emitted < N:
        drafted = min(K, M - emitted - 1)
        sampled = 0
        for place in range(drafted):
            at = emitted + place
            sampled += 1
            end = ended and at == N - 1
            if not agrees[at] or (end and place + 1 < drafted):
                break
        else:
            sampled += 1
        rounds.append((drafted, sampled - 1))
        emitted += sampled
    return rounds


@given(TEXTS, st.integers(1, 6))
def test_vllm_drafts_and_accepts_past_the_budget(agrees, K):
    M = max(2, len(agrees) - K - 1)
    known = np.array([*agrees, *([False] * (K + 1))])
    found = rounds_of(known[: M + K], K, M + K, "vllm", tokens=M)
    assert list(zip(found.drafted.tolist(), found.accepted.tolist(), strict=True)) == vllm(known.tolist(), K, M)
    assert found.emitted.sum() == M - 1


@given(TEXTS, st.integers(1, 6), st.booleans(), st.integers(0, 4))
def test_llama_cpp_counts_an_accepted_end_as_the_bonus(agrees, K, ended, spare):
    M = len(agrees) + (spare if ended else 0)
    found = rounds_of(np.array(agrees), K, M, "llama.cpp", ended=ended)
    assert list(zip(found.drafted.tolist(), found.accepted.tolist(), strict=True)) == llama_cpp(agrees, K, M, ended)
    ours = rounds_of(np.array(agrees), K, M)
    assert (found.start == ours.start).all() and (found.rejected == ours.rejected).all()
    assert found.emitted.sum() == len(agrees) - 1


def test_an_end_that_is_the_last_draft_is_accepted():
    text = np.ones(4, dtype=bool)
    assert rounds_of(text, 3, 9, "llama.cpp", ended=True).accepted.tolist() == [3]
    assert rounds_of(text, 4, 9, "llama.cpp", ended=True).accepted.tolist() == [2]
    assert rounds_of(text, 4, 9, "llama.cpp", ended=True).rejected.tolist() == [False]
    assert rounds_of(text, 4, 9).accepted.tolist() == [3]


def test_a_smaller_budget_is_that_of_a_trace_with_fewer_tokens():
    trace = fabricate()
    for first_round in ("prefill", "draft", "llama.cpp"):
        found = predict(trace, [2], [3], first_round, with_rounds=True, budget=9)
        for row in found.rounds:
            agrees = trace.agreement(row.prompt)[2]
            cut = rounds_of(agrees[:9], 3, 9, first_round, ended=len(agrees) <= 9 and trace.ended(row.prompt) == ENDED)
            assert row.accepted == tuple(cut.accepted.tolist())
            assert row.drafted == tuple(cut.drafted.tolist())
    with pytest.raises(InputError, match="the budget is 4000 tokens; this run was traced with"):
        predict(trace, [2], [3], budget=4000)
    with pytest.raises(InputError, match="the budget must be a whole number of at least 1"):
        predict(trace, [2], [3], budget=0)


def test_what_vllm_may_accept_past_the_trace_is_no_exact_prediction():
    all_agree = fabricate(agreement=[1.0] * 6)
    assert not predict(all_agree, [2], range(1, 9), "vllm").exact
    assert predict(all_agree, [2], range(1, 9)).exact
    cut = min(all_agree.texts["new_tokens"]) - 8
    assert predict(all_agree, [2], range(1, 9), "vllm", budget=cut).exact
    none = fabricate(agreement=[0.0] * 6)
    assert predict(none, [2], [3], "vllm").exact


def test_expected_rounds_of_vllm_are_the_mean_of_its_rounds():
    """Chances of 0 and 1 are a greedy text, and a mixture of two texts is their mean."""
    one, other = np.array([1, 1, 0, 1, 1, 1, 1.0]), np.array([1, 1, 0, 0, 1, 1, 1.0])
    half = np.array([1, 1, 0, 0.5, 1, 1, 1])
    found = expected_rounds(half, 2, 7, "vllm")
    pair = [rounds_of(each.astype(bool), 2, 7, "vllm") for each in (one, other)]
    assert found.drafted == pytest.approx(np.mean([each.drafted.sum() for each in pair]))
    assert found.rounds == pytest.approx(np.mean([len(each.start) for each in pair]))
    assert found.accepted == pytest.approx(np.mean([each.accepted.sum() for each in pair]))


def test_conventions_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"it is one of prefill, draft, vllm, llama\.cpp"):
        predict(fabricate(), [2], [3], "sglang")
    with pytest.raises(InputError, match=r"the convention of llama\.cpp is predicted on greedy text"):
        predict(fabricate(text="sampled"), [2], [3], "llama.cpp")
    assert predict(fabricate(text="sampled"), [2], [3], "vllm").first_round == "vllm"
    from probekit.drafting.drafters import ExitLayer
    from probekit.drafting.ways import Way

    with pytest.raises(InputError, match="drafts of a fixed length"):
        replay(fabricate(), Way((ExitLayer(2),), 3), "vllm")
    assert set(CONVENTIONS) == {"prefill", "draft", "vllm", "llama.cpp"}


def test_a_draft_length_far_beyond_the_budget_is_the_budget():
    trace = fabricate(depth=3, tokens=12)
    table = predict(trace, draft_lengths=[1, 64, 65, 10**30])
    assert sorted({cell.draft_length for cell in table.cells}) == [1, 64]
    assert table.cell(1, 10**30).counts() == table.cell(1, 64).counts()
    with pytest.raises(InputError, match="expected 1 to 10,000"):
        predict(trace, draft_lengths=[10**30], first_round="vllm")
    with pytest.raises(ResourceError, match="cells of up to 10,000 drafts"):
        predict(trace, draft_lengths=range(1, 10_001), first_round="vllm")
