"""Policies that choose for each round: worked by hand, replayed from a trace, and run."""

from __future__ import annotations

import numpy as np
import pytest

import probekit
from probekit.costs.roofline import roofline_costs
from probekit.decoding.decode import decode
from probekit.decoding.speculative import Speculative
from probekit.drafting.drafters import DraftModel, ExitLayer
from probekit.drafting.keys import DrafterKey
from probekit.drafting.policies import ConfidenceThreshold, EntropyThreshold, MarginThreshold, policy_named
from probekit.drafting.round_policies import (
    NOBODY,
    DynamicExit,
    Heuristic,
    Planned,
    RoundChoice,
    Table,
    Verified,
    state_of,
)
from probekit.drafting.text_drafters import PromptLookup
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.models.synthetic import synthetic
from probekit.prediction.predict import predict
from probekit.prediction.replay import replay
from probekit.settings import Sampling
from probekit.tracing.prompts import bundled_prompts
from probekit.tracing.tracer import trace
from probekit.validation.run import validate
from probekit.validation.transformers import transformers_accepted

NONE = np.zeros((0, 1), dtype=bool)


def seen(drafted: int, accepted: int, agrees=NONE) -> Verified:
    return Verified(0, drafted, accepted, accepted + 1, np.asarray(agrees))


# -- by hand
def test_the_heuristic_grows_by_two_and_shrinks_by_one():
    chooser = Heuristic(2).begin(0, [DrafterKey.exit(1)], 5)
    lengths = []
    for accepted in (2, 4, 3, 0, 0, 0, 0, 0, 0, 1):
        lengths.append(chooser.choose().length)
        chooser.observe(seen(lengths[-1], accepted))
    # 2 all accepted -> 4, all -> 6 (at most 5 at a time), then one less after each round with a rejection
    assert lengths == [2, 4, 5, 5, 4, 3, 2, 1, 1, 1]
    assert chooser.choose().length == 3


def test_a_dynamic_exit_takes_what_promises_most_for_a_layer():
    keys = [DrafterKey.exit(2), DrafterKey.exit(6)]
    chooser = DynamicExit(8, decay=0.5).begin(0, keys, 4)
    # alpha 1/2 for both: tokens 1.5, 1.75, .. for 10, 12, .. layers and 14, ..; a step alone is 1 for 8
    assert chooser.choose() == RoundChoice(0, 1)
    chooser.observe(seen(1, 0, [[False], [True]]))
    alpha = np.array([0.5 * 1, 0.5 * 1 + 1]) / (0.5 * 2 + 1)
    worth = {
        (way, k): (alpha[way] ** np.arange(k + 1)).sum() / (k * (2, 6)[way] + 8) for way in (0, 1) for k in range(1, 5)
    }
    best = max(worth, key=worth.get)
    assert worth[best] <= 1 / 8 and chooser.choose() == RoundChoice(NOBODY, 0)
    for _ in range(6):
        chooser.observe(seen(0, 0, [[True], [True]]))
    assert chooser.choose() == RoundChoice(0, 4)  # sure of the cheap exit: as far as it may


def test_a_dynamic_exit_by_seconds():
    keys = [DrafterKey.exit(1), DrafterKey.exit(2)]
    policy = DynamicExit(3, seconds={keys[0]: [1.0, 9.0, 9.0], keys[1]: [1.0, 1.1, 9.0]}, plain_s=1.0)
    assert policy.begin(0, keys, 2).choose() == RoundChoice(1, 1)
    with pytest.raises(InputError, match="among exit layers only"):
        policy.begin(0, [PromptLookup(2).key], 2)


def test_a_table_looks_back_on_four_tokens():
    assert [state_of(past) for past in ([], [True], [False], [True] * 9, [True] * 4 + [False])] == [0, 4, 1, 10, 7]
    chooser = Table(0, {0: (1, 3), 4: (0, 2)}, (NOBODY, 0)).begin(0, [DrafterKey.exit(1)] * 2, 2)
    assert chooser.choose() == RoundChoice(1, 2)  # no more than the draft length
    chooser.observe(seen(1, 0, [[True]]))
    assert chooser.choose() == RoundChoice(0, 2)
    chooser.observe(seen(1, 0, [[False]]))
    assert chooser.choose() == RoundChoice(NOBODY, 0)


