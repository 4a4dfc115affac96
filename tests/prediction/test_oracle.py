"""The oracle: against every sequence of options on short texts, and at least the best of everything else."""

from __future__ import annotations

import itertools
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces.fabricate import fabricate

from probekit.drafting.drafters import ExitLayer, Outlook, outlook
from probekit.drafting.policies import FIXED, ConfidenceThreshold, EntropyThreshold
from probekit.drafting.round_policies import NOBODY, DynamicExit, Heuristic, Planned, Table
from probekit.drafting.text_drafters import PromptLookup, SuffixLookup
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.prediction.learning import learn_table
from probekit.prediction.oracle import Options, best_path, options_of
from probekit.prediction.replay import budget_of, replay


def every_path(options: Options, i: int) -> float:
    """The least seconds from i, by trying every sequence of options."""
    N = options.emitted.shape[1]
    if i >= N:
        return 0.0
    return min(
        options.seconds[o, i] + every_path(options, i + int(options.emitted[o, i])) for o in range(len(options.way))
    )


@st.composite
def short_texts(draw):
    """Outlooks of two drafters over texts of up to 12 tokens, and costs."""
    N, longest = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    outlooks = []
    for _ in range(2):
        agrees = np.array(draw(st.lists(st.booleans(), min_size=N, max_size=N)))
        drafted = np.array(draw(st.lists(st.integers(0, longest), min_size=N, max_size=N)), dtype=np.int32)
        run = np.array([list(itertools.takewhile(bool, agrees[i:].tolist())).__len__() for i in range(N)])
        outlooks.append(Outlook(np.minimum(run, drafted).astype(np.int32), drafted))
    cost = st.floats(0.1, 3.0)
    seconds = np.array(
        draw(st.lists(st.lists(cost, min_size=longest + 1, max_size=longest + 1), min_size=2, max_size=2))
    )
    return outlooks, seconds, draw(cost), N + draw(st.integers(0, 3))


@given(short_texts())
@settings(max_examples=60)
def test_it_is_what_trying_everything_finds(text):
    outlooks, seconds, plain_s, budget = text
    options = options_of(outlooks, seconds, plain_s, budget)
    best = best_path(options)
    N = len(best.option)
    if len(options.way) ** N < 20_000:  # paths grow as (1 + 2 K)^N
        assert best.seconds[0] == pytest.approx(every_path(options, 0))
    starts = best.starts(0)
    taken = sum(options.seconds[best.option[i], i] for i in starts)
    assert taken == pytest.approx(best.seconds[0])


def test_twelve_tokens_by_brute_force():
    """Half a million paths and more: one drafter, one draft, twelve tokens."""
    agrees = np.array([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1], dtype=bool)
    run = np.array([list(itertools.takewhile(bool, agrees[i:].tolist())).__len__() for i in range(12)], dtype=np.int32)
    seen = Outlook(run, np.full(12, 2, dtype=np.int32))
    for draft_s in (0.05, 0.3, 0.9):
        seconds = np.array([[1.0, 1.0 + draft_s, 1.0 + 2 * draft_s]])
        options = options_of([seen], seconds, 1.0, 12)
        assert best_path(options).seconds[0] == pytest.approx(every_path(options, 0))


def test_by_hand():
    """Drafts of one token take 1.5 s for a round, and are right at 0, 1 and 3 of four tokens: it pays at 1 alone."""
    seen = Outlook(np.array([2, 1, 0, 1], dtype=np.int32), np.full(4, 1, dtype=np.int32))
    best = best_path(options_of([seen], np.array([[1.0, 1.5]]), 1.0, 9))
    assert best.seconds.tolist() == [3.5, 2.5, 2.0, 1.0, 0.0]
    assert best.plan.tolist() == [[NOBODY, 0, NOBODY, NOBODY], [0, 1, 0, 0]]
    assert best.starts(0) == [0, 1, 3]


def test_impossible_options_are_refused():
    with pytest.raises(InputError, match="emits one token at least"):
        best_path(Options(np.array([0]), np.array([1]), np.array([[1, 2]]), np.ones((1, 2))))


