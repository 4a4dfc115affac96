"""Trees: their shapes by hand, the walk along a trace against a search, and the decoder that verifies them at once."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from traces.fabricate import fabricate

import probekit
from probekit.costs.roofline import roofline_costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import Speculative
from probekit.drafting.drafters import DraftModel, ExitLayer
from probekit.drafting.keys import DrafterKey
from probekit.drafting.policies import ConfidenceThreshold
from probekit.drafting.round_policies import Planned
from probekit.drafting.text_drafters import PromptLookup
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import TreeShape, tree_shape_named
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.lens.exit_heads import fit_heads
from probekit.models.synthetic import synthetic
from probekit.prediction.predict import predict
from probekit.prediction.replay import replay
from probekit.prediction.shapes import expected_accepted, grown, rank_shares
from probekit.settings import Sampling
from probekit.tracing.prompts import bundled_prompts
from probekit.tracing.tracer import trace
from probekit.validation.run import validate
from probekit.validation.ways import validate_ways

SHAPES = ("3x1", "2x2x1x1", "4/2/1/0/0/1/0/0/0")


# -- shapes
def test_a_shape_by_hand():
    shape = tree_shape_named("2/1/0/2/0/0")
    assert shape.paths == ((0,), (1,), (0, 0), (0, 0, 0), (0, 0, 1))
    assert shape.parents == (0, 0, 1, 3, 3) and shape.children == ((1, 2), (3,), (), (4, 5), (), ())
    assert shape.depth == 3 and shape.sizes.tolist() == [0, 2, 3, 5] and str(shape) == "2/1/0/2/0/0"
    assert shape.ancestors[5].tolist() == [True, True, False, True, False, True]


def test_widths_make_trees():
    shape = TreeShape.of_widths([4, 2, 1])
    assert shape.sizes.tolist() == [0, 4, 12, 20] and str(shape) == "4x2x1"
    assert TreeShape.of_widths([1, 1, 1]).parents == (0, 1, 2)


@pytest.mark.parametrize(
    "text", ["", "x", "4x", "0", "2x0", "-1", "3/0/0", "2/1/0/0/0", "1000", "9x9x9", "a/b", "16x16"]
)
def test_names_that_make_no_tree(text):
    with pytest.raises(InputError):
        tree_shape_named(text)


def test_a_tree_holds_parents_and_better_ranks():
    with pytest.raises(InputError, match=r"cannot hold \(1,\) without its parent and every better rank"):
        TreeShape(((1,),))
    with pytest.raises(InputError, match=r"cannot hold \(0, 0, 0\)"):
        TreeShape(((0,), (0, 0, 0)))
    with pytest.raises(InputError, match="distinct nodes"):
        TreeShape(((0,), (0,)))


@st.composite
def shapes(draw):
    paths = {(0,)}
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(sorted({(), *paths})))
        paths.add((*parent, sum(path[:-1] == parent for path in paths)))
    return TreeShape(tuple(paths))


@given(shapes(), st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 5))
def test_runs_are_what_going_down_finds(shape, ranks, levels):
    found = shape.runs(np.array(ranks), levels)
    for start in range(len(ranks)):
        depth = 0
        while depth < levels and start + depth < len(ranks) and tuple(ranks[start : start + depth + 1]) in shape.paths:
            depth += 1
        assert found[start] == depth
    assert tree_shape_named(str(shape)) == shape


@given(shapes(), st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_a_larger_tree_accepts_no_less(shape, ranks):
    more = TreeShape((*shape.paths, (len(shape.children[0]),)))
    assert (more.runs(np.array(ranks), 9) >= shape.runs(np.array(ranks), 9)).all()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=4), st.integers(1, 7), st.integers(1, 4))
def test_the_grown_tree_is_what_dynamic_programming_finds(weights, nodes, depth):
    """Sequoia's recursion: the best forest of n nodes below a node, over its ranks and the sizes of their subtrees."""
    shares = np.sort(np.array(weights) / max(1.0, sum(weights)))[::-1]

    @cache
    def best(size: int, rank: int, levels: int) -> float:
        """Below one node: ranks from `rank` on, `size` nodes at most."""
        if size == 0 or rank == len(shares) or levels == 0:
            return 0.0
        return max(
            0.0,
            *(shares[rank] * (1 + best(below, 0, levels - 1)) + best(size - 1 - below, rank + 1, levels)
              for below in range(size)),
        )  # fmt: skip

    shape = grown(shares, nodes, depth)
    assert len(shape.paths) <= nodes and shape.depth <= depth
    assert expected_accepted(shape, shares) == pytest.approx(best(nodes, 0, depth))


def test_rank_shares_are_the_traces():
    made = fabricate(tokens=40)
    shares = rank_shares(made, 3)
    agreed = np.concatenate([made.agreement(prompt)[3] for prompt in made.prompts])
    assert shares[0] == pytest.approx(agreed.mean()) and shares.sum() <= 1


# -- prediction and decoder
@pytest.fixture(scope="module")
def dialled():
    return synthetic("tiny", seed=5, exit_layer=2, dial=0.15)


