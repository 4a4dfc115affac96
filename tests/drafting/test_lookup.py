"""Drafts copied from the text: the indices against a search by hand, the rounds against decoders and transformers."""

from __future__ import annotations

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
from probekit.drafting.drafters import ExitLayer, outlook
from probekit.drafting.lookup import NgramIndex, SuffixIndex
from probekit.drafting.policies import ConfidenceThreshold
from probekit.drafting.text_drafters import PromptLookup, SuffixLookup, common_beginning, lookup_named
from probekit.errors import InputError
from probekit.prediction.predict import predict
from probekit.prediction.rounds import expected_rounds, rounds_of
from probekit.settings import Sampling
from probekit.tracing.prompts import bundled_prompts
from probekit.tracing.tracer import trace
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted, transformers_lookup

LOOKUPS = [PromptLookup(2), PromptLookup(3), PromptLookup(3, 2, "vllm"), SuffixLookup(), SuffixLookup(2)]


def found_by_hand(text: list[int], longest: int, least: int, most: int, ends: set[int]) -> list[int]:
    """The rule as it is written: sizes from the longest down, places from the left, cut before the first end."""
    for size in range(min(longest, len(text) - 1), least - 1, -1):
        for start in range(len(text) - size):
            if text[start : start + size] == text[-size:]:
                drafts = text[start + size : start + size + most]
                return next((drafts[:at] for at, token in enumerate(drafts) if token in ends), drafts)
    return []


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(TEXTS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.sampled_from([set(), {0}, {1, 2}]))
def test_ngrams_are_found_where_a_search_finds_them(text, longest, least, most, ends):
    index = NgramIndex(max(longest, least), least, frozenset(ends))
    for place, token in enumerate(text):
        index.read([token])
        assert index.drafts(most) == found_by_hand(text[: place + 1], max(longest, least), least, most, ends)


@given(TEXTS, st.integers(1, 3), st.integers(1, 6), st.sampled_from([set(), {0}]))
def test_the_automaton_finds_the_longest_ending(text, least, most, ends):
    index = SuffixIndex(least, frozenset(ends))
    for place, token in enumerate(text):
        index.read([token])
        assert index.drafts(most) == found_by_hand(text[: place + 1], len(text), least, most, ends)


@given(TEXTS, st.integers(1, 3), st.integers(1, 6), st.booleans())
def test_transformers_own_generator_drafts_the_same(text, ngram, most, ends):
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    eos = [0] if ends else []
    theirs = PromptLookupCandidateGenerator(torch.tensor(eos) if ends else None, most, ngram, max_length=1000)
    found, _ = theirs.get_candidates(torch.tensor([text]))
    index = PromptLookup(ngram).index(eos)
    index.read(text)
    assert index.drafts(most) == found[0, len(text) :].tolist()


def test_vllm_example():
    """Of the docstring of vLLM's NgramProposer.propose: the last two tokens match, three tokens follow."""
    index = PromptLookup(3, 2, "vllm").index([4])
    index.read([1, 2, 3, 4, 2, 3])
    assert index.drafts(4) == [4, 2, 3]  # nor does an end-of-sequence token cut them
    assert PromptLookup(3, 3, "vllm").index([]).drafts(4) == []


def ngram_simple(text: list[int], n: int, m: int) -> list[int]:
    """`common_ngram_simple_draft` of llama.cpp, line by line; its `tokens` lack the last token, `sampled`."""
    tokens, sampled = text[:-1], text[-1]
    if len(tokens) <= n + m + 1:
        return []
    pattern = [*tokens[len(tokens) - n + 1 :], sampled]
    for place in range(len(tokens) - n - 1, 0, -1):
        if tokens[place : place + n] == pattern:
            copied = min(m, len(tokens) - (place + n))
            return [] if copied < n else tokens[place + n : place + n + copied]
    return []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 4), st.integers(1, 8))
def test_the_latest_place_is_llama_cpps(text, size, more, most):
    index, copied = PromptLookup(size, rule="llama.cpp", copied=size + more).index(()), size + more
    for place in range(len(text)):
        index.read(text[place : place + 1])
        assert index.drafts(most) == ngram_simple(text[: place + 1], size, copied)[:most]


