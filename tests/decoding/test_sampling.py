import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from probekit.decoding import sampling as rules
from probekit.decoding.sampling import ACCEPT, DRAFT, FINAL, Sampler, draw, keys, scatter, streams, uniform, warp
from probekit.errors import InputError
from probekit.settings import Sampling


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number of at least 0, not -0.1"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": math.inf}, "temperature must be a number"),
        ({"top_p": 0.0}, r"top-p must lie in \(0, 1\], not 0.0"),
        ({"top_p": 1.5}, r"top-p must lie in \(0, 1\], not 1.5"),
        ({"top_k": -1}, "top-k must be a whole number of at least 0"),
        ({"top_k": 2.5}, "top-k must be a whole number"),
        ({"seed": 0.5}, "seed must be a whole number"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        Sampling(**setting)


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    st.sampled_from([0, 1, 3, 11, 50]),
    st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
)
def test_warp_is_transformers_warpers_in_their_order(seed, temperature, top_k, top_p):
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed)) * 4
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = warp(logits, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(found, expected.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_warp_keeps_the_fewest_tokens_that_reach_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = warp(logits, Sampling(1.0, top_p=0.7)).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0, 0]]))


def test_warp_at_temperature_zero_is_the_argmax_and_near_zero_does_not_overflow():
    logits = torch.tensor([[1.0, 90.0, -3.0]])
    certain = torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(warp(logits, Sampling()).exp(), certain)
    torch.testing.assert_close(warp(logits, Sampling(1e-38)).exp(), certain)


def fit(counts, probabilities):
    """p-value of counts under probabilities; 0 where the impossible happened."""
    kept = probabilities > 0
    if counts[~kept].sum() > 0:
        return 0.0
    if kept.sum() == 1:
        return 1.0
    if counts.sum() == 0:
        return 1.0
    expected = probabilities[kept].double()
    return stats.chisquare(counts[kept].double(), expected / expected.sum() * counts.sum()).pvalue


def test_uniform_numbers_are_uniform_and_do_not_depend_on_each_other():
    stream = streams(7, range(100))
    outputs = torch.arange(200)
    numbers = {purpose: uniform(keys(stream[:, None], outputs, purpose)) for purpose in (FINAL, DRAFT, ACCEPT)}
    for drawn in numbers.values():
        assert ((drawn > 0) & (drawn < 1)).all()
        assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    columns = [numbers[FINAL].flatten(), numbers[DRAFT].flatten(), numbers[ACCEPT].flatten()]
    columns += [numbers[FINAL].roll(1, 0).flatten(), numbers[FINAL].roll(1, 1).flatten()]
    correlations = torch.corrcoef(torch.stack(columns)) - torch.eye(5)
    assert correlations.abs().max() < 0.035  # 5 standard errors of 20,000 pairs


def test_a_prompt_has_the_same_numbers_in_any_batch_and_others_under_another_seed():
    assert streams(3, [0, 5, 9])[1] == streams(3, [5])[0]
    assert len({*streams(3, range(1000)).tolist(), *streams(4, range(1000)).tolist()}) == 2000
    assert streams(2**70 + 3, [0]) == streams(3, [0])  # any whole number is a seed; its low 64 bits count
    assert streams(-1, [0]) != streams(1, [0])


def test_draw_follows_the_probabilities_down_to_rare_tokens():
    probabilities = torch.tensor([0.6, 0.0, 0.3, 0.0995, 0.0005])
    key = keys(streams(1, [0]), torch.arange(200_000), FINAL)
    counts = draw(probabilities.expand(len(key), -1), key).bincount(minlength=5)
    assert fit(counts, probabilities) > 1e-3
    assert (draw(7 * probabilities.expand(len(key), -1), key).bincount(minlength=5) == counts).all()


def test_a_certain_token_is_always_drawn():
    key = keys(streams(1, [0]), torch.arange(100_000), FINAL)
    assert (draw(torch.tensor([0.0, 0.0, 1.0]).expand(len(key), -1), key) == 2).all()


def test_spread_puts_probabilities_at_their_tokens():
    torch.testing.assert_close(
        scatter(torch.tensor([[0.25, 0.75]]), torch.tensor([3, 1]), 5), torch.tensor([[0.0, 0.75, 0.0, 0.25, 0.0]])
    )


def _one_hot(tokens, vocabulary=5):
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocabulary).float() * 9


