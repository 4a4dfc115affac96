"""Whole outputs of sampled decoding against the enumerated distribution: 4 tokens, so every text can be listed."""

import itertools

import pytest
import torch
from scipy import stats

from probekit.decoding import sampling as rules
from probekit.decoding.autoregressive import Autoregressive, EarlyExit
from probekit.decoding.sampling import warp
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.drafting.policies import ConfidenceThreshold
from probekit.drafting.round_policies import Heuristic
from probekit.drafting.text_drafters import PromptLookup
from probekit.lens.exit_heads import ExitHead
from probekit.models.synthetic import synthetic
from probekit.settings import Sampling

PROMPT = [0, 2, 1]
LENGTH = 3  # outputs that are compared
BUDGET = 5  # a round may draft up to 3 of them, and beyond them
VOCABULARY = 4
TEXTS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
SETTINGS = {"plain": Sampling(1.0, seed=1), "warped": Sampling(0.7, top_k=3, top_p=0.9, seed=2)}


@pytest.fixture(scope="module")
def chain_draft():
    return synthetic("tiny-chain-draft", seed=5)


@pytest.fixture(scope="module")
def methods(tiny_chain, chain_draft):
    generator, width = torch.Generator().manual_seed(6), tiny_chain.anatomy.width
    head = ExitHead(torch.randn(width, width, generator=generator) / 4, torch.randn(width, generator=generator))
    return {
        "autoregressive": Autoregressive(tiny_chain),
        "self-speculative": SelfSpeculative(tiny_chain, 2, 3),
        "threshold": SelfSpeculative(tiny_chain, 2, 3, policy=ConfidenceThreshold(0.4)),
        "draft-vocabulary": SelfSpeculative(tiny_chain, 2, 3, draft_vocabulary=torch.tensor([3, 0])),
        "exit-head": SelfSpeculative(tiny_chain, 2, 3, exit_head=head),
        "speculative": Speculative(tiny_chain, chain_draft, 3),
        "lookup": Speculative(tiny_chain, PromptLookup(2), 3),
        "heuristic": SelfSpeculative(tiny_chain, 2, 3, policy=Heuristic(2)),
    }


METHODS = (
    "autoregressive",
    "self-speculative",
    "threshold",
    "draft-vocabulary",
    "exit-head",
    "speculative",
    "lookup",
    "heuristic",
)


def enumerated(loaded, sampling, layers=None):
    """Probability of every text, (texts,), float64, from one teacher-forced pass of transformers' own forward."""
    sequences = torch.cat([torch.tensor(PROMPT).expand(len(TEXTS), -1), TEXTS], 1)
    hidden = loaded.model(sequences, output_hidden_states=True).hidden_states
    states = hidden[-1] if layers is None else loaded.anatomy.norm(hidden[layers])
    log_p = warp(loaded.anatomy.head(states)[:, len(PROMPT) - 1 : -1], sampling)
    return log_p.gather(-1, TEXTS[..., None])[..., 0].double().sum(1).exp()


def counted(method, sampling, count, batch):
    """How often each text came out, (texts,)."""
    code = torch.tensor([VOCABULARY**place for place in reversed(range(LENGTH))])
    counts = torch.zeros(len(TEXTS), dtype=torch.int64)
    for start in range(0, count, batch):
        indices = range(start, min(start + batch, count))
        done = method.decode([PROMPT] * len(indices), max_new_tokens=BUDGET, sampling=sampling, indices=indices)
        texts = torch.tensor([text.tokens[:LENGTH] for text in done])
        counts += (texts * code).sum(1).bincount(minlength=len(TEXTS))
    return counts


def p_value(counts, probabilities):
    """Chi-square of counts against probabilities, cells under 5 expected pooled; 0 if the impossible happened."""
    if counts[probabilities == 0].sum() > 0:
        return 0.0
    expected = probabilities / probabilities.sum() * counts.sum()
    small = expected < 5
    found = torch.cat([counts[~small].double(), counts[small].double().sum()[None]])
    wanted = torch.cat([expected[~small], expected[small].sum()[None]])
    kept = wanted > 0
    return float(stats.chisquare(found[kept], wanted[kept]).pvalue)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_distributed_as_the_models(tiny_chain, methods, method, setting):
    sampling = SETTINGS[setting]
    counts = counted(methods[method], sampling, 8_000, batch=4_000)
    assert p_value(counts, enumerated(tiny_chain, sampling)) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_100_000_outputs_in_batches_and_5_000_singly(tiny_chain, methods, method, setting):
    sampling = SETTINGS[setting]
    probabilities = enumerated(tiny_chain, sampling)
    assert p_value(counted(methods[method], sampling, 100_000, batch=5_000), probabilities) > 1e-4
    assert p_value(counted(methods[method], sampling, 5_000, batch=1), probabilities) > 1e-4


def test_one_by_one_the_texts_are_those_of_the_batch(methods):
    sampling = SETTINGS["plain"]
    for method in methods.values():
        assert (counted(method, sampling, 60, batch=1) == counted(method, sampling, 60, batch=60)).all()


def test_early_exit_samples_from_its_own_truncated_model(tiny_chain):
    sampling = SETTINGS["plain"]
    counts = counted(EarlyExit(tiny_chain, 2), sampling, 8_000, batch=8_000)
    assert p_value(counts, enumerated(tiny_chain, sampling, layers=2)) > 1e-4
    assert p_value(counts, enumerated(tiny_chain, sampling)) < 1e-6


def accept_everything(monkeypatch):
    monkeypatch.setattr(rules, "uniform", lambda key: torch.zeros(key.shape, dtype=torch.float64))


def ratio_upside_down(monkeypatch):
    found = rules.uniform
    monkeypatch.setattr(rules, "uniform", lambda key: 1 / found(key).clamp(min=1e-9))


def correct_from_the_target(monkeypatch):
    """After a rejection draw from p instead of the residual: as if the rejected draft were no news."""
    monkeypatch.setattr(rules, "residual", lambda target, missed: target)


def reuse_the_acceptance_number(monkeypatch):
    """Judge every draft of a round by one number."""
    found = rules.uniform
    monkeypatch.setattr(rules, "uniform", lambda key: found(key[:, :1]).expand(key.shape))


@pytest.mark.parametrize("method", ["self-speculative", "speculative"])
@pytest.mark.parametrize(
    "error", [accept_everything, ratio_upside_down, correct_from_the_target, reuse_the_acceptance_number]
)
def test_a_planted_error_is_caught(tiny_chain, methods, monkeypatch, method, error):
    error(monkeypatch)
    sampling = SETTINGS["plain"]
    counts = counted(methods[method], sampling, 10_000, batch=10_000)
    assert p_value(counts, enumerated(tiny_chain, sampling)) < 1e-6
