"""Reductions against sorting, on rows with ties, holes and tails; the tie rule is the lowest token id."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lens import truth

from probekit.lens.reductions import BLOCK, block_maxima, rank_in_row, rank_of_token, rounded_argmax, topk_lowest_id

VOCABULARIES = (1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 4 * BLOCK + 17)


@st.composite
def logit_rows(draw):
    """(rows, vocabulary): few distinct values, so that ties abound; now and then a huge one, or holes."""
    vocabulary = draw(st.sampled_from(VOCABULARIES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from([2, 5, 1000]))
    rows = torch.randint(-values, values, (3, vocabulary), generator=generator).float() / 3
    kind = draw(st.sampled_from(["plain", "huge", "holes", "equal"]))
    if kind == "huge":
        rows[0, vocabulary // 2] = 3e38
    if kind == "holes":
        rows[torch.rand(rows.shape, generator=generator) < 0.7] = -torch.inf
    if kind == "equal":
        rows[1] = 7.0
    return rows


@given(logit_rows(), st.integers(1, 12))
def test_topk_lowest_id_are_the_stable_sort(rows, count):
    count = min(count, rows.shape[1])
    before = rows.clone()
    values, ids = topk_lowest_id(rows, block_maxima(rows), count)
    ordered = before.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(rows, before)  # restored, bit for bit
    assert torch.equal(values, ordered.values[:, :count])
    there = values > -torch.inf
    assert torch.equal(ids[there], ordered.indices[:, :count][there])


def test_topk_lowest_id_go_on_past_the_last_token():
    rows = torch.tensor([[1.0]])
    values, _ = topk_lowest_id(rows, block_maxima(rows), 2)
    assert values.tolist() == [[1.0, -torch.inf]]
    assert rows.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (4, 1000), (2, 50_000)])
def test_torch_argmax_has_the_same_tie_rule(dtype, shape):
    """Decoders call torch.argmax: it must choose the lowest id as well."""
    rows = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(rows.argmax(-1), truth.first_argmax(rows))
    assert torch.equal(topk_lowest_id(rows.float(), block_maxima(rows.float()), 1)[1][:, 0], truth.first_argmax(rows))


@given(logit_rows(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_rounded_argmax(rows, dtype):
    rows = rows + 50  # where bfloat16 has steps of a quarter, half of the thirds tie
    assert torch.equal(rounded_argmax(rows, block_maxima(rows), dtype), truth.first_argmax(rows.to(dtype).float()))


def test_rounded_argmax_by_hand():
    rows = torch.tensor([[0.0, 256.0, 257.0, 256.5]])  # bfloat16 has steps of 2 here; 257 goes to the even 256
    assert rounded_argmax(rows, block_maxima(rows), torch.bfloat16).tolist() == [1]
    assert topk_lowest_id(rows, block_maxima(rows), 1)[1].tolist() == [[2]]


@given(logit_rows(), st.data())
def test_ranks(rows, data):
    token = data.draw(st.integers(0, rows.shape[1] - 1))
    scratch = torch.full_like(rows, torch.nan)
    expected = truth.rank(rows, torch.full((len(rows),), token)).int()
    assert torch.equal(rank_of_token(rows, token, scratch), expected)
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, rows.shape[1] - 1), min_size=3, max_size=3)))
    expected = truth.rank(rows[:1].expand(3, -1), tokens).int()
    assert torch.equal(rank_in_row(rows[0], tokens, scratch), expected)


def test_ranks_by_hand():
    row = torch.tensor([2.0, 5.0, 2.0, 9.0, 2.0])
    scratch = torch.empty(3, 5)
    assert rank_in_row(row, torch.tensor([2, 3, 4]), scratch).tolist() == [3, 0, 4]
    assert rank_of_token(row[None], 4, scratch[:1]).tolist() == [4]
    assert rank_of_token(row[None], 1, scratch[:1]).tolist() == [1]
