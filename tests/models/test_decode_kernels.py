"""The kernels of a decoding step against plain torch: compiled where there is a GPU, in Triton's interpreter elsewhere,
and compiled ahead of time, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lens import truth
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

pytest.importorskip("triton", reason="Triton is not installed: it is in the extra `kernel`.")

from probekit.models import attention_kernel, layer_kernels
from probekit.models.head_kernel import best_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.second)], ids=["float32", "bfloat16"]
)
EPSILON = 1e-5


def random(*shape, seed=0, dtype=torch.float32):
    truth.check_interpreter()
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype).to(DEVICE)


def same(found, expected):
    """Equal but for the order of float32 sums, which in bfloat16 moves hardly a number, and that by one step."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    else:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=4e-6)
        assert (found == expected).float().mean() > 0.98


# --------------------------------------------------------------------------------------------------- norm and residual
@BOTH
@pytest.mark.parametrize("width", [36, 64, 130])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_norms_are_the_familys_own(kind, width, dtype):
    own, behind = (kind(width, eps=EPSILON).to(DEVICE, dtype) for _ in range(2))
    own.weight.data, behind.weight.data = random(2, width, seed=1, dtype=dtype)
    residual, added = random(2, 2, 3, width, dtype=dtype)
    plus = kind is Gemma3RMSNorm
    same(layer_kernels.norm(residual, own.weight, EPSILON, plus), own(residual))
    total, normed = layer_kernels.add_norm(residual, added, None, own.weight, EPSILON, plus)
    assert torch.equal(total, residual + added)
    same(normed, own(residual + added))
    total, normed = layer_kernels.add_norm(residual, added, behind.weight, own.weight, EPSILON, plus)
    same(total, residual + behind(added))
    same(normed, own(total))


# -------------------------------------------------------------------------------------------------- rotary and cache
@BOTH
@pytest.mark.parametrize(("heads", "own", "width"), [(4, 2, 8), (3, 1, 10), (6, 6, 12)])
def test_queries_turn_in_their_place_and_keys_and_values_are_written(heads, own, width, dtype):
    """As transformers rotates, to the bit; rows stand at positions of their own, and nothing else is written."""
    rows, tokens, slots = 2, 3, 16
    qkv = random(rows, tokens, (heads + 2 * own) * width, dtype=dtype)
    cache = random(2, rows + 1, own, slots, width, seed=1, dtype=dtype)[:, :rows]  # a view, as after rows have ended
    cos, sin = random(2, slots, width, seed=2, dtype=dtype)
    every = torch.tensor([[3, 4, 5, 6], [11, 12, 13, 14]], device=DEVICE)
    positions = every[:, 1:]
    query, key, value = qkv.unflatten(-1, (-1, width)).transpose(1, 2).split([heads, own, own], 1)
    query, key = apply_rotary_pos_emb(query, key, cos[positions], sin[positions])
    keys, values = cache.clone()
    at = positions[:, None, :, None].expand(rows, own, tokens, width)
    expected = keys.scatter(2, at, key), values.scatter(2, at, value)
    found = qkv.clone()
    layer_kernels.rotate_and_write(found, *cache, cos, sin, positions, None, None, EPSILON, False)
    if dtype == torch.float32:
        torch.testing.assert_close(found[..., : heads * width], query.transpose(1, 2).flatten(2))
        torch.testing.assert_close(cache, torch.stack(expected))
    else:
        assert torch.equal(found[..., : heads * width], query.transpose(1, 2).flatten(2))
        assert torch.equal(cache, torch.stack(expected))
    assert torch.equal(found[..., heads * width :], qkv[..., heads * width :])


