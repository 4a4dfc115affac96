"""The Triton kernel against the slow truth, compiled where there is a GPU and in Triton's interpreter where there is
none; and compiled ahead of time, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lens import truth
from lens.spelled import random_texts, read

from probekit.errors import InputError
from probekit.lens.chunked import StatisticsPlan, layer_statistics
from probekit.lens.lens import Lens
from probekit.lens.noise import Noise

pytest.importorskip("triton", reason="Triton is not installed: it is in the extra `kernel`.")

from probekit.lens.row_kernel import row_statistics

pytestmark = [
    pytest.mark.second,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on infinities as planned
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(logits, model, inputs, texts, **setting):
    """The kernel's figures, on the CPU. logits: (tokens, sites, vocabulary)."""
    truth.check_interpreter()
    found = row_statistics(*(each.to(DEVICE) for each in (logits, model, inputs, texts)), **setting)
    return {name: figures.cpu() for name, figures in found.items()}


def slow(logits, model, inputs, texts, noise=0.0, rounding=0.0, temperature=None, rounded_dtype=None):
    """The truth's, site by site."""
    warp = None if temperature is None else partial(tempered, temperature=temperature)
    by_site = noise.tolist() if isinstance(noise, torch.Tensor) else [noise] * logits.shape[1]
    plan = StatisticsPlan(noise=Noise((*by_site, 0.0), rounding), warp=warp, rounded_dtype=rounded_dtype)
    sites = [
        truth.row_statistics(each, model, inputs, texts, plan, i) for i, each in enumerate(logits.float().unbind(1))
    ]
    return {name: torch.stack([site[name] for site in sites], 1) for name in sites[0]}


def tempered(logits, temperature):
    return (logits.double() / temperature).log_softmax(-1)


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() - {"finite"} == expected.keys()
    assert found["finite"].all()
    for name, values in expected.items():
        if values.dtype.is_floating_point:
            close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance / 3)
            close(found[name].double(), values.double(), msg=lambda message, name=name: f"{name}: {message}")
        else:
            assert torch.equal(found[name].to(values.dtype), values), name


