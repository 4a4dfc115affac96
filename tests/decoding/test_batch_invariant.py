"""Batch-invariant passes: the same bits of a row, however many are computed with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import probekit
from probekit.costs.roofline import roofline_costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.batch_invariant import InvariantEngine, open_engine, tokens_at_once
from probekit.decoding.engine import Engine
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.drafting.drafters import ExitLayer
from probekit.drafting.keys import TREE
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import TreeShape
from probekit.errors import InputError, Remark, SelfCheckError
from probekit.hooks.sites import open_hooks
from probekit.lens.exit_heads import ExitHead
from probekit.models.loaded import batch_invariant, load
from probekit.models.synthetic import synthetic
from probekit.settings import Sampling
from probekit.tracing.block_backend import invariant_noise

PROMPTS = ["Once upon a time", "The king had a daughter", "In a deep wood"]
DTYPES = ("float32", pytest.param("bfloat16", marks=pytest.mark.second))


@pytest.fixture(scope="module", params=DTYPES)
def tales(request):
    return batch_invariant(load("tales-layerskip", device="cpu", dtype=request.param))


def logits(engine, ids, starts, cuts):
    """Logits of the rows' tokens, pass after pass. ids: (rows, tokens); each row begins at its start."""
    at, found = 0, []
    for size in cuts:
        places = engine.places([start + at for start in starts], size)
        found.append(engine.logits(engine.full(ids[:, at : at + size], places)))
        at += size
    return torch.cat(found, 1)


@given(st.data())
@settings(max_examples=8, deadline=None)
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_steps_and_in_passes_of_any_width(tales, data):
    length = 70  # past the end of a bucket of slots
    ids = torch.randint(0, tales.anatomy.vocabulary, (1, length), generator=torch.Generator().manual_seed(7))
    steps = logits(open_engine(tales.anatomy, 1, length), ids, [0], [1] * length)
    cuts = []
    while sum(cuts) < length:
        cuts.append(data.draw(st.integers(1, min(length - sum(cuts), 20))))
    assert torch.equal(logits(open_engine(tales.anatomy, 1, length), ids, [0], cuts), steps)


@torch.inference_mode()
def test_other_rows_of_a_batch_change_nothing(tales):
    ids = torch.randint(0, tales.anatomy.vocabulary, (3, 12), generator=torch.Generator().manual_seed(3))
    alone = [logits(open_engine(tales.anatomy, 1, 12), row[None], [0], [1] * 12) for row in ids]
    together = logits(open_engine(tales.anatomy, 3, 12), ids, [0, 0, 0], [5, 1, 6])
    assert torch.equal(together, torch.cat(alone))


@torch.inference_mode()
def test_plain_passes_do_depend_on_their_width(tales):
    """What the option is for: without it the same rows have other bits."""
    ids = torch.randint(0, tales.anatomy.vocabulary, (1, 24), generator=torch.Generator().manual_seed(3))
    one, other = (logits(Engine(tales.anatomy, 1, 24), ids, [0], cuts) for cuts in ([1] * 24, [8] * 3))
    assert not torch.equal(one, other)


def decoded(method, prompts, **more):
    return [each.tokens for each in method.decode(prompts, max_new_tokens=40, **more)]


@pytest.mark.parametrize(
    "sampling", [Sampling(), pytest.param(Sampling(temperature=0.8, top_p=0.9, seed=4), marks=pytest.mark.second)]
)
def test_batches_and_drafts_leave_the_tokens_of_a_prompt_alone(tales, sampling):
    prompts = [tales.tokenizer(text)["input_ids"] for text in PROMPTS]
    plain = Autoregressive(tales)
    alone = [decoded(plain, [ids], indices=[at], sampling=sampling)[0] for at, ids in enumerate(prompts)]
    assert decoded(plain, prompts, sampling=sampling) == alone
    if sampling.greedy:
        for exit_layer, length in ((3, 3), (6, 8)):
            assert decoded(SelfSpeculative(tales, exit_layer, length), prompts) == alone


@pytest.mark.second
def test_a_bf16_trace_is_proved_without_a_single_tie():
    model = load("tales-layerskip", device="cpu", dtype="bfloat16")
    trace = probekit.trace(model, PROMPTS, max_new_tokens=32, batch_invariant=True)
    assert trace.manifest.measured.noise == 0.0 and trace.manifest.settings.batch_invariant
    assert trace.near_tie_count()[0] == 0
    validation = probekit.validate(model, trace, exit_layers=[3, 9], draft_lengths=[2, 8])
    assert validation.holds
    for cell in validation.cells:
        assert (cell.rounds_equal, cell.tokens_equal, cell.ties, cell.excusable_share) == (True, True, 0, 0.0)
    usual = probekit.trace(model, PROMPTS, max_new_tokens=32)
    assert usual.near_tie_count()[0] > 0  # what the tolerance has to excuse without it