def test_a_plan_is_followed_by_output_position():
    chooser = Planned({7: np.array([[0, 1, -1, 0], [1, 2, 0, 9]])}).begin(7, [DrafterKey.exit(1)], 4)
    assert chooser.choose() == RoundChoice(1, 2)
    chooser.observe(seen(2, 1))
    assert chooser.choose() == RoundChoice(0, 4)
    chooser.observe(seen(2, 1))
    assert chooser.choose() == RoundChoice(NOBODY, 0)
    assert Planned({}).begin(3, [], 4).choose() == RoundChoice(NOBODY, 0)


# -- simulation and decoder
POLICIES = {
    "heuristic": Heuristic(3),
    "del": DynamicExit(5),
    "table": Table(0, {0: (0, 2), 1: (NOBODY, 0), 4: (0, 4), 10: (0, 5)}, (0, 1)),
    "confidence": ConfidenceThreshold(0.05),
    "entropy": EntropyThreshold(4.0),
    "margin": MarginThreshold(0.2),
}


@pytest.fixture(scope="module")
def dialled():
    return synthetic("tiny", seed=5, exit_layer=2, dial=0.15)


@pytest.fixture(scope="module")
def run(dialled):
    return trace(dialled, [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], max_new_tokens=24)


def compared(loaded, run, ways) -> dict[str, int]:
    """Decode every prompt by every way, one by one and in a batch, and hold it against the replay."""
    totals = {"rounds": 0, "drafted": 0, "estimated": 0, "off": 0}
    prompts, budget = [run.prompt_ids(prompt).tolist() for prompt in run.prompts], run.manifest.settings.max_new_tokens
    for way in ways:
        expected = replay(run, way)
        decoder = Speculative(loaded, way.drafters, way.draft_length, policy=way.policy)
        for place, rounds in enumerate(expected.rounds):
            (done,) = decoder.decode([prompts[place]], max_new_tokens=budget, indices=[run.prompts[place]])
            assert done.tokens == run.outputs(run.prompts[place]).tolist()
            assert done.accepted == rounds.accepted.tolist(), way
            assert (done.ways or [0] * done.rounds) == rounds.way.tolist()
            if expected.exact:
                assert done.drafted == rounds.drafted.tolist()
            totals["rounds"] += done.rounds
            totals["drafted"] += sum(done.drafted)
            if not expected.exact:
                totals["estimated"] += int(rounds.drafted.sum())
                totals["off"] += abs(sum(done.drafted) - int(rounds.drafted.sum()))
        together = decoder.decode(prompts, max_new_tokens=budget, indices=run.prompts)
        assert [each.accepted for each in together] == [each.accepted.tolist() for each in expected.rounds]
    return totals


def test_every_policy_at_every_exit_is_the_decoders(dialled, run):
    ways = [Way((ExitLayer(exit_layer),), 5, policy) for policy in POLICIES.values() for exit_layer in (2, 3, 4)]
    totals = compared(dialled, run, ways)
    print(f"{len(ways)} ways of {len(POLICIES)} policies x 3 exits: {totals}")
    assert totals["off"] <= 0.1 * totals["estimated"]


def test_drafters_take_turns(dialled, run):
    exits = tuple(map(ExitLayer, (2, 3, 4)))
    mixed = (*exits, PromptLookup(2))
    plans = {
        prompt: np.stack([np.arange(24) % 5 - 1, np.arange(24) % 4 + 1]) for prompt in run.prompts
    }  # every drafter and nobody, whether it is wise or not
    ways = [
        Way(exits, 5, DynamicExit(5)),
        Way(exits, 5, Table(1, {0: (0, 2), 1: (NOBODY, 0), 4: (2, 4), 10: (1, 5)}, (2, 1))),
        Way(mixed, 5, Planned(plans)),
    ]
    totals = compared(dialled, run, ways)
    whose = {way for each in replay(run, ways[2]).rounds for way in each.way.tolist()}
    assert whose == {NOBODY, 0, 1, 2, 3}
    print(totals)