def test_an_index_costs_the_same_for_each_token():
    """Ten times the text, ten times the states: a suffix automaton has fewer than two states a token."""
    random = np.random.default_rng(0)
    sizes = []
    for tokens in (1_000, 10_000):
        index = SuffixIndex(1, frozenset())
        index.read(random.integers(0, 5, tokens).tolist())
        sizes.append(len(index._link))
        assert sizes[-1] < 2 * tokens + 1
    assert 8 < sizes[1] / sizes[0] < 12


@pytest.mark.parametrize("lookup", LOOKUPS, ids=lambda each: each.key.model)
def test_an_outlook_is_what_a_reader_of_the_text_says(lookup):
    made = fabricate(vocabulary=6, tokens=40)
    for prompt in made.prompts:
        seen = outlook(lookup, made, prompt, 4)
        text, context = (
            [*made.prompt_ids(prompt).tolist(), *made.outputs(prompt).tolist()],
            len(made.prompt_ids(prompt)),
        )
        for place in range(len(seen.run)):
            index = lookup.index([0])
            index.read(text[: context + place])
            drafts = index.drafts(4)
            assert (seen.drafted[place], seen.run[place]) == (
                len(drafts), common_beginning(drafts, text[context + place :])
            )  # fmt: skip
        assert (lookup.signal(made, prompt) == (seen.run > 0)).all()


TOKENS = 24


@pytest.fixture(scope="module")
def tales_layerskip():
    return probekit.load("tales-layerskip")


@pytest.fixture(scope="module")
def run(tales_layerskip):
    return trace(tales_layerskip, bundled_prompts("tales")[:4], max_new_tokens=TOKENS)


def hold(loaded, run, prompts: int, lookups=LOOKUPS) -> None:
    """Rounds of the decoder, and of transformers' own prompt lookup."""
    budget = run.manifest.settings.max_new_tokens
    some = run.select(run.prompts[:prompts])
    found = validate(loaded, some, drafters=lookups, draft_lengths=[4, 10], costs=roofline_costs(loaded))
    for cell in found.cells:
        assert cell.rounds_equal and cell.tokens_equal and cell.measured == cell.predicted
        assert cell.speedup_predicted > 0
    totals = {name: sum(cell.measured[name] for cell in found.cells) for name in ("rounds", "drafted", "accepted")}
    assert totals["accepted"] > 0
    theirs = 0
    for ngram in (2, 3):
        for length in (4, 10):
            for prompt in some.prompts:
                expected = rounds_of(outlook(PromptLookup(ngram), run, prompt, length), length, budget, "draft")
                peer = transformers_lookup(loaded, run.prompt_ids(prompt).tolist(), ngram, length, budget)
                assert peer.tokens == run.outputs(prompt).tolist()
                assert (peer.drafted, peer.accepted) == (expected.drafted.tolist(), expected.accepted.tolist())
                theirs += len(peer.drafted)
    print(f"{loaded.name}: {len(found.cells)} cells equal, {totals}; {theirs} rounds of transformers' lookup equal")


def test_rounds_are_the_decoders_and_transformers_own(tales_layerskip, run):
    hold(tales_layerskip, run, 2, LOOKUPS[:4])


@pytest.mark.long
@pytest.mark.parametrize("name", ["tales-untied", "tales-tied", "tales-layerskip"])
def test_rounds_on_the_bundled_models(name):
    loaded = probekit.load(name)
    hold(loaded, trace(loaded, max_new_tokens=64), 12)


@pytest.mark.long
def test_rounds_on_smollm2(smollm2):
    hold(smollm2, trace(smollm2, bundled_prompts("general")[:4], max_new_tokens=48), 4)


def test_transformers_leaves_the_model_as_it_was(tiny, unchanged):
    unchanged(tiny.model)
    own = tiny.model.generation_config
    transformers_lookup(tiny, [1, 2, 1, 2], 2, 3, 8)
    transformers_accepted(tiny, [1, 2, 1, 2], 2, 3, 8, "heuristic")
    assert tiny.model.generation_config is own