@st.composite
def cases(draw):
    """Rows with ties, holes, one huge logit, equal logits, the model's own; vocabularies around the block of 64."""
    vocabulary = draw(st.sampled_from([2, 5, 63, 64, 65, 128, 150]))
    tokens, sites = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from([1, 4, 10_000]))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    shape = (tokens, sites + 1, vocabulary)
    logits = torch.randint(-values, values + 1, shape, generator=generator) * scale / values
    kind = draw(st.sampled_from(["plain", "huge", "last", "holes", "holes in both", "equal", "as the model"]))
    if kind == "huge":
        logits[0, 1, vocabulary // 2] = 1e6
    if kind == "last":
        logits[..., -1] = 50.0
    if kind.startswith("holes"):
        holes = torch.rand(shape, generator=generator) < 0.7
        holes[..., draw(st.integers(0, vocabulary - 1))] = False
        holes[:, 0] &= kind == "holes in both"
        logits[holes] = -torch.inf
    if kind == "equal":
        logits[:, 1] = 1.25
    if kind == "as the model":
        logits[:] = logits[:, :1]
    ids = torch.randint(0, vocabulary, (2, tokens), generator=generator)
    setting = {
        "noise": draw(st.sampled_from([0.0, 0.11 * scale, 0.11 * scale * torch.arange(logits.shape[1])])),
        "rounding": draw(st.sampled_from([0.0, 0.0137])),
        "temperature": draw(st.sampled_from([None, 0.5, 1.7])),
        "rounded_dtype": draw(st.sampled_from([None, torch.bfloat16, torch.float16])),
    }
    return logits, ids, setting


@given(cases())
@settings(max_examples=40)
def test_adversarial_rows(case):
    logits, (inputs, texts), setting = case
    before = logits.clone()
    found = run(logits, logits[:, 0], inputs, texts, block=64, **setting)
    assert torch.equal(logits, before)
    assert_same(found, slow(logits, logits[:, 0], inputs, texts, **setting))


def naive(logits, model, texts):
    """The figures as one writes them down, in the dtype of the rows."""
    log_q, log_p = logits.log_softmax(-1), model[:, None].log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    text = texts[:, None, None].expand(*logits.shape[:2], 1)
    return {
        "probability": q.amax(-1),
        "log_probability": log_q.gather(-1, text)[..., 0],
        "entropy": -(q * log_q).sum(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "overlap": torch.minimum(p, q).sum(-1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("vocabulary", [1024, 2999])
def test_no_worse_than_the_naive_reductions(vocabulary, scale, dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(2, 3, vocabulary, generator=generator) * scale).to(dtype)
    inputs, texts = torch.randint(0, vocabulary, (2, 2), generator=generator)
    found = run(logits, logits[:, 0], inputs, texts, block=512)
    expected = slow(logits, logits[:, 0].float(), inputs, texts)
    for name, values in naive(logits, logits[:, 0], texts).items():
        error, theirs = ((figures.double() - expected[name]).abs().max() for figures in (found[name], values))
        assert error <= theirs + 2e-6 * max(1.0, scale), name
    for name in ("argmax", "rank", "model_rank", "agrees"):
        assert torch.equal(found[name].to(expected[name].dtype), expected[name]), name


def test_by_hand():
    """Model (0, log 2, -inf, 0) and row (log 2, 0, 0, -inf): softmaxes (1, 2, 0, 1)/4 and (2, 1, 1, 0)/4."""
    log2 = 0.6931471805599453
    model, row = [0.0, log2, -torch.inf, 0.0], [log2, 0.0, 0.0, -torch.inf]
    logits = torch.tensor([[model, row]])
    found = run(logits, logits[:, 0], torch.tensor([0]), torch.tensor([2]), noise=0.7, temperature=0.5)
    assert {name: figures[0, 1].item() for name, figures in found.items()} == {
        "argmax": 0,
        "margin": pytest.approx(log2),
        "agrees": False,
        "near_tie": True,  # the model's token lies log 2 = 0.693 below
        "echo": True,
        "rank": 2,  # 0 is larger, 1 is equal and has the lower id
        "model_rank": 1,
        "probability": pytest.approx(1 / 2),
        "log_probability": pytest.approx(-2 * log2),
        "entropy": pytest.approx(1.5 * log2),
        "kl": torch.inf,  # the model's 3 cannot be drawn from the row
        "overlap": pytest.approx(1 / 6 + 1 / 6),  # squared: (1, 4, 0, 1)/6 and (4, 1, 1, 0)/6
        "accept_probability": 1.0,  # what the model would never draw
        "finite": True,
    }
    assert found["kl"][0, 0] == 0
    assert found["entropy"][0, 0].item() == pytest.approx(1.5 * log2)
    assert found["accept_probability"][0, 0] == 0


def test_the_same_names_and_figures_as_the_engine(tiny):
    """What `layer_statistics` gives for the final-norm lens, from the logits that it computes on the way."""
    residuals, inputs, texts, _ = read(tiny, random_texts(tiny, 2, 6))
    plan = StatisticsPlan(lenses=("final-norm",), noise=1e-2, rounded_dtype=torch.bfloat16)
    expected = layer_statistics(tiny.anatomy, residuals, inputs, texts, plan)
    logits = torch.stack([Lens(tiny.anatomy)(residual, layer) for layer, residual in enumerate(residuals)], 1)
    found = run(logits, logits[:, -1], inputs, texts, noise=1e-2, rounded_dtype=torch.bfloat16, block=128)
    assert_same({name: figures.T[None] for name, figures in found.items()}, expected)
    assert {name: found[name].dtype for name in expected} == {name: each.dtype for name, each in expected.items()}


@pytest.mark.parametrize("vocabulary", [40, 64, 100])
def test_rows_that_are_not_finite_are_told(vocabulary):
    logits = torch.randn(1, 5, vocabulary, generator=torch.Generator().manual_seed(1))
    logits[0, 1, vocabulary // 2] = torch.nan
    logits[0, 2, -1] = torch.inf
    logits[0, 3] = -torch.inf
    logits[0, 4] = torch.nan
    zero = torch.zeros(1, dtype=torch.long)
    found = run(logits, logits[:, 0], zero, zero, block=64, temperature=0.9, rounded_dtype=torch.bfloat16)
    assert found["finite"].tolist() == [[True, False, False, False, False]]
    assert ((found["argmax"] >= 0) & (found["argmax"] < vocabulary)).all()


def test_rows_may_lie_apart():
    """Views: the sites of every other token, of a vocabulary cut out of a padded one."""
    generator = torch.Generator().manual_seed(2)
    padded = torch.randn(6, 3, 80, generator=generator)
    logits, model = padded[::2, 1:, :70], padded[::2, 0, :70]
    inputs, texts = torch.randint(0, 70, (2, 3), generator=generator)
    assert_same(run(logits, model, inputs, texts, block=32), slow(logits, model, inputs, texts))


def test_wrong_use():
    logits, ids = torch.zeros(2, 3, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(InputError, match=r"logits are \(2, 8\) of torch.float32; expected \(tokens, sites, vocab"):
        row_statistics(logits[:, 0], logits[:, 0], ids, ids)
    with pytest.raises(InputError, match=r"torch.float64; expected .* float32 or smaller"):
        row_statistics(logits.double(), logits[:, 0], ids, ids)
    with pytest.raises(InputError, match=r"model's logits are \(2, 7\); expected \(2, 8\)"):
        row_statistics(logits, logits[:, 0, :7], ids, ids)
    with pytest.raises(InputError, match="contiguous along the vocabulary"):
        row_statistics(logits.mT.contiguous().mT, logits[:, 0], ids, ids)
    with pytest.raises(InputError, match=r"ids must have shape \(2,\), not \(1,\) and \(2,\)"):
        row_statistics(logits, logits[:, 0], ids[:1], ids)
    with pytest.raises(InputError, match="temperature must exceed 0, not 0"):
        row_statistics(logits, logits[:, 0], ids, ids, temperature=0.0)
    with pytest.raises(InputError, match=r"bfloat16 or torch.float16, not torch.float32"):
        row_statistics(logits, logits[:, 0], ids, ids, rounded_dtype=torch.float32)


COMPILE = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from probekit.lens import row_kernel as kernel

numbers = ("stride", "token_stride", "site_stride", "model_stride", "tokens", "sites", "vocabulary")
TYPES = dict.fromkeys(numbers, "i32")
TYPES |= {"inverse": "fp32", "own": "*fp32", "numbers": "*fp32", "tops": "*i32", "counts": "*i32", "text_ids": "*i64"}
for dtype in ("fp32", "bf16"):
    for warm, rounded in ((False, None), (True, tl.bfloat16), (True, tl.float16)):
        for entry in (kernel._model_rows, kernel._rows):
            fixed = {"WARM": warm, "ROUNDED": rounded, "BLOCK": kernel.BLOCK}
            types = TYPES | {"model": f"*{dtype}", "logits": f"*{dtype}"} | dict.fromkeys(fixed, "constexpr")
            source = ASTSource(entry, {name: types[name] for name in entry.arg_names}, fixed)
            made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernel.WARPS})
            print(dtype, warm, rounded, len(made.asm["cubin"]) > 0)
"""


def test_it_compiles_for_a_gpu_that_is_not_here(tmp_path):
    """To machine code of compute capability 9.0: what the interpreter lets pass, the compiler may refuse."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    made = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    assert [line.rpartition(" ")[2] for line in made.stdout.splitlines()] == ["True"] * 12


def test_statistics_do_not_need_triton():
    code = "import sys, probekit.lens.chunked; print({'triton', 'probekit.lens.row_kernel'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