@BOTH
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_queries_and_keys_with_norms_of_their_own(kind, dtype):
    rows, tokens, heads, own, width, slots = 1, 2, 4, 2, 10, 8
    qkv = random(rows, tokens, (heads + 2 * own) * width, dtype=dtype)
    norms = [kind(width, eps=EPSILON).to(DEVICE, dtype) for _ in range(2)]
    norms[0].weight.data, norms[1].weight.data = random(2, width, seed=1, dtype=dtype)
    keys, values = torch.zeros(2, rows, own, slots, width, dtype=dtype, device=DEVICE)
    cos, sin = random(2, slots, width, seed=2, dtype=dtype)
    positions = torch.tensor([[4, 5]], device=DEVICE)
    query, key, _ = qkv.clone().unflatten(-1, (-1, width)).transpose(1, 2).split([heads, own, own], 1)
    query, key = apply_rotary_pos_emb(norms[0](query), norms[1](key), cos[positions], sin[positions])
    layer_kernels.rotate_and_write(
        qkv, keys, values, cos, sin, positions, norms[0].weight, norms[1].weight, EPSILON, kind is Gemma3RMSNorm
    )
    same(qkv[..., : heads * width], query.transpose(1, 2).flatten(2))
    same(keys[:, :, 4:6], key)


