from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from probekit.errors import InputError
from probekit.lens import draft_rows
from probekit.lens.draft_rows import DraftRows
from probekit.lens.lens import Lens
from probekit.lens.noise import Noise

DEPTH, VOCABULARY, WIDTH = 5, 97, 36


def whole_numbers(tiny, seed, rows):
    """A model without a norm whose logits are small whole numbers, so that ties are exact and frequent; residuals."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randint(-1, 2, head.weight.shape, generator=generator))
    parts = replace(tiny.anatomy, norm=nn.Identity(), head=head, sizes=None)
    return parts, torch.randint(-1, 2, (DEPTH + 1, rows, WIDTH), generator=generator).float()


def agreement(logits, model, kept):
    """Whether a head of the kept tokens says the model's token: (layers, rows) bool. Equal logits: the lowest id."""
    ids = torch.tensor(sorted(kept))
    best = logits[..., ids].amax(-1, keepdim=True)
    return ids[(logits[..., ids] == best).int().argmax(-1)] == model


def lowest_argmax(logits):
    return (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of few rows, so that a small vocabulary has several."""
    monkeypatch.setattr(draft_rows, "FIRST_BLOCK", 3)
    monkeypatch.setattr(draft_rows, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(draft_rows, "BLOCK_BYTES", {"cpu": 4 * 5 * 20, "else": 400})


BY_ROW = Noise(tuple(1.0 + 0.5 * layer for layer in range(DEPTH + 1)), 0.1)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), noise=st.sampled_from([0.0, 1.0, 2.5, BY_ROW]),
       data=st.data())  # fmt: skip
def test_every_size_of_head_by_brute_force(tiny, blocks, seed, rows, noise, data):
    parts, residuals = whole_numbers(tiny, seed, rows)
    order = data.draw(st.permutations(range(VOCABULARY)))
    found = DraftRows(parts, torch.tensor(order)).read(residuals, noise)
    logits = residuals @ parts.head.weight.T
    model, of = lowest_argmax(logits[-1]), Noise.of(noise)
    rank = torch.tensor(order).argsort()[model]
    up_to, surely, perhaps = (found[name] for name in ("agrees_up_to", "surely_up_to", "perhaps_up_to"))
    assert ((surely <= up_to) & (up_to <= perhaps)).all()
    assert (torch.stack([up_to, surely, perhaps])[:, -1] == VOCABULARY).all()
    own = logits.gather(-1, model.expand(DEPTH + 1, -1)[..., None])
    others = logits.scatter(-1, model.expand(DEPTH + 1, -1)[..., None], -torch.inf)
    for size in range(1, VOCABULARY + 1):
        kept = order[:size]
        inside = rank < size
        expected = agreement(logits[:-1], model, kept)
        assert torch.equal((inside & (size <= up_to))[:-1], expected & inside)
        assert not (expected & ~inside).any()
        tolerance = of.around(torch.tensor(of.at(DEPTH))[:, None], own[..., 0])
        near = (own[..., 0] - others[..., kept].amax(-1)).abs() < tolerance
        assert torch.equal(((surely < size) & (size <= perhaps))[:-1], near[:-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoder_that_rounds_its_logits(tiny, blocks, dtype):
    generator = torch.Generator().manual_seed(0)
    residuals = torch.randn(DEPTH + 1, 30, WIDTH, generator=generator)
    residuals[:-1] = residuals[-1] + 0.3 * residuals[:-1]  # layers that often agree
    order = torch.randperm(VOCABULARY, generator=generator)
    found = DraftRows(tiny.anatomy, order, dtype).read(residuals, noise=0.1)["agrees_up_to_rounded"]
    lens = Lens(tiny.anatomy)
    logits = torch.stack([lens(residual, layer) for layer, residual in enumerate(residuals)]).to(dtype).float()
    model = lowest_argmax(logits[-1])
    assert 0.3 < (lowest_argmax(logits[:-1]) == model).float().mean() < 0.9
    for size in range(1, VOCABULARY + 1):
        inside = order.argsort()[model] < size
        assert torch.equal((inside & (size <= found))[:-1], agreement(logits[:-1], model, order[:size].tolist()))


def test_a_head_of_all_rows_agrees_where_the_lens_does(any_tiny):
    parts = any_tiny.anatomy
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(3))
    hidden = any_tiny.model(ids, output_hidden_states=True).hidden_states
    residuals = torch.cat([*hidden[:-1], torch.zeros_like(hidden[-1])])
    residuals[-1] = parts.layers[-1](hidden[-2], position_embeddings=parts.rotary(hidden[0], torch.arange(40)[None]))[0]
    lens = Lens(parts)
    logits = torch.stack([lens(residual, layer) for layer, residual in enumerate(residuals)])
    found = DraftRows(parts, torch.arange(parts.vocabulary)).read(residuals)["agrees_up_to"]
    assert torch.equal(found == parts.vocabulary, logits.argmax(-1) == logits[-1].argmax(-1))


@pytest.mark.parametrize("order", [[0, 1], [*range(96), 95], [*range(98)]])
def test_an_order_names_every_token_once(tiny, order):
    with pytest.raises(InputError, match=r"each token of 0\.\.96 once"):
        DraftRows(tiny.anatomy, torch.tensor(order))


def test_few_rows_of_the_head_settle_a_layer_that_disagrees(tiny, monkeypatch):
    """A layer that a frequent token beats never sees the other rows of the head."""
    parts, residuals = whole_numbers(tiny, 1, 6)
    often = (residuals @ parts.head.weight.T)[:-1].sum((0, 1)).argsort(descending=True)
    tried = []
    original = DraftRows._first

    def watched(self, states, targets, places, among):
        tried.append((places.start, len(states)))
        return original(self, states, targets, places, among)

    monkeypatch.setattr(DraftRows, "_first", watched)
    monkeypatch.setattr(draft_rows, "FIRST_BLOCK", 10)
    DraftRows(parts, often).read(residuals)
    assert tried[0] == (0, 6 * DEPTH)
    assert [start for start, _ in tried] == [0, 10, 50][: len(tried)]
    assert tried[1][1] < tried[0][1]