def test_a_sampled_text_has_the_same_chances_in_any_batch():
    model = batch_invariant(load("tales-layerskip", device="cpu", dtype="bfloat16"))
    settings = {"max_new_tokens": 16, "sampling": Sampling(temperature=0.7, seed=2)}
    together, alone = (probekit.trace(model, PROMPTS, batch_size=size, **settings) for size in (3, 1))
    for prompt in together.prompts:
        assert (together.outputs(prompt) == alone.outputs(prompt)).all()
        assert (together.values(prompt, "accept_probability") == alone.values(prompt, "accept_probability")).all()


def test_a_text_in_segments_is_the_text(tales, monkeypatch):
    whole = probekit.trace(tales, PROMPTS[:1], max_new_tokens=70)
    monkeypatch.setattr("probekit.tracing.plan.MOST_ROWS", 16)
    pieces = probekit.trace(tales, PROMPTS[:1], max_new_tokens=70)
    assert pieces.manifest.plan.segment_rows == 16
    for name in ("entropy", "argmax", "margin"):
        assert (pieces.values(0, name) == whole.values(0, name)).all()


@pytest.mark.second
def test_exit_heads_and_a_draft_model_are_read_as_they_draft(tmp_path):
    model = load("tales-layerskip", device="cpu", dtype="bfloat16")
    draft = load("tales-draft", device="cpu", dtype="bfloat16")
    heads = {3: ExitHead(0.02 * torch.randn(128, 128), 0.02 * torch.randn(128))}
    run = probekit.trace(model, PROMPTS, max_new_tokens=24, exit_heads=heads, draft_model=draft, batch_invariant=True)
    assert run.manifest.measured.drafter_noise == 0.0
    validation = probekit.validate(model, run, [(3, 3), (None, 4)], drafter=draft)
    assert validation.holds and all(cell.rounds_equal and cell.ties == 0 for cell in validation.cells)


def test_products_that_depend_on_the_place_are_taken_one_by_one(monkeypatch):
    """A model whose MLP adds what depends on the row's place: blocks of one, a remark, and the same bits."""
    loaded = synthetic("tiny", seed=5)
    inner = type(loaded.model.model.layers[0].mlp).forward

    def by_place(self, states):
        place = torch.arange(states.shape[0]).view(-1, *[1] * (states.dim() - 1))
        return inner(self, states) + 1e-3 * (place + 3 * (states.shape[1] - 1))

    monkeypatch.setattr(type(loaded.model.model.layers[0].mlp), "forward", by_place)
    model = batch_invariant(loaded)
    with pytest.warns(Remark, match="one token at a time"):
        assert tokens_at_once(model.anatomy) == 1
    ids = torch.arange(1, 13)[None] % model.anatomy.vocabulary
    with torch.inference_mode():
        steps = logits(open_engine(model.anatomy, 1, 12), ids, [0], [1] * 12)
        assert torch.equal(logits(open_engine(model.anatomy, 1, 12), ids, [0], [7, 5]), steps)


def test_a_broken_promise_is_found(monkeypatch):
    """Blocks of other sizes, which the check of places does not see: the tracer does not believe them."""
    fill = InvariantEngine._block

    def not_filled_up(self, chosen, every, visible):
        whole, self.at_once = self.at_once, len(chosen)
        try:
            return fill(self, chosen, every, visible)
        finally:
            self.at_once = whole

    monkeypatch.setattr(InvariantEngine, "_block", not_filled_up)
    model = batch_invariant(load("tales-layerskip", device="cpu", dtype="float32"))
    with pytest.raises(SelfCheckError, match="not batch-invariant here"):
        invariant_noise(model, list(range(5, 65)))


def test_the_model_is_left_as_it_was(unchanged):
    loaded = load("tales-tied", device="cpu")
    unchanged(loaded.model)
    probekit.decode(loaded, "Once", exit_layer=3, draft_length=2, max_new_tokens=8, batch_invariant=True)
    assert loaded.model.config._attn_implementation == "sdpa" and not open_hooks(loaded.model)
    assert not loaded.anatomy.batch_invariant


def test_what_is_refused(tales, tiny):
    with pytest.raises(InputError, match="not verified batch-invariantly"):
        Speculative(tales, TreeDrafts(ExitLayer(3), TreeShape.of_widths([2, 1])), 2)
    with pytest.raises(InputError, match="engine 'cuda' does not decode batch-invariantly"):
        probekit.decode(tales, "Once", engine="cuda")
    with pytest.raises(InputError, match="does not read batch-invariantly"):
        probekit.trace(tales, PROMPTS[:1], backend="nnsight", batch_invariant=True)
    with pytest.raises(InputError, match="are not read batch-invariantly"):
        probekit.trace(tales, PROMPTS[:1], draft_vocabulary=[1, 2, 3], batch_invariant=True)


@pytest.mark.second
def test_trees_are_not_ranked_where_they_are_not_run(tales):
    run = probekit.trace(tales, PROMPTS, max_new_tokens=12)
    ranking = probekit.rank(run, roofline_costs(run, device="h100"), draft_lengths=[2])
    assert not any(key.kind == TREE for each in ranking.ways if each.way for key in each.way.keys)
    assert "batch-invariantly" in dict(ranking.not_ranked)["trees"]
