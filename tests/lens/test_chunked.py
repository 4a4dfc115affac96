"""The engine against the slow truth: on models, on adversarial rows, in any cut into chunks and blocks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lens import truth
from lens.spelled import random_texts, read, spelled

from probekit.errors import InputError, SelfCheckError
from probekit.lens import chunked as statistics
from probekit.lens.chunked import StatisticsPlan, layer_statistics, peak_bytes
from probekit.lens.noise import Noise
from probekit.models.synthetic import synthetic


def warp(logits: torch.Tensor, temperature: float, top: int) -> torch.Tensor:
    """Temperature and top-k, written for these tests."""
    logits = logits / temperature
    least = logits.topk(top, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf).log_softmax(-1)


PLANS = {
    "greedy": StatisticsPlan(noise=1e-2),
    "bfloat16": StatisticsPlan(noise=1e-2, rounded_dtype=torch.bfloat16),
    "sampled": StatisticsPlan(noise=1e-2, warp=partial(warp, temperature=0.7, top=4), top=3),
    "final-norm": StatisticsPlan(lenses=("final-norm",), top=2),
    "raw": StatisticsPlan(lenses=("raw",)),
    "by row": StatisticsPlan(chunk_rows=4),
    "other way round": StatisticsPlan(lenses=("raw", "final-norm"), noise=math.inf),
}


def assert_same(found, expected, scale: float = 1.0):
    """Counts, tokens and bits equal; figures to float32's precision. scale: of the logits."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        if values.dtype.is_floating_point:
            torch.testing.assert_close(
                found[name].double(), values.double(), rtol=3e-5, atol=3e-6 * max(1.0, scale), msg=partial(_named, name)
            )
        else:
            assert torch.equal(found[name].to(values.dtype), values), name


def _named(name, message):
    return f"{name}: {message}"


@pytest.mark.parametrize("name", PLANS)
def test_models(any_tiny, name):
    ids = random_texts(any_tiny, 2, 15)
    residuals, inputs, texts, logits = read(any_tiny, ids)
    plan = PLANS[name]
    if name == "by row":
        plan = replace(plan, noise=Noise(tuple(0.05 * layer for layer in range(any_tiny.depth + 1)), 0.03))
    found = layer_statistics(any_tiny.anatomy, residuals, inputs, texts, plan, logits)
    expected = truth.layer_statistics(any_tiny.anatomy, residuals, inputs, texts, plan)
    assert_same(found, expected, float(residuals.abs().max()))


@pytest.mark.parametrize("block_bytes", [1, 4 * 97 * 3, 4 * 97 * 25])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_any_cut_gives_the_same(tiny, monkeypatch, block_bytes, chunk_rows):
    monkeypatch.setitem(statistics.BLOCK_BYTES, "cpu", block_bytes)
    residuals, inputs, texts, _ = read(tiny, random_texts(tiny, 1, 12))
    plan = StatisticsPlan(chunk_rows=chunk_rows, noise=1e-2, top=2, warp=partial(warp, temperature=1.5, top=9))
    found = layer_statistics(tiny.anatomy, residuals, inputs, texts, plan)
    assert_same(found, truth.layer_statistics(tiny.anatomy, residuals, inputs, texts, plan), 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes(dtype):
    loaded = synthetic("tiny", seed=1, dtype=dtype)
    residuals, inputs, texts, logits = read(loaded, random_texts(loaded, 1, 14))
    plan = StatisticsPlan(noise=1e-2, rounded_dtype=dtype)
    found = layer_statistics(loaded.anatomy, residuals, inputs, texts, plan, logits)
    assert_same(found, truth.layer_statistics(loaded.anatomy, residuals, inputs, texts, plan), 10)
    own = logits.argmax(-1)  # what a decoder in this dtype says
    assert torch.equal(found["argmax_rounded"][0, -1].long(), own)


@st.composite
def spelled_cases(draw):
    """Logits of every layer, written down: few distinct values, huge ones, equal rows, p == q, tiny vocabularies."""
    vocabulary = draw(st.sampled_from([2, 3, 5, 128, 130, 300]))
    depth, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from([1, 4, 10_000]))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    logits = torch.randint(-values, values + 1, (depth + 1, rows, vocabulary), generator=generator) * scale / values
    kind = draw(st.sampled_from(["plain", "huge", "equal rows", "as the model"]))
    if kind == "huge":
        logits[0, 0, -1] = 1e6
    if kind == "equal rows":
        logits[:, 0] = 1.25
    if kind == "as the model":
        logits[:] = logits[-1]
    ids = torch.randint(0, vocabulary, (2, rows), generator=generator)
    plan = StatisticsPlan(
        noise=draw(
            st.sampled_from([0.0, 0.11 * scale, Noise(tuple(0.11 * scale * i for i in range(depth + 1)), 0.03)])
        ),
        rounded_dtype=draw(st.sampled_from([None, torch.bfloat16])),
        warp=draw(st.sampled_from([None, partial(warp, temperature=0.5, top=2)])),
        top=draw(st.integers(0, 2)),
        chunk_rows=draw(st.sampled_from([None, 2])),
    )
    return spelled(vocabulary, depth), logits, ids, plan