def test_a_batch_decodes_each_row_as_alone_and_sampling_is_what_the_text_says(tiny_chain):
    """Four tokens: something is always found. Given a sampled text, a copied draft is accepted or not, for certain."""
    prompts = [[0, 1, 0, 1, 2], [3], [2, 2, 2], [1, 0, 3, 1, 0]]
    for sampling in (Sampling(), Sampling(1.0, seed=3), Sampling(0.8, top_k=3, top_p=0.9, seed=4)):
        for lookup in LOOKUPS:
            decoder = Speculative(tiny_chain, lookup, 3)
            together = decoder.decode(prompts, max_new_tokens=20, sampling=sampling)
            for index, (done, ids) in enumerate(zip(together, prompts, strict=True)):
                assert decoder.decode([ids], max_new_tokens=20, sampling=sampling, indices=[index])[0] == done
                index_of_text = lookup.index([])
                index_of_text.read(ids)
                drafted, accepted, at = [], [], 1
                index_of_text.read(done.tokens[:1])
                while at < len(done.tokens):
                    drafts = index_of_text.drafts(min(3, 20 - at - 1))
                    drafted.append(len(drafts))
                    accepted.append(common_beginning(drafts, done.tokens[at:]))
                    index_of_text.read(done.tokens[at : at + accepted[-1] + 1])
                    at += accepted[-1] + 1
                assert (done.drafted, done.accepted) == (drafted, accepted)
            if sampling.greedy:
                alone = Autoregressive(tiny_chain).decode(prompts, max_new_tokens=20)
                assert [each.tokens for each in together] == [each.tokens for each in alone]


def test_sampled_text_is_predicted_beside_exits():
    """In the order asked for, whole counts beside expected ones."""
    made = fabricate(text="sampled", vocabulary=4, tokens=40)
    lookup, exits = PromptLookup(2), ExitLayer(3)
    table = predict(made, draft_lengths=[2, 4], drafters=[lookup, exits], with_rounds=True)
    assert [cell.key for cell in table.cells[::2]] == [lookup.key, exits.key]
    alone = predict(made, draft_lengths=[2, 4], drafters=[exits])
    for name in ("rounds", "drafted", "accepted"):  # numpy adds up in another order beside other drafters
        assert getattr(table.cell(3, 4), name) == pytest.approx(getattr(alone.cell(3, 4), name))
    cell = table.cell(lookup.key, 4)
    assert cell.expected_acceptance is None
    for place, prompt in enumerate(made.prompts):
        rounds = rounds_of(outlook(lookup, made, prompt, 4), 4, table.budget)
        assert cell.rounds_by_drafted[place].sum() == len(rounds.start)
        assert cell.accepted_of_prompt[place] == rounds.accepted.sum()
    w = made.accept_probability(0)[3]
    assert expected_rounds(w, 4, table.budget).rounds == pytest.approx(table.cell(3, 4).rounds_of_prompt[0])


def test_lookups_have_no_confidence(tiny, run):
    with pytest.raises(InputError, match="never more or less sure"):
        predict(run, drafters=[PromptLookup(2)], policy=ConfidenceThreshold(0.5))
    with pytest.raises(InputError, match="without a confidence"):
        Speculative(tiny, PromptLookup(2), 3, policy=ConfidenceThreshold(0.5)).decode([[1, 2, 3]], max_new_tokens=8)


@pytest.mark.parametrize(
    ("text", "lookup"),
    [
        ("ngram:2", PromptLookup(2)),
        ("ngram:1-3", PromptLookup(3)),
        ("ngram:2-4:vllm", PromptLookup(4, 2, "vllm")),
        ("ngram:4:vllm", PromptLookup(4, 1, "vllm")),
        ("ngram:2x4:llama.cpp", PromptLookup(2, rule="llama.cpp", copied=4)),
        ("ngram:3:llama.cpp", PromptLookup(3, rule="llama.cpp", copied=3)),
        ("suffix", SuffixLookup()),
        ("suffix:3", SuffixLookup(3)),
        ("exit", None),
    ],
)
def test_lookups_by_name(text, lookup):
    assert lookup_named(text) == lookup
    if lookup is not None:
        assert lookup_named(lookup.key.model) == lookup


@pytest.mark.parametrize("text", ["ngram", "ngram:0", "ngram:4-2", "ngram:2:other", "ngram:1-2-3", "suffix:vllm",
                                  "suffix:1-2", "ngram:x", "suffix:0", "ngram:-1", "ngram:2x1:llama.cpp",
                                  "ngram:2x4", "ngram:1-2:llama.cpp", "suffix:llama.cpp"])  # fmt: skip
def test_names_that_make_no_lookup(text):
    with pytest.raises(InputError):
        lookup_named(text)


def test_what_is_no_lookup_is_refused():
    with pytest.raises(InputError, match="which is no range"):
        PromptLookup(1, 2)
    with pytest.raises(InputError, match="rule 'sglang' is not known: it is one of transformers, vllm"):
        PromptLookup(2, rule="sglang")
