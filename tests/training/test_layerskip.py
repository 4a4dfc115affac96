"""The LayerSkip recipe: rates and rotation worked by hand, the loss against its definition."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from probekit.errors import InputError
from probekit.hooks.sites import open_hooks
from probekit.training.layerskip import LayerSkip, LayerSkipLoss, exit_loss


@pytest.fixture(scope="module")
def model(tiny):
    return copy.deepcopy(tiny.model).requires_grad_(True)


@pytest.fixture(scope="module")
def batch(tiny):
    ids = torch.randint(0, tiny.anatomy.vocabulary, (3, 9), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


def site_losses(model, batch) -> list[float]:
    """The next-token loss of every site, from transformers' own hidden states."""
    inputs, targets = batch
    with torch.no_grad():
        states = model(inputs, output_hidden_states=True).hidden_states
        normed = [*map(model.model.norm, states[:-1]), states[-1]]
        return [functional.cross_entropy(model.lm_head(h).flatten(0, 1), targets.flatten()).item() for h in normed]


def test_dropout_rates_by_hand():
    # p_max (2^(l / (L-1)) - 1): none at the first layer, all of p_max at the last
    assert LayerSkip(dropout=0.2).dropout_rates(3) == pytest.approx([0.0, 0.2 * (math.sqrt(2) - 1), 0.2])
    assert LayerSkip(dropout=0.2).dropout_rates(1) == [0.0]


@given(depth=st.integers(2, 40), per_step=st.integers(1, 5))
def test_every_exit_has_its_turn(depth, per_step):
    recipe = LayerSkip(exits_per_step=per_step)
    steps = [recipe.exits_at(step, depth) for step in range(depth)]
    count = min(per_step, depth - 1)
    assert all(len(set(exits)) == count and set(exits) <= set(range(1, depth)) for exits in steps)
    assert {exit_layer for exits in steps for exit_layer in exits} == set(range(1, depth))


def test_one_exit_a_step_visits_each_equally_often():
    visited = [LayerSkip().exits_at(step, 12)[0] for step in range(22)]
    assert sorted(visited) == sorted(2 * list(range(1, 12)))
    assert all(abs(a - b) > 1 for a, b in itertools.pairwise(visited)), "neighbouring steps mix depths"


def test_no_exits_in_a_single_layer():
    assert LayerSkip().exits_at(0, 1) == []


@pytest.mark.parametrize(
    "settings",
    [{"dropout": 1.0}, {"dropout": -0.1}, {"exit_scale": -1}, {"exits_per_step": 0}, {"start": 1.5}],
)
def test_impossible_settings(settings):
    with pytest.raises(InputError, match=r"must"):
        LayerSkip(**settings)


def test_without_a_recipe_it_is_the_plain_loss(model, batch):
    loss = LayerSkipLoss(model, None, steps=10)(0, *batch)
    assert loss.item() == pytest.approx(site_losses(model, batch)[-1], rel=1e-5)


def test_loss_is_the_last_layer_plus_the_weighted_exits(model, batch):
    recipe = LayerSkip(dropout=0.0, exit_scale=0.6, exits_per_step=2, start=0.5)
    loss_of, truth = LayerSkipLoss(model, recipe, steps=10), site_losses(model, batch)
    assert loss_of(4, *batch).item() == pytest.approx(truth[-1], rel=1e-5), "before the start: the last layer only"
    first, second = recipe.exits_at(5, len(model.model.layers))
    assert loss_of(5, *batch).item() == pytest.approx(truth[-1] + 0.3 * (truth[first] + truth[second]), rel=1e-5)


def test_exit_loss_is_in_nats_a_token(tiny):
    """Equal logits: log(vocabulary)."""
    nothing, targets = torch.zeros(2, 3, tiny.anatomy.width), torch.zeros(2, 3, dtype=torch.long)
    assert exit_loss(tiny.anatomy, nothing, targets).item() == pytest.approx(math.log(97))


@pytest.mark.parametrize("per_sample", [False, True])
def test_dropout_has_the_rates_it_says(model, per_sample):
    recipe = LayerSkip(dropout=0.8, per_sample=per_sample)
    loss_of, draws, samples = LayerSkipLoss(model, recipe, steps=1), 1500, 3
    dropped = torch.zeros(5)
    before, after = torch.zeros(samples, 1, 1), torch.ones(samples, 1, 1)
    for _ in range(draws):
        edit = loss_of._dropout(recipe, samples, torch.device("cpu"))
        for layer in edit.skip:
            dropped[layer] += 1
        for layer, keep in edit.replace.items():
            dropped[layer] += (keep(before, after) == 0).float().mean()
    expected = torch.tensor(recipe.dropout_rates(5))
    assert torch.allclose(dropped / draws, expected, atol=4 * (0.25 / draws) ** 0.5)
    assert dropped[0] == 0


def test_per_sample_dropout_drops_whole_samples(model, batch):
    """With every sample kept or dropped alike, both ways of dropping are the same function."""
    inputs, targets = batch
    whole = LayerSkipLoss(model, LayerSkip(dropout=0.9, seed=1), steps=1)
    single = LayerSkipLoss(model, LayerSkip(dropout=0.9, seed=1, per_sample=True), steps=1)
    one = slice(0, 1)
    with torch.no_grad():
        for _ in range(4):  # a batch of one draws the same numbers either way
            assert torch.allclose(whole(0, inputs[one], targets[one]), single(0, inputs[one], targets[one]), atol=1e-6)


def test_its_randomness_is_its_own(model, batch):
    recipe = LayerSkip(dropout=0.5, seed=3)
    state = torch.get_rng_state()
    first = [LayerSkipLoss(model, recipe, steps=4)(step, *batch).item() for step in range(1)]
    loss_of = LayerSkipLoss(model, recipe, steps=4)
    torch.manual_seed(99)
    assert loss_of(0, *batch).item() == first[0]
    saved = loss_of.generator.get_state()
    after = loss_of(1, *batch).item()
    loss_of.generator.set_state(saved)
    assert loss_of(1, *batch).item() == after, "the generator is all the state that a checkpoint needs"
    torch.set_rng_state(state)


def test_training_with_it_helps_the_exits_and_leaves_no_trace(tiny, batch):
    model = copy.deepcopy(tiny.model).requires_grad_(True)
    config = model.config.to_dict()
    loss_of = LayerSkipLoss(model, LayerSkip(dropout=0.1, exits_per_step=2), steps=30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = site_losses(model, batch)
    for step in range(30):
        optimizer.zero_grad()
        loss_of(step, *batch).backward()
        optimizer.step()
    after = site_losses(model, batch)
    assert all(now < was - 0.5 for now, was in zip(after[1:], before[1:], strict=True))
    assert open_hooks(model) == []
    assert model.config.to_dict() == config