@given(spelled_cases())
def test_adversarial_rows(case):
    parts, logits, (inputs, texts), plan = case
    found = layer_statistics(parts, logits, inputs, texts, plan)
    expected = truth.layer_statistics(parts, logits, inputs, texts, plan)
    assert_same(found, expected)


def test_by_hand():
    """Two tokens, one layer: every figure worked out."""
    parts = spelled(2, 1)
    third = math.log(2)  # softmax of (log 2, 0) is (2/3, 1/3)
    residuals = torch.tensor([[[third, 0.0]], [[0.0, third]]])
    found = layer_statistics(
        parts, residuals, torch.tensor([0]), torch.tensor([1]), StatisticsPlan(lenses=("final-norm",), noise=0.7)
    )
    lens, model = ({name: values[0, layer, 0].item() for name, values in found.items()} for layer in (0, 1))
    entropy = math.log(3) - 2 / 3 * math.log(2)
    assert lens == {
        "argmax": 0,
        "probability": pytest.approx(2 / 3),
        "margin": pytest.approx(third),
        "agrees": False,
        "near_tie": True,  # log 2 = 0.693 parts the model's token from the top
        "echo": True,
        "log_probability": pytest.approx(-math.log(3)),
        "rank": 1,
        "model_rank": 1,
        "entropy": pytest.approx(entropy),
        "kl": pytest.approx(math.log(2) / 3),
        "overlap": pytest.approx(2 / 3),
    }
    assert (model["agrees"], model["rank"], model["model_rank"], model["echo"]) == (True, 0, 0, False)
    assert model["kl"] == pytest.approx(0, abs=1e-6)
    assert model["overlap"] == pytest.approx(1)


def test_near_tie_is_about_the_agreement_bit():
    """Model says 0. Noise 1: a lens whose 1 and 2 are close at the top is no near-tie, because 0 is far below."""
    parts = spelled(3, 1)
    rows = {(0.0, 9.0, 8.9): False, (8.5, 9.0, 0.0): True, (9.0, 8.5, 0.0): True, (9.0, 7.5, 7.5): False}
    residuals = torch.stack([torch.tensor([*rows]), torch.tensor([[9.0, 0.0, 0.0]]).expand(len(rows), -1)])
    ids = torch.zeros(len(rows), dtype=torch.long)
    for mode in ("all", "agreement"):
        plan = StatisticsPlan(lenses=("final-norm",), mode=mode, noise=1.0)
        found = layer_statistics(parts, residuals, ids, ids, plan)
        assert found["near_tie"][0].tolist() == [[*rows.values()], [False] * len(rows)]
        assert found["agrees"][0, 0].tolist() == [False, False, True, True]


def test_accept_probability_of_a_token_that_one_side_left_out():
    parts = spelled(3, 1)
    residuals = torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
    plan = StatisticsPlan(lenses=("final-norm",), warp=partial(warp, temperature=1.0, top=2))
    found = layer_statistics(parts, residuals, torch.tensor([0, 0]), torch.tensor([0, 0]), plan)
    assert found["accept_probability"][0, 0].tolist() == [1.0, 0.0]  # the same row; q = 0
    found = layer_statistics(parts, residuals, torch.tensor([0, 0]), torch.tensor([2, 2]), plan)
    assert found["accept_probability"][0, 0].tolist() == [0.0, 1.0]  # neither has it; only p = 0


