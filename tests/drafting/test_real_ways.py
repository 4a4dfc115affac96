"""Every way of drafting on published models of two families: the replay against the running decoder, round by round.

Each test prints its counts (`pytest -m long -s`).
"""

from __future__ import annotations

import pandas as pd
import pytest

import probekit
from probekit.drafting.drafters import ExitLayer, outlook
from probekit.drafting.imported import import_drafter
from probekit.drafting.policies import ConfidenceThreshold
from probekit.drafting.round_policies import DynamicExit, Heuristic
from probekit.drafting.text_drafters import PromptLookup, SuffixLookup
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import tree_shape_named
from probekit.drafting.ways import Way
from probekit.prediction.rounds import rounds_of
from probekit.tracing.prompts import bundled_prompts
from probekit.validation.transformers import transformers_lookup

pytestmark = pytest.mark.long

TEXTS, TOKENS = 2, 24


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request):
    loaded = request.getfixturevalue(request.param)
    return loaded, probekit.trace(loaded, bundled_prompts("general")[:TEXTS], max_new_tokens=TOKENS)


def ways_of(trace, folder):
    """Lookups, an imported drafter (an exit's argmax, written to a file), trees, and policies at three exits."""
    exits = [trace.depth // 3, trace.depth // 2, trace.depth - 2]
    rows = [
        (prompt, place, int(token))
        for prompt in trace.prompts
        for place, token in enumerate(trace.values(prompt, "argmax")[exits[-1]])
    ]
    path = folder / "elsewhere.parquet"
    pd.DataFrame(rows, columns=["prompt", "output", "token"]).to_parquet(path)
    yield from (Way((PromptLookup(ngram),), length) for ngram in (2, 3) for length in (4, 10))
    yield Way((SuffixLookup(),), 6)
    yield Way((import_drafter(path, trace),), 4)
    for text, exit_layer in zip(("3", "2x1x1", "3x2x1"), exits, strict=True):
        shape = tree_shape_named(text)
        yield Way((TreeDrafts(ExitLayer(exit_layer), shape),), shape.depth)
    for exit_layer in exits:
        yield Way((ExitLayer(exit_layer),), 6, Heuristic(5), "heuristic:5")
        yield Way((ExitLayer(exit_layer),), 6, ConfidenceThreshold(0.5), "confidence:0.5")
    yield Way(tuple(map(ExitLayer, exits)), 6, DynamicExit(trace.depth), "del")


def test_every_way_runs_as_it_was_replayed(real, tmp_path):
    loaded, trace = real
    found = probekit.validate_ways(loaded, trace, list(ways_of(trace, tmp_path)))
    rounds = sum(int(each.measured["rounds"]) for each in found.ways)
    apart = [each.way.label for each in found.ways if not (each.rounds_equal and each.tokens_equal)]
    ties = sum(each.near_ties for each in found.ways)
    print(f"\n{loaded.name}: {len(found.ways)} ways, {rounds} rounds; {ties} texts part at a near-tie ({apart})")
    assert found.holds and ties <= 2


def test_lookups_are_those_of_transformers(real):
    loaded, trace = real
    many = 0
    for ngram in (2, 3):
        for length in (4, 10):
            for prompt in trace.prompts:
                expected = rounds_of(outlook(PromptLookup(ngram), trace, prompt, length), length, TOKENS, "draft")
                peer = transformers_lookup(loaded, trace.prompt_ids(prompt).tolist(), ngram, length, TOKENS)
                assert peer.tokens == trace.outputs(prompt).tolist()
                assert (peer.drafted, peer.accepted) == (expected.drafted.tolist(), expected.accepted.tolist())
                many += len(peer.drafted)
    print(f"\n{loaded.name}: {many} rounds of transformers' prompt lookup equal")