def test_what_policies_watch_is_what_the_trace_says(dialled, run):
    """The agreement that a decoder shows them, token by token, is the trace's."""
    exits, shown = tuple(map(ExitLayer, (1, 2, 4))), {}

    class Spy(DynamicExit):
        def begin(self, prompt, ways, longest):
            inner, at = super().begin(prompt, ways, longest), [1]
            shown[prompt] = {}

            class Watching:
                def choose(self):
                    return RoundChoice(at[0] % 4 - 1, 3)

                def observe(self, seen):
                    for step in range(seen.emitted):
                        shown[prompt][at[0] + step] = seen.agrees[:, step].tolist()
                    at[0] += seen.emitted
                    inner.observe(seen)

            return Watching()

    decoder = Speculative(dialled, exits, 3, policy=Spy(5))
    decoder.decode([run.prompt_ids(prompt).tolist() for prompt in run.prompts], max_new_tokens=24, indices=run.prompts)
    for prompt in run.prompts:
        assert len(shown[prompt]) > 5
        for place, agrees in shown[prompt].items():
            assert agrees == run.agreement(prompt)[[1, 2, 4], place].tolist()


def test_predict_and_validate_take_them_too(dialled, run):
    table = predict(run, [2, 3], [3, 5], policy=Heuristic(2), with_rounds=True)
    assert table.exact
    for row in table.rounds:
        way = Way((ExitLayer(row.exit_layer),), row.draft_length, Heuristic(2))
        rounds = replay(run.select([row.prompt]), way).rounds[0]
        assert (list(row.drafted), list(row.accepted)) == (rounds.drafted.tolist(), rounds.accepted.tolist())
    found = validate(dialled, run, [(2, 5), (3, 5)], policy=Heuristic(2), costs=roofline_costs(dialled))
    assert found.holds
    assert all(cell.rounds_equal and cell.tokens_equal and cell.measured == cell.predicted for cell in found.cells)
    assert table.cell(2, 5).counts() == found.cells[0].measured
    decoded = decode(
        dialled, [1, 2, 3], method="self-speculative", exit_layer=2, draft_length=5, policy=policy_named("heuristic:2"),
        max_new_tokens=24,
    )  # fmt: skip
    assert (
        decoded.accepted == replay(run.select([0]), Way((ExitLayer(2),), 5, Heuristic(2))).rounds[0].accepted.tolist()
    )


def test_the_heuristic_is_transformers_own():
    """Without a greatest length: K as long as the budget."""
    loaded = synthetic("tiny", seed=5, exit_layer=2, dial=0.15)
    made = trace(loaded, [[1, 2, 3], [4, 5], [6]], max_new_tokens=24)
    for prompt in made.prompts:
        for first in (1, 4):
            rounds = replay(made.select([prompt]), Way((ExitLayer(2),), 24, Heuristic(first)), "draft").rounds[0]
            theirs = transformers_accepted(loaded, made.prompt_ids(prompt).tolist(), 2, first, 24, "heuristic")
            assert theirs.tokens == made.outputs(prompt).tolist()
            if made.ended(prompt) == "budget":
                assert theirs.drafted == rounds.drafted.tolist()
            assert theirs.accepted == rounds.accepted.tolist()


def test_sampled_texts_by_turns_are_repeatable(tiny_chain):
    """Lossless sampling of each drafter is in decoding/test_lossless.py."""
    plan = Planned({0: np.array([[0, 2, 1, -1] * 5, [3] * 20])})
    decoder = Speculative(tiny_chain, [ExitLayer(1), ExitLayer(3), PromptLookup(2)], 3, policy=plan)
    texts = [decoder.decode([[0, 1, 2]], max_new_tokens=16, sampling=Sampling(1.0, seed=2))[0] for _ in range(2)]
    assert len(texts[0].tokens) == 16 and len(set(texts[0].ways)) > 1 and texts[0] == texts[1]