@pytest.mark.parametrize("mode", ["all", "agreement"])
def test_numbers_that_are_not_finite_name_the_first_layer(tiny, mode):
    residuals, inputs, texts, _ = read(tiny, random_texts(tiny, 1, 8))
    residuals[3:, 4] = torch.nan
    with pytest.raises(SelfCheckError, match=r"not finite .* at layer 3"):
        layer_statistics(tiny.anatomy, residuals, inputs, texts, StatisticsPlan(mode=mode))


@pytest.mark.parametrize("mode", ["all", "agreement"])
def test_logits_of_another_model_are_refused(tiny, mode):
    residuals, inputs, texts, logits = read(tiny, random_texts(tiny, 1, 8))
    plan = StatisticsPlan(mode=mode)
    layer_statistics(tiny.anatomy, residuals, inputs, texts, plan, logits)
    with pytest.raises(SelfCheckError, match="not the model's own"):
        layer_statistics(tiny.anatomy, residuals, inputs, texts, plan, logits.roll(1, -1))


def test_wrong_use(tiny):
    residuals, inputs, texts, _ = read(tiny, random_texts(tiny, 1, 8))
    parts, plan = tiny.anatomy, StatisticsPlan()
    with pytest.raises(InputError, match=r"shape \(5, 7, 36\); expected \(6, rows, 36\)"):
        layer_statistics(parts, residuals[1:], inputs, texts, plan)
    with pytest.raises(InputError, match="at least one row"):
        layer_statistics(parts, residuals[:, :0], inputs[:0], texts[:0], plan)
    with pytest.raises(InputError, match=r"ids must have shape \(7,\)"):
        layer_statistics(parts, residuals, inputs[1:], texts, plan)
    with pytest.raises(InputError, match="top 98 exceeds the vocabulary of 97"):
        layer_statistics(parts, residuals, inputs, texts, StatisticsPlan(top=98))
    for wrong in ({"lenses": ()}, {"lenses": ("raw", "raw")}, {"mode": "some"}, {"noise": -1.0}, {"chunk_rows": 0}):
        with pytest.raises(InputError):
            StatisticsPlan(**wrong)


# ------------------------------------------------------------------------------------------------------- memory
def measured_peak(run, tmp_path) -> int:
    """Most bytes that torch held at once while `run()` ran, beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]) for e in events if e["name"] == "[memory]")
    before = memory[0][1]["Total Allocated"] - memory[0][1]["Bytes"]
    return max(args["Total Allocated"] for _, args in memory) - before


@pytest.fixture(scope="module")
def wide():
    """3 layers with a vocabulary of 50,001: nothing but the logits matters for memory."""
    return synthetic(
        "smollm2-135m", layers=3, width=64, inner=96, heads=4, key_value_heads=2, head_dim=16, vocabulary=50_001
    )


@pytest.mark.parametrize(
    ("plan", "rows"),
    [
        (StatisticsPlan(lenses=("final-norm",)), 90),
        (StatisticsPlan(lenses=("final-norm",), chunk_rows=20), 120),
        (StatisticsPlan(rounded_dtype=torch.bfloat16, top=10, chunk_rows=10), 30),
        (StatisticsPlan(warp=partial(warp, temperature=0.7, top=50), chunk_rows=8), 24),
        (StatisticsPlan(mode="agreement"), 120),
    ],
    ids=["all", "small chunks", "both lenses", "sampled", "agreement"],
)
def test_peak_memory_is_bounded_as_stated(wide, plan, rows, tmp_path):
    parts = wide.anatomy
    generator = torch.Generator().manual_seed(1)
    residuals = torch.randn(parts.depth + 1, rows, parts.width, generator=generator)
    ids = torch.randint(0, parts.vocabulary, (rows,), generator=generator)
    bound = peak_bytes(parts, plan, rows)
    measured = measured_peak(lambda: layer_statistics(parts, residuals, ids, ids, plan), tmp_path)
    assert measured <= bound
    assert measured > bound / 3, "a bound this loose says nothing"
    everything = rows * (parts.depth + 1) * len(plan.lenses) * parts.vocabulary * 4
    if rows >= 120:
        assert bound < everything


def test_the_bound_does_not_grow_with_the_text(wide):
    for plan in (StatisticsPlan(), StatisticsPlan(mode="agreement"), StatisticsPlan(chunk_rows=16)):
        few, many = (peak_bytes(wide.anatomy, plan, rows) for rows in (1_000, 100_000))
        assert (many - few) / 99_000 < 1_000  # results: bytes a row