# --------------------------------------------------------------------------------------------------------- attention
def slow_attention(qkv, keys, values, positions, visible, scale, window=None, soft_cap=None):
    """In float64, slot by slot masked."""
    own, width = keys.shape[1], keys.shape[3]
    heads = qkv.shape[2] // width - 2 * own
    query = qkv[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2).double()
    key, value = (each[:, :, :visible].repeat_interleave(heads // own, 1).double() for each in (keys, values))
    slots, stands = torch.arange(visible, device=DEVICE), positions[:, None, :, None]
    shown = slots <= stands
    if window is not None:
        shown = shown & (slots > stands - window)
    scores = query @ key.mT * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    mixed = scores.masked_fill(~shown, -torch.inf).softmax(-1) @ torch.where(key.isnan(), 0.0, value)
    return mixed.transpose(1, 2).flatten(2)


def attention_case(rows, tokens, own, groups, width, slots, starts, dtype=torch.float32, seed=0):
    qkv = random(rows, tokens, own * (groups + 2) * width, seed=seed, dtype=dtype)
    keys, values = random(2, rows, own, slots, width, seed=seed + 1, dtype=dtype)
    positions = torch.tensor(starts, device=DEVICE)[:, None] + torch.arange(tokens, device=DEVICE)
    return qkv, keys, values, positions


@BOTH
@pytest.mark.parametrize(
    ("rows", "tokens", "own", "groups", "width", "visible", "starts", "more"),
    [
        (1, 1, 2, 4, 8, 64, [0], {}),
        (3, 5, 1, 3, 10, 192, [0, 63, 187], {}),
        (2, 3, 2, 1, 20, 128, [70, 90], {"window": 9}),
        (1, 17, 1, 2, 16, 128, [64], {"window": 70, "soft_cap": 2.0}),
        (2, 1, 2, 3, 12, 640, [3, 600], {"soft_cap": 1.5}),
    ],
)
def test_attention_is_the_masked_softmax(rows, tokens, own, groups, width, visible, starts, more, dtype):
    """Odd shapes, grouped heads, rows at positions of their own, windows, soft caps; over one split and over many."""
    qkv, keys, values, positions = attention_case(rows, tokens, own, groups, width, visible + 64, starts, dtype)
    expected = slow_attention(qkv, keys, values, positions, visible, width**-0.5, **more)
    furthest = int(positions.max()) + 1
    keys[:, :, furthest:], values[:, :, furthest:] = torch.nan, torch.nan  # what no token sees is never read
    found = attention_kernel.attend(qkv, keys, values, positions, visible, width**-0.5, **more)
    assert found.dtype == dtype
    close = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(found.double(), expected, **close)


def test_in_float32_it_is_as_near_to_the_truth_as_torchs_own():
    qkv, keys, values, positions = attention_case(2, 3, 2, 3, 16, 256, [40, 200])
    own, width = keys.shape[1], keys.shape[3]
    query = qkv[..., : 6 * width].unflatten(-1, (6, width)).transpose(1, 2)
    mask = (torch.arange(256, device=DEVICE) <= positions[..., None])[:, None]
    theirs = functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
    expected = slow_attention(qkv, keys, values, positions, 256, width**-0.5)
    mine = attention_kernel.attend(qkv, keys, values, positions, 256, width**-0.5)
    allowed = (theirs.transpose(1, 2).flatten(2) - expected).abs().max() + 1e-7
    assert own == 2 and (mine - expected).abs().max() <= 2 * allowed


@pytest.mark.second
@given(st.data())
@settings(max_examples=20)
def test_any_attention(data):
    whole = st.integers
    rows, tokens, own, groups = (data.draw(whole(1, most)) for most in (3, 6, 2, 5))
    width, blocks = data.draw(st.sampled_from([2, 8, 14, 32])), data.draw(whole(1, 5))
    starts = data.draw(st.lists(whole(0, 64 * blocks - tokens), min_size=rows, max_size=rows))
    window = data.draw(st.one_of(st.none(), whole(2, 100)))
    case = attention_case(rows, tokens, own, groups, width, 64 * blocks, starts, seed=data.draw(whole(0, 99)))
    found = attention_kernel.attend(*case, 64 * blocks, 0.3, window)
    torch.testing.assert_close(found.double(), slow_attention(*case, 64 * blocks, 0.3, window), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("visible", [64, 128, 4096, 8192, 131_072])
def test_splits_cover_all_slots_once(rows, visible):
    slots, number = attention_kernel.splits(rows, 8, visible)
    assert slots % attention_kernel.BLOCK == 0 and slots * (number - 1) < visible <= slots * number
    assert number <= attention_kernel.MOST_SPLITS
    assert rows < 300 or number == 1  # there are programs enough


# ------------------------------------------------------------------------------------------------ activation and head
@BOTH
@pytest.mark.parametrize(("name", "theirs"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
@pytest.mark.parametrize("inner", [25, 1500])
def test_activations_are_transformers(name, theirs, inner, dtype):
    gate_up = 4 * random(1, 2, 2 * inner, dtype=dtype)
    gate, up = gate_up.chunk(2, -1)
    found, expected = layer_kernels.activate(gate_up, name), ACT2FN[theirs](gate) * up
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    elif name == "silu":
        same(found, expected)
    else:  # torch's 1 + tanh cancels where gates are far below 0
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=4e-6)


@BOTH
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize(("vocabulary", "width"), [(64, 32), (97, 36), (300, 130)])
def test_the_best_token_is_the_argmax_of_the_rounded_products(rows, vocabulary, width, dtype):
    states, weight = random(1, rows, width, dtype=dtype), random(vocabulary, width, seed=1, dtype=dtype)
    found = best_tokens(states, weight)
    products = functional.linear(states, weight)
    assert found.shape == (1, rows) and found.dtype == torch.int64
    if dtype == torch.float32:
        assert torch.equal(found, products.argmax(-1))
    else:  # another order of sums may round one product elsewhere: it is a largest one to within a step
        best = products.gather(-1, found[..., None])[..., 0]
        assert (best >= products.amax(-1) - 2**-7 * products.amax(-1).abs()).all()


def test_of_equal_products_the_lowest_token_is_the_best():
    """Also where they are equal only after rounding, and in blocks far apart; and a row of NaN gives a token."""
    truth.check_interpreter()
    weight = torch.zeros(200, 8, device=DEVICE)
    weight[[70, 130, 190], 0] = 1.0
    states = torch.zeros(3, 8, device=DEVICE)
    states[0, 0], states[2] = 1.0, torch.nan
    assert best_tokens(states, weight).tolist()[:2] == [70, 0]
    assert 0 <= best_tokens(states, weight)[2] < 200
    weight[190, 1], states[0, 1] = 1.0, 2.0**-12
    assert best_tokens(states, weight)[0] == 190
    assert best_tokens(states.bfloat16(), weight.bfloat16())[0] == 70  # 1 + 2^-12 is 1


def test_what_fake_tensors_are_told_is_true():
    """Shapes, dtypes and what is written: by torch's own checks of an operation."""
    qkv, keys, values, positions = attention_case(2, 3, 2, 3, 8, 64, [3, 40])
    cos, sin = random(2, 64, 8, seed=2)
    residual, added, weight = random(2, 3, 36), random(2, 3, 36), random(36)
    operations = torch.ops.probekit
    partial = operations.attend_in_splits(qkv, keys, values, positions, 64, 0.3, 0, 0.0)
    blocks = operations.best_in_blocks(residual, random(97, 36))
    for operation, arguments in (
        (operations.norm, (residual, weight, EPSILON, False)),
        (operations.add_norm, (residual, added, None, weight, EPSILON, False)),
        (operations.rotate_and_write, (qkv, keys, values, cos, sin, positions, None, None, EPSILON, False)),
        (operations.attend_in_splits, (qkv, keys, values, positions, 64, 0.3, 0, 0.0)),
        (operations.put_together, (*partial, positions, qkv, 2)),
        (operations.activate, (residual, "silu")),
        (operations.best_in_blocks, (residual, random(97, 36))),
        (operations.best_of_blocks, (*blocks, 97)),
    ):
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from probekit.models import attention_kernel as attention, head_kernel as head, layer_kernels as layer

INTEGERS = set('''width row_step token_step key_row key_head key_slot value_row value_head value_slot tokens heads own
    queries number slots seen window inner rows vocabulary blocks groups'''.split())
FLOATS = {"epsilon", "scale", "soft_cap"}
FIXED_TYPES = {"positions": "*i64", "sums": "*fp32", "scales": "*fp32", "largest": "*fp32", "best": "*i32"}
flags = lambda *names: [dict(zip(names, (i >> k & 1 == 1 for k in range(len(names))))) for i in range(2 ** len(names))]
cases = [
    (layer._norm, {"BLOCK": 4096}, flags("ADD", "BEHIND", "ONE_PLUS")),
    (layer._rotate, {"WIDTH": 128, "HALF": 64}, flags("NORMED", "ONE_PLUS")),
    *((attention._attend, {"WIDTH": width, "queries": queries}, flags("WINDOW", "CAPPED")[::3])
      for width, queries in ((64, 4), (128, 4), (128, 200), (256, 40))),
    (attention._together, {"WIDTH": 128, "WIDE": 128, "SPLITS": 32}, [{}]),
    (layer._activate, {"BLOCK": 1024}, flags("SILU")),
    (head._head, {"ROWS": 16, "TOKENS": 64, "WIDTH": 128}, [{}]),
    (head._leader, {"BLOCK": 2048}, [{}]),
]
for dtype in ("fp32", "bf16", "fp16"):
    for entry, sizes, choices in cases:
        for choice in choices:
            fixed, options = sizes | choice, {"num_warps": 4}
            if "queries" in fixed:
                fixed |= attention.tile(fixed.pop("queries"), fixed["WIDTH"], 4 if dtype == "fp32" else 2)
                options["num_stages"] = fixed.pop("num_stages")
            types = {}
            for name in entry.arg_names:
                if name in fixed: types[name] = "constexpr"
                elif name in INTEGERS: types[name] = "i32"
                elif name in FLOATS: types[name] = "fp32"
                else: types[name] = FIXED_TYPES.get(name, f"*{dtype}")
            if entry is head._leader: types["out"] = "*i64"
            made = compile(ASTSource(entry, types, fixed), target=GPUTarget("cuda", 90, 32), options=options)
            print(dtype, entry.__name__, choice, len(made.asm["cubin"]) > 0, made.metadata.shared)
"""


@pytest.mark.long
@pytest.mark.second
def test_they_compile_for_a_gpu_that_is_not_here(tmp_path):
    """To machine code of compute capability 9.0; what they hold of a multiprocessor's memory fits into it."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    made = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    lines = [line.rsplit(" ", 2) for line in made.stdout.splitlines()]
    assert len(lines) == 3 * (8 + 4 + 8 + 1 + 2 + 1 + 1)
    assert {works for _, works, _ in lines} == {"True"}
    assert max(int(shared) for *_, shared in lines) <= 227 * 1024