def ways_of(made, longest: int, seconds, plain_s) -> list[Way]:
    exits = tuple(ExitLayer(exit_layer) for exit_layer in (1, 3, 5))
    drafters = (*exits, PromptLookup(2), SuffixLookup())
    alone = [FIXED, Heuristic(2), ConfidenceThreshold(0.5), EntropyThreshold(2.0)]
    ways = [Way((each,), length, policy) for each in exits for length in (1, longest) for policy in alone]
    ways += [Way((each,), length) for each in drafters[3:] for length in {1, longest}]
    ways += [Way(exits, longest, DynamicExit(6))]
    ways += [Way(exits, longest, learn_table(made, exits, seconds[:3], plain_s, 2))]
    return ways


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.01, 1.5))
@settings(max_examples=8)
def test_nothing_beats_it_on_any_text(seed, longest, draft_s):
    made = fabricate(seed=seed, vocabulary=6, tokens=24, prompts=2)
    drafters = (*(ExitLayer(exit_layer) for exit_layer in (1, 3, 5)), PromptLookup(2), SuffixLookup())
    drafts = np.arange(longest + 1)
    seconds = np.stack([1 + draft_s * price * drafts for price in (0.2, 0.5, 0.9, 0.05, 0.05)])
    plans, best = {}, []
    for prompt in made.prompts:
        seen = [outlook(each, made, prompt, longest) for each in drafters]
        path = best_path(options_of(seen, seconds, 1.0, budget_of(made, prompt)))
        plans[prompt] = path.plan
        best.append(path.seconds[1] if len(path.seconds) > 1 else 0.0)
    oracle = Way(drafters, longest, Planned(plans))
    played = replay(made, oracle).seconds_of_prompt(seconds, 1.0)
    assert played == pytest.approx(best)  # the plan, played, takes what the induction says
    keys = {each.key: place for place, each in enumerate(drafters)}
    for way in ways_of(made, longest, seconds, 1.0):
        own = seconds[[keys[key] for key in way.keys]]
        taken = replay(made, way).seconds_of_prompt(own[:, : way.draft_length + 1], 1.0)
        assert (taken >= np.array(best) - 1e-9).all(), way
    alone = np.array([len(made.outputs(prompt)) - 1 for prompt in made.prompts])
    assert (alone >= np.array(best) - 1e-9).all()


def test_a_learned_table_is_no_worse_than_the_best_fixed_option_where_it_was_learned():
    for seed in range(4):
        made = fabricate(seed=seed, tokens=60, agreement=[0.1, 0.2, 0.3, 0.5, 0.7, 0.8])
        exits = tuple(map(ExitLayer, (2, 3, 5)))
        seconds = np.stack([1 + price * np.arange(5) for price in (0.1, 0.3, 0.5)])
        table = learn_table(made, exits, seconds, 1.0, 2)
        learned = replay(made, Way(exits, 4, table)).seconds_of_prompt(seconds, 1.0).sum()
        fixed = [
            replay(made, Way((each,), length)).seconds_of_prompt(seconds[[place], : length + 1], 1.0).sum()
            for place, each in enumerate(exits)
            for length in range(1, 5)
        ]
        assert learned <= min(*fixed, sum(len(made.outputs(prompt)) - 1 for prompt in made.prompts)) + 1e-9


def test_a_table_learns_what_the_past_tells():
    """Half of the text is easy, half is hopeless, and the last token says which: drafting pays in the first only."""
    from probekit.traces.trace import Trace

    made = fabricate(depth=3, prompts=1, tokens=80, vocabulary=5, agreement=[0.5] * 3)
    easy = np.tile(np.repeat([True, False], 10), 4)
    layers = made.layers.copy()
    N = len(made.outputs(0))
    own = (layers["layer"] == 2) & (layers["output"] >= 0) & (layers["lens"] == "final-norm")
    layers.loc[own, "agrees"] = easy[:N]
    text = Trace.from_frames(made.manifest, made.texts, made.tokens, layers)
    seconds = np.array([1 + 0.3 * np.arange(5)])
    table = learn_table(text, (ExitLayer(2),), seconds, 1.0, 0)
    assert table.choices[10][1] >= 3  # all of the last four were right
    assert table.choices[1] == (NOBODY, 0)  # none was
    assert isinstance(table, Table)


@pytest.mark.second
def test_it_costs_the_same_for_every_token():
    """Linear in the text: twenty times the tokens, not four hundred times the work (a wide margin: times vary)."""
    random = np.random.default_rng(0)
    times = []
    for N in (2_000, 40_000):
        outlooks = [
            Outlook(random.integers(0, 9, N).astype(np.int32), np.full(N, 8, dtype=np.int32)) for _ in range(12)
        ]
        outlooks = [Outlook(np.minimum(each.run, N - np.arange(N)), each.drafted) for each in outlooks]
        began = perf_counter()
        best_path(options_of(outlooks, np.ones((12, 9)), 1.0, N))
        times.append(perf_counter() - began)
    print(f"oracle over 12 drafters x 8 lengths: {times[0]:.2f} s for 2,000 tokens, {times[1]:.2f} s for 40,000")
    assert times[1] < 80 * times[0]