@pytest.mark.parametrize(
    ("drafts", "chosen", "limit", "run", "token"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3, 3, 4),  # all accepted: the bonus
        ([1, 2, 3], [1, 0, 3, 4], 3, 1, 0),  # a later agreement does not count
        ([1, 2, 3], [0, 2, 3, 4], 3, 0, 0),
        ([1, 2, 3], [1, 2, 3, 4], 2, 2, 3),  # the third draft is beyond this row's budget
        ([1, 2, 3], [1, 2, 3, 4], 0, 0, 1),
        ([], [2], 0, 0, 2),
    ],
)
def test_greedy_verification_by_hand(drafts, chosen, limit, run, token):
    verdict = Sampler(Sampling()).verify(
        torch.tensor([drafts], dtype=torch.int64),
        None,
        torch.tensor([limit]),
        _one_hot([chosen]),
        streams(0, [0]),
        torch.tensor([1]),
    )
    assert (int(verdict.run), int(verdict.token)) == (run, token)


def _round(count, setting, p_logits, q_logits):
    """`count` rounds of two drafts from the chain q, judged by p: the first emitted token of each, and the runs."""
    rule, stream = Sampler(setting), streams(setting.seed, range(count))
    outputs = torch.ones(count, dtype=torch.int64)
    first, q0, _ = rule.draft(q_logits[0].expand(count, -1), stream, outputs)
    second, q1, _ = rule.draft(q_logits[1][first], stream, outputs + 1)
    drafts = torch.stack([first, second], 1)
    logits = torch.stack([p_logits[0].expand(count, -1), p_logits[1][first], p_logits[1][second]], 1)
    limits = torch.full((count,), 2)
    verdict = rule.verify(drafts, torch.stack([q0, q1], 1), limits, logits, stream, outputs)
    written = torch.cat([drafts, verdict.token[:, None]], 1)
    emitted = torch.where(verdict.run == 0, verdict.token, written[:, 0])
    following = torch.where(verdict.run == 1, verdict.token, written[:, 1])
    return emitted, following, verdict.run


def _chain(seed, vocabulary=4):
    """Logits of a first token, and of a token given the one before it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocabulary, generator=generator), torch.randn(vocabulary, vocabulary, generator=generator)


@pytest.mark.parametrize("setting", [Sampling(1.0, seed=1), Sampling(0.6, 3, 0.9, seed=2), Sampling(2.0, seed=3)])
def test_the_rule_emits_the_target_distribution_and_accepts_as_often_as_p_and_q_overlap(setting):
    p_logits, q_logits = _chain(1), _chain(2)
    emitted, following, run = _round(100_000, setting, p_logits, q_logits)
    p, q = warp(p_logits[0], setting).exp(), warp(q_logits[0], setting).exp()
    assert fit(emitted.bincount(minlength=4), p) > 1e-4
    overlap = float(torch.minimum(p, q).sum())
    assert stats.binomtest(int((run > 0).sum()), len(run), min(overlap, 1.0)).pvalue > 1e-4
    for token in range(4):  # rows whose first draft was kept went on to a second token
        onward = following[(run > 0) & (emitted == token)].bincount(minlength=4)
        assert fit(onward, warp(p_logits[1][token], setting).exp()) > 1e-4


def test_equal_distributions_accept_everything():
    p_logits = _chain(5)
    _, _, run = _round(20_000, Sampling(1.0), p_logits, p_logits)
    assert (run == 2).all()


def test_an_empty_residual_falls_back_to_the_target(monkeypatch):
    # every draft rejected though p = q: what is left is 0 everywhere
    monkeypatch.setattr(rules, "uniform", lambda key: torch.full(key.shape, 2.0, dtype=torch.float64))
    p_logits = _chain(5)
    emitted, _, run = _round(50_000, Sampling(1.0), p_logits, p_logits)
    assert (run == 0).all()
    assert fit(emitted.bincount(minlength=4), p_logits[0].softmax(-1)) > 1e-4


def test_confidence_is_the_probability_of_the_draft():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    token, distribution, confidence = Sampler(Sampling()).draft(
        logits, streams(0, [0]), torch.tensor([1]), confidence="probability"
    )
    assert (int(token), distribution) == (0, None)
    torch.testing.assert_close(confidence, torch.tensor([0.7]))
    setting = Sampling(1.0, top_k=2, seed=5)
    token, distribution, confidence = Sampler(setting).draft(
        logits, streams(5, [0]), torch.tensor([1]), confidence="probability"
    )
    assert distribution is not None
    torch.testing.assert_close(confidence, distribution[0, token])


def test_the_smallest_top_p_keeps_the_most_probable_token():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    log_probabilities = warp(logits, Sampling(temperature=1.0, top_p=1e-12))
    assert (log_probabilities.exp() == torch.nn.functional.one_hot(logits.argmax(-1), 11)).all()