# -- what is refused
def test_who_cannot_take_turns(dialled, tiny_draft, run):
    with pytest.raises(InputError, match="does not say whose turn it is"):
        Way((ExitLayer(1), ExitLayer(2)), 3)
    with pytest.raises(InputError, match="cannot take turns with other drafters"):
        Way((ExitLayer(1), DraftModel("tiny-draft")), 3, DynamicExit(5))
    with pytest.raises(InputError, match="each of them once"):
        Way((ExitLayer(1), ExitLayer(1)), 3, DynamicExit(5))
    with pytest.raises(InputError, match="needs drafters"):
        Way((), 3)
    with pytest.raises(InputError, match="draft length must be"):
        Way((ExitLayer(1),), 0)
    decoder = Speculative(dialled, [ExitLayer(2), PromptLookup(2)], 3, policy=Planned({}))
    with pytest.raises(InputError, match="prompt 1 is empty"):
        decoder.decode([[1], []], max_new_tokens=8)
    with pytest.raises(InputError, match="only the drafts of exit layers can be watched"):
        Speculative(dialled, PromptLookup(2), 3, policy=Table(0, {}, (0, 1))).decode([[1]], max_new_tokens=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heuristic(0), "begins with 0 drafts"),
        (lambda: Heuristic(2.5), "begins with 2.5 drafts"),
        (lambda: DynamicExit(1), "a dynamic exit of 1 layers"),
        (lambda: DynamicExit(12, decay=0), "a decay of 0"),
        (lambda: EntropyThreshold(-1), "entropy threshold"),
        (lambda: MarginThreshold(float("nan")), "margin threshold"),
    ],
)
def test_impossible_policies(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_policies_by_name():
    assert policy_named("heuristic") == Heuristic() and policy_named("heuristic:7") == Heuristic(7)
    assert policy_named("entropy:2.5") == EntropyThreshold(2.5) and policy_named("margin:1") == MarginThreshold(1)
    assert policy_named("del:12") == DynamicExit(12)
    with pytest.raises(InputError, match="there are fixed, confidence, entropy, margin, heuristic, del"):
        policy_named("lede")


def test_only_greedy_text_is_replayed():
    from traces.fabricate import fabricate

    with pytest.raises(InputError, match="replayed along greedy text"):
        replay(fabricate(text="sampled"), Way((ExitLayer(1),), 3))
    with pytest.raises(InputError, match="first round 'first' is not known"):
        replay(fabricate(), Way((ExitLayer(1),), 3), "first")


def test_a_fixed_way_replays_as_it_is_predicted():
    from traces.fabricate import fabricate

    made = fabricate(tokens=40)
    for convention in ("prefill", "draft"):
        table = predict(made, [2, 5], [1, 4], convention)
        for cell in table.cells:
            found = replay(made, Way((cell.drafts,), cell.draft_length), convention)
            assert found.counts() == {name: cell.counts()[name] for name in found.counts()}
            assert (found.of_prompt("accepted") == cell.accepted_of_prompt).all()


# -- the judge's counts, on real models
def judge(loaded, run, exits) -> None:
    policies = {"heuristic": Heuristic(5), "confidence": ConfidenceThreshold(0.5), "entropy": EntropyThreshold(2.0),
                "margin": MarginThreshold(1.0), "del": DynamicExit(loaded.depth),
                "table": Table(0, {0: (0, 2), 1: (NOBODY, 0), 10: (0, 7)}, (0, 2))}  # fmt: skip
    for name, policy in policies.items():
        ways = [Way((ExitLayer(exit_layer),), 8, policy) for exit_layer in exits]
        print(f"{loaded.name}, {name} at exits {exits}: {compared(loaded, run, ways)}")
    turns = tuple(map(ExitLayer, exits))
    print(f"{loaded.name}, exits in turn by del: {compared(loaded, run, [Way(turns, 8, DynamicExit(loaded.depth))])}")


@pytest.mark.long
@pytest.mark.parametrize("name", ["tales-tied", "tales-untied", "tales-layerskip"])
def test_policies_on_the_bundled_models(name):
    loaded = probekit.load(name)
    judge(loaded, trace(loaded, bundled_prompts("tales")[:4], max_new_tokens=40), [2, 4, 8])


@pytest.mark.long
def test_policies_on_smollm2(smollm2):
    judge(smollm2, trace(smollm2, bundled_prompts("general")[:2], max_new_tokens=32), [8, 20, 27])