@pytest.fixture(scope="module")
def run(dialled):
    return trace(dialled, [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], max_new_tokens=24)


def trees_of(exits, names=SHAPES):
    return [TreeDrafts(ExitLayer(exit_layer), tree_shape_named(name)) for exit_layer in exits for name in names]


def hold(loaded, made, exits, names=SHAPES) -> None:
    ways = [Way((tree,), tree.shape.depth) for tree in trees_of(exits, names)]
    found = validate_ways(loaded, made, ways)
    totals = dict.fromkeys(("rounds", "drafted", "accepted"), 0)
    for each in found.ways:
        assert each.tokens_equal and (each.rounds_equal or each.near_ties) and not each.unexplained, each.way.label
        assert each.measured == each.predicted or each.near_ties
        totals = {name: count + each.measured[name] for name, count in totals.items()}
    print(f"{loaded.name}: {len(ways)} trees ({len(names)} shapes x exits {exits}) equal in every round: {totals}")
    assert totals["accepted"] > 0


def test_trees_are_decoded_as_predicted(dialled, run):
    hold(dialled, run, (1, 2, 4))
    chain = replay(run, Way((TreeDrafts(ExitLayer(2), tree_shape_named("1x1x1")),), 3)).counts()
    assert chain == replay(run, Way((ExitLayer(2),), 3)).counts()  # a chain is the simplest tree
    wide = replay(run, Way((TreeDrafts(ExitLayer(2), tree_shape_named("8x1x1")),), 3)).counts()
    assert wide["rounds"] < chain["rounds"]


def test_in_a_batch_rows_end_and_budgets_differ(dialled, run):
    """Rows of other lengths, positions and ends: each is decoded as alone, and as the model decodes."""
    prompts = [run.prompt_ids(prompt).tolist() for prompt in run.prompts] + [[9] * 11]
    for tree in trees_of((2,)):
        for budget in (1, 2, 3, 17):
            decoder = Speculative(dialled, tree, 4)
            together = decoder.decode(prompts, max_new_tokens=budget)
            alone = Autoregressive(dialled).decode(prompts, max_new_tokens=budget)
            assert [each.tokens for each in together] == [each.tokens for each in alone]
            for index, ids in enumerate(prompts):
                assert decoder.decode([ids], max_new_tokens=budget, indices=[index])[0] == together[index]
            assert all(each.drafted[-1:] != [] or budget == 1 for each in together)


@pytest.mark.second
def test_windows_and_odd_families_see_what_they_should():
    """Past their windows, with several kinds of layers, scaled logits: the texts are the models' own."""
    from models.test_families import ODD, PROMPTS, small

    rounds = 0
    for name in ("gemma3_text", "qwen3", "phi3", "cohere2", "olmo2"):
        assert name in ODD
        loaded = small(name)
        made = trace(loaded, PROMPTS, max_new_tokens=20)
        ways = [Way((tree,), tree.shape.depth) for tree in trees_of((2, 4), SHAPES[1:])]
        found = validate_ways(loaded, made, ways)
        for each in found.ways:
            assert each.tokens_equal and each.rounds_equal and each.measured == each.predicted, (name, each.way.label)
            rounds += each.measured["rounds"]
    print(f"5 families x 2 exits x 2 shapes: {rounds} rounds equal")


def test_a_tree_mask_that_lets_siblings_see_each_other_is_caught(dialled, run, monkeypatch):
    """Without the mask the text is no longer the model's."""
    everyone = property(lambda self: np.ones((1 + len(self.paths),) * 2, dtype=bool))
    monkeypatch.setattr(TreeShape, "ancestors", everyone)
    found = validate_ways(dialled, run, [Way((trees_of((2,))[1],), 4)])
    assert not found.ways[0].tokens_equal and found.ways[0].unexplained


def test_keys_that_are_not_moved_are_caught(dialled, run, monkeypatch):
    from probekit.decoding.caches import PositionCache

    monkeypatch.setattr(PositionCache, "gather", lambda *arguments: None)
    found = validate_ways(dialled, run, [Way((trees_of((4,))[1],), 4)])
    assert not found.ways[0].tokens_equal


def test_trees_through_exit_heads(dialled, run):
    texts = [torch.tensor([run.prompt_ids(0).tolist() + run.outputs(0).tolist()])]
    made = trace(dialled, [[1, 2, 3], [4, 5]], max_new_tokens=24, exit_heads=fit_heads(dialled.anatomy, texts))
    from probekit.drafting.drafters import traced_drafters

    [exit_layer] = traced_drafters(made, [2])
    tree = TreeDrafts(exit_layer, tree_shape_named("3x2"))
    [found] = validate_ways(dialled, made, [Way((tree,), 2)]).ways
    assert found.rounds_equal and found.tokens_equal and found.measured == found.predicted
    assert tree.key.exit_heads == made.manifest.heads_name


