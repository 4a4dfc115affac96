"""Products in bfloat16: the bound holds on every row, and what they prove is so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lens.spelled import random_texts, read, spelled

from probekit.lens import agreement as witness
from probekit.lens import bf16_bound as room
from probekit.lens.agreement import AgreementSearch
from probekit.lens.bf16_bound import Bf16Bound
from probekit.lens.chunked import StatisticsPlan, layer_statistics


def screen_of(weight: torch.Tensor, rows: int) -> Bf16Bound:
    longest = float(torch.linalg.vector_norm(weight, dim=-1).max())
    return Bf16Bound.of(weight, longest, weight.shape[1] * 2.0**-24, rows)


@given(st.integers(0, 2**32), st.sampled_from([1, 7, 64, 300]), st.sampled_from([1e-3, 1.0, 40.0]), st.booleans())
def test_no_product_lies_beyond_the_bound(seed, width, scale, huge):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(260, width, generator=generator) * scale
    states = torch.randn(9, width, generator=generator)
    if huge:
        weight[3], states[2] = weight[3] * 100, states[2] * 1000
    screen = screen_of(weight, 9)
    truth = states.double() @ weight.double().T
    products = screen.products(states).double()
    allowed = screen.error(states)[:, None].double() + room.SLACK * room._OUT * products.abs()
    assert ((products - truth).abs() <= allowed).all()
    assert screen.holds(states, truth.float())
    assert not screen.holds(states, truth.float() + 3 * allowed.float().amax(1, keepdim=True))


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 1e-3, 0.02, 1.0]))
def test_what_is_proven_is_so(seed, needed, ahead):
    """Rows whose token leads by little, or not at all, are left to the full product."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(200, 32, generator=generator)
    states = torch.randn(64, 32, generator=generator)
    states += ahead * weight[7]
    logits = states.double() @ weight.double().T
    token = torch.where(torch.arange(64) % 2 == 0, logits.argmax(-1), 7)
    own = logits.gather(-1, token[:, None])[:, 0]
    others = logits.scatter(-1, token[:, None], -torch.inf).amax(-1)
    proven = screen_of(weight, 64).leads(states, token, own.float(), torch.full((64,), needed))
    assert ((own - others) > needed)[proven].all()


def test_by_hand():
    """Numbers that bfloat16 holds exactly: all that is lost is the last rounding and the bounds' own room."""
    weight = torch.eye(3) * 2
    states = torch.tensor([[8.0, 4.0, 0.0], [8.0, 7.75, 0.0], [torch.nan, 0.0, 0.0]])
    proven = screen_of(weight, 3).leads(states, torch.tensor([0, 0, 0]), states[:, 0] * 2, torch.zeros(3))
    assert proven.tolist() == [True, True, False]
    proven = screen_of(weight, 3).leads(states, torch.tensor([0, 0, 0]), states[:, 0] * 2, torch.full((3,), 0.6))
    assert proven.tolist() == [True, False, False]  # 16 - 15.5 is less than 0.6


@pytest.fixture
def screened(monkeypatch):
    """Screens for heads of any size, and without a race: they are always fast enough."""
    monkeypatch.setattr(room, "SMALLEST_HEAD", 1)
    monkeypatch.setattr(witness, "GAIN", 0.0)
    monkeypatch.setitem(witness.POOL_ROWS, "cpu", 8)


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_agreement_has_the_same_bits_with_a_screen(any_tiny, screened, noise):
    parts = any_tiny.anatomy
    plan = StatisticsPlan(lenses=("final-norm",), noise=noise)
    witnesses = AgreementSearch(parts)
    for seed in range(3):
        residuals, inputs, texts, _ = read(any_tiny, random_texts(any_tiny, 2, 30, seed))
        found = witnesses.agreement(residuals, inputs, noise=noise)
        full = layer_statistics(parts, residuals, inputs, texts, plan)
        for name, bits in found.items():
            assert torch.equal(bits, full[name][0]), name
    savings = witnesses.savings
    assert savings.screened > 0
    assert savings.witnessed + savings.screened + savings.full == savings.rows


def test_ties_go_to_the_full_product(screened):
    """Layers that are the model's own, but for one token that is level with it or a hair ahead."""
    parts = spelled(40, 2)
    logits = torch.randn(3, 32, 40, generator=torch.Generator().manual_seed(1))
    logits[:-1] = logits[-1]
    best = logits[-1].amax(-1)
    logits[0, :, 0] = best  # equal: the lowest id wins
    logits[1, :, 1] = best * (1 + 2.0**-20)
    ids = torch.zeros(32, dtype=torch.long)
    witnesses = AgreementSearch(parts)
    witnesses._calibrate = 0
    found = layer_statistics(parts, logits, ids, ids, StatisticsPlan(mode="agreement"), witnesses=witnesses)
    expected = logits.argmax(-1) == logits[-1].argmax(-1)
    assert torch.equal(found["agrees"][0], expected)
    assert not expected[1].all()


def test_a_screen_that_is_slow_or_wrong_is_not_kept(any_tiny, screened, monkeypatch):
    residuals, inputs, _, _ = read(any_tiny, random_texts(any_tiny, 2, 30))
    monkeypatch.setattr(witness, "GAIN", 1e9)
    slow = AgreementSearch(any_tiny.anatomy)
    slow.agreement(residuals, inputs)
    monkeypatch.setattr(witness, "GAIN", 0.0)
    monkeypatch.setattr(Bf16Bound, "holds", lambda *_: False)
    wrong = AgreementSearch(any_tiny.anatomy)
    wrong.agreement(residuals, inputs)
    assert (slow.savings.screened, wrong.savings.screened) == (0, 0)
