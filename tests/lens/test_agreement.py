"""Agreement by witnesses: the bits of the full product on every position, and fewer products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lens import truth
from lens.spelled import random_texts, read, spelled

from probekit.lens import agreement as witness
from probekit.lens.agreement import AgreementSearch
from probekit.lens.chunked import StatisticsPlan, layer_statistics
from probekit.lens.noise import Noise
from probekit.lens.work_skipped import WorkSkipped
from probekit.models.loaded import load
from probekit.models.shipped import TALES, bundled_models


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, bits in expected.items():
        assert found[name].dtype == torch.bool
        assert torch.equal(found[name], bits), name


@pytest.mark.parametrize("pool", [3, 16, 256])
@pytest.mark.parametrize("rounded", [None, torch.bfloat16])
def test_bits_of_the_full_product(any_tiny, monkeypatch, pool, rounded):
    monkeypatch.setitem(witness.POOL_ROWS, "cpu", pool)
    parts = any_tiny.anatomy
    plan = StatisticsPlan(lenses=("final-norm",), mode="agreement", noise=1e-2, rounded_dtype=rounded)
    witnesses = AgreementSearch(parts)
    for seed in range(3):
        residuals, inputs, texts, logits = read(any_tiny, random_texts(any_tiny, 2, 30, seed))
        found = layer_statistics(parts, residuals, inputs, texts, plan, logits, witnesses=witnesses)
        same_bits(found, truth.agreement(parts, residuals, inputs, texts, plan))
    savings = witnesses.savings
    assert savings.rows == 3 * 58 * (parts.depth + 1)
    assert 0 < savings.full < savings.rows


@st.composite
def spelled_cases(draw):
    vocabulary = draw(st.sampled_from([2, 3, 40, 300]))
    depth, rows = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from([1, 3, 1000]))
    logits = torch.randint(-values, values + 1, (depth + 1, rows, vocabulary), generator=generator).float()
    logits /= draw(st.sampled_from([1.0, 3.0, 100.0]))
    if draw(st.booleans()):
        logits[:-1] = logits[-1]  # every layer as the model
        logits[0, :, 0] += draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.1]))
    by_row = Noise(tuple(0.3 * (layer + 1) for layer in range(depth + 1)), 0.013)
    noise = draw(st.sampled_from([0.0, 1e-3, 0.3, 5.0, by_row]))
    rounded = draw(st.sampled_from([None, torch.bfloat16, torch.float16]))
    return spelled(vocabulary, depth), logits, StatisticsPlan(mode="agreement", noise=noise, rounded_dtype=rounded)


@given(spelled_cases())
def test_adversarial_rows(case):
    """Ties, margins at the noise, layers that are the model's: the bits of the full product all the same."""
    parts, logits, plan = case
    ids = torch.zeros(logits.shape[1], dtype=torch.long)
    witnesses = AgreementSearch(parts)
    expected = truth.agreement(parts, logits, ids, ids, plan)
    for _ in range(2):  # the second time with all that was learned
        same_bits(layer_statistics(parts, logits, ids, ids, plan, witnesses=witnesses), expected)


def test_a_margin_within_rounding_is_no_witness():
    """Token 1 beats the model's token 0 by less than a product may be off: the row has the full product."""
    parts = spelled(4, 1)
    model = torch.tensor([8.0, 0.0, 0.0, 0.0])
    for margin, full in ((1e-6, 2), (1.0, 1)):  # the model's own row always
        witnesses = AgreementSearch(parts)
        witnesses._calibrate = 0
        residuals = torch.stack([torch.tensor([8.0, 8.0 + margin, 0.0, 0.0]), model])[:, None]
        found = witnesses.agreement(residuals, torch.tensor([1]))
        assert found["agrees"].tolist() == [[False], [True]]
        assert witnesses.savings.full == full


def test_imprecise_products_ask_for_more(monkeypatch):
    """With torch set to round the inputs of float32 products, a margin of 0.01 no longer convinces."""
    parts = spelled(4, 1)
    residuals = torch.tensor([[[8.0, 8.01, 0.0, 0.0]], [[8.0, 0.0, 0.0, 0.0]]])
    for precision, full in (("highest", 1), ("medium", 2)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        witnesses = AgreementSearch(parts)
        witnesses._calibrate = 0
        witnesses.agreement(residuals, torch.tensor([1]))
        assert witnesses.savings.full == full


def test_what_was_learned_spares_products(tiny):
    residuals, inputs, texts, _ = read(tiny, random_texts(tiny, 4, 30))
    witnesses = AgreementSearch(tiny.anatomy)
    full = []
    for _ in range(2):
        before = witnesses.savings.full
        layer_statistics(tiny.anatomy, residuals, inputs, texts, StatisticsPlan(mode="agreement"), witnesses=witnesses)
        full.append(witnesses.savings.full - before)
    assert full[1] < full[0]
    agreeing = int(truth.agreement(tiny.anatomy, residuals, inputs, texts, StatisticsPlan())["agrees"].sum())
    assert full[1] >= agreeing  # a row that agrees can have no witness


def test_savings_by_hand():
    savings = WorkSkipped(rows=10, full=2, candidates=300, vocabulary=100)
    assert (savings.witnessed, savings.witnessed_share) == (8, 0.8)
    assert savings.products_avoided == pytest.approx(1 - (200 + 300) / 1000)
    assert WorkSkipped().products_avoided == WorkSkipped().witnessed_share == 0.0


def greedy_text(loaded, prompt: str, tokens: int) -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer(prompt).input_ids])
    return loaded.model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def spared_on(loaded, ids: torch.Tensor) -> WorkSkipped:
    """Assert the bits of the full product; returns the savings."""
    parts = loaded.anatomy
    residuals, inputs, texts, _ = read(loaded, ids)
    plan = StatisticsPlan(lenses=("final-norm",), noise=1e-3, rounded_dtype=torch.bfloat16)
    full = layer_statistics(parts, residuals, inputs, texts, plan)
    witnesses = AgreementSearch(parts)
    found = witnesses.agreement(residuals, inputs, noise=1e-3, rounded_dtype=torch.bfloat16)
    same_bits(found, {name: full[name][0] for name in found})
    return witnesses.savings


@pytest.mark.second
def test_smollm2(smollm2):
    savings = spared_on(smollm2, greedy_text(smollm2, "Once upon a time", 24))
    assert savings.products_avoided > 0.4  # calibration and all


@pytest.mark.long
def test_smollm2_at_length(smollm2):
    text = " ".join(["The history of the steam engine begins with a kettle.", "Write a poem about the sea."] * 3)
    savings = spared_on(smollm2, greedy_text(smollm2, text, 400))
    assert savings.products_avoided > 0.68


@pytest.mark.parametrize("name", TALES)
def test_bundled_models(name):
    if name not in [model.name for model in bundled_models()]:
        pytest.skip(f"{name} is not in this installation")
    loaded = load(name, device="cpu", dtype="float32")
    assert spared_on(loaded, greedy_text(loaded, "Once upon a time", 100)).witnessed > 0