def test_trees_take_turns_with_chains_and_copies(dialled, run):
    drafters = (ExitLayer(3), trees_of((2,))[1], PromptLookup(2))
    plans = {prompt: np.stack([np.arange(24) % 4 - 1, np.arange(24) % 3 + 2]) for prompt in run.prompts}
    [found] = validate_ways(dialled, run, [Way(drafters, 4, Planned(plans))]).ways
    assert found.rounds_equal and found.tokens_equal and found.measured == found.predicted


def test_predict_and_validate_take_trees(dialled, run):
    tree = trees_of((2,))[1]
    table = predict(run, draft_lengths=[1, 2, 4], drafters=[tree, ExitLayer(2)], with_rounds=True)
    for length in (1, 2, 4):
        expected = replay(run, Way((tree,), length)).counts()
        assert table.cell(tree.key, length).counts() == expected
        own = [row for row in table.rounds if row.key == tree.key and row.draft_length == length]
        assert sum(sum(row.drafted) for row in own) == expected["drafted"]
    costs = roofline_costs(dialled, longest_draft=16)
    found = validate(dialled, run, drafters=[tree], draft_lengths=[2, 4], costs=costs)
    assert found.holds
    assert all(each.rounds_equal and each.tokens_equal and each.measured == each.predicted for each in found.cells)
    assert found.cells[0].exit_layer == 2 and found.cells[0].drafter == "tree:2x2x1x1"


def test_what_a_tree_costs(dialled):
    """By hand where a pass is bytes, whatever its rows, and where it is products."""
    L, shape = dialled.depth, tree_shape_named("2/1/0/2/0/0")
    narrow = roofline_costs(dialled, bandwidth=1e9, flops=1e15)
    expected = 4 * narrow.early_s[2] + 3 * narrow.head_s + narrow.verify_s[2, 6]
    assert narrow.tree_seconds(2, shape, 3) == pytest.approx(expected)
    wide = roofline_costs(dialled, bandwidth=1e15, flops=1e9)
    rows, heads = 1 + 2 + 1 + 2, 1 + 1 + 1
    expected = rows * wide.early_s[2] + heads * wide.head_s + wide.verify_s[2, 6]
    assert wide.tree_seconds(2, shape, 3) == pytest.approx(expected, rel=1e-6)
    tree = TreeDrafts(ExitLayer(2), shape)
    seconds = wide.rounds_seconds_of(tree, 5)
    assert seconds[0] == pytest.approx(wide.round_seconds(2, 0)) and seconds[3] == seconds[5] == pytest.approx(expected)
    chain = TreeDrafts(ExitLayer(L - 1), tree_shape_named("1x1"))
    assert wide.rounds_seconds_of(chain, 2) == pytest.approx(wide.rounds_seconds(L - 1, 2))
    with pytest.raises(InputError, match="drafts of up to 32 tokens, not 40"):
        wide.tree_seconds(2, tree_shape_named("40"), 1)


def test_what_a_tree_cannot_do(dialled, run):
    tree = trees_of((2,))[0]
    with pytest.raises(InputError, match="verified greedily only"):
        Speculative(dialled, tree, 2).decode([[1, 2]], max_new_tokens=8, sampling=Sampling(1.0))
    with pytest.raises(InputError, match="predicted along greedy text"):
        predict(fabricate(text="sampled"), drafters=[tree])
    with pytest.raises(InputError, match="no policy stops it"):
        predict(run, drafters=[tree], policy=ConfidenceThreshold(0.5))
    with pytest.raises(InputError, match="no policy stops it"):
        Speculative(dialled, tree, 2, policy=ConfidenceThreshold(0.5)).decode([[1, 2]], max_new_tokens=8)
    with pytest.raises(InputError, match="with the whole head"):
        TreeDrafts(ExitLayer(2, rows=9), tree.shape)
    with pytest.raises(InputError, match="out of range"):
        Speculative(dialled, TreeDrafts(ExitLayer(99), tree.shape), 2)
    assert tree.key.label == "layer 2, tree:3x1" and tree.key.method == "self-speculative"
    assert not tree.key.names(2) and DrafterKey.exit(2).names(2)


def test_a_draft_model_and_trees_cannot_take_turns():
    with pytest.raises(InputError, match="cannot take turns"):
        Way((trees_of((2,))[0], DraftModel("small")), 2, Planned({}))


@pytest.mark.long
@pytest.mark.parametrize("name", ["tales-tied", "tales-untied", "tales-layerskip"])
def test_trees_on_the_bundled_models(name):
    loaded = probekit.load(name)
    hold(loaded, trace(loaded, bundled_prompts("tales")[:4], max_new_tokens=40), (2, 4, 8), ("4", "4x2x1", SHAPES[2]))


@pytest.mark.long
def test_trees_on_smollm2(smollm2):
    made = trace(smollm2, bundled_prompts("general")[:2], max_new_tokens=32)
    hold(smollm2, made, (8, 20, 27), ("4", "4x2x1", SHAPES[2]))


def test_every_pair_of_levels_is_a_prefix():
    """Nodes stand level by level, so that a round that may go less deep drafts a beginning of the tree."""
    for name in SHAPES:
        shape = tree_shape_named(name)
        assert all(one <= other for one, other in itertools.pairwise(shape.depths.tolist()))
