"""What an engine could draft with along a trace: its own prompt lookups beside the exits."""

from __future__ import annotations

import dataclasses
import json

import pytest
from traces.fabricate import fabricate

from probekit.choice.choose import choose
from probekit.costs.engine_profile import EngineProfile, Step
from probekit.drafting.policies import ConfidenceThreshold
from probekit.drafting.text_drafters import PromptLookup
from probekit.engines.engine import Drafting, check_drafting
from probekit.engines.inside import lookups, predict_inside
from probekit.engines.known import ENGINES
from probekit.handover.export import export
from probekit.prediction.predict import predict


def steps(draft_s: float) -> tuple[Step, ...]:
    """A plain step takes 1, a verification of any width 1.1."""
    drafts = [Step("draft", draft_s, exit_layer=exit_layer) for exit_layer in (1, 5)]
    return (Step("autoregressive", 1.0), *drafts, Step("verify", 1.1, tokens=2), Step("verify", 1.1, tokens=9))


def repeats(**how):
    """Text over three words: what came before comes again; layers never agree with it."""
    return fabricate(vocabulary=4, tokens=40, prompts=8, agreement=[0.0] * 6, **how)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_holds_each_of_its_lookups(name):
    engine = ENGINES[name]
    for length in range(1, 9):
        found = lookups(engine, length)
        assert len({each.key for each in found}) == len(found)
        assert bool(found) == bool(engine.rules)
        for lookup in found:
            assert lookup.ngram <= 3
            check_drafting(engine, Drafting(length, lookup=lookup))
            if name == "llama.cpp":
                assert lookup.copied == length  # it is told nothing else of how many


@pytest.mark.parametrize("name", ENGINES)
def test_each_cell_is_that_of_its_drafter_alone(name):
    trace, engine = repeats(), ENGINES[name]
    found = predict_inside(trace, engine, draft_lengths=[1, 4])
    assert found.first_round == engine.first_round
    alone = predict(trace, draft_lengths=[1, 4], first_round=engine.first_round)
    assert [(each.key, each.counts()) for each in found.cells[: len(alone.cells)]] == [
        (each.key, each.counts()) for each in alone.cells
    ]
    more = found.cells[len(alone.cells) :]
    assert len(more) == (4 if name == "llama.cpp" else 6) * bool(engine.rules)
    for cell in more:
        assert isinstance(cell.drafts, PromptLookup)
        own = predict(
            trace, draft_lengths=[cell.draft_length], drafters=[cell.drafts], first_round=engine.first_round
        ).cells[0]
        assert cell.counts() == own.counts()
        assert (cell.rounds_by_drafted == own.rounds_by_drafted).all()


def test_named_exits_and_policies_are_asked_about_alone():
    trace, vllm = repeats(), ENGINES["vllm"]
    assert all(key.is_exit for key in predict_inside(trace, vllm, [2, 3]).keys)
    assert all(key.is_exit for key in predict_inside(trace, vllm, policy=ConfidenceThreshold(0.5)).keys)
    assert not all(key.is_exit for key in predict_inside(trace, vllm, [2, 3], look_up=True).keys)
    assert all(key.is_exit for key in predict_inside(trace, vllm, look_up=False).keys)


def test_sampled_text_has_lookups_too():
    found = predict_inside(repeats(text="sampled"), ENGINES["vllm"], draft_lengths=[2])
    assert [key.label for key in found.keys if not key.is_exit] == ["ngram:1:vllm", "ngram:2:vllm", "ngram:3:vllm"]


@pytest.mark.parametrize("name", ["transformers", "vllm", "llama.cpp"])
def test_the_best_way_of_an_engine_may_be_a_lookup(tmp_path, name):
    trace, engine = repeats(), ENGINES[name]
    prediction = predict_inside(trace, engine)
    choice = choose(prediction, EngineProfile(name, "cpu", "float32", steps(0.9)).costs(trace.depth))
    best = choice.best
    assert isinstance(best.drafts, PromptLookup)
    assert best.drafts.rule == name
    assert choice.exit_layer is None
    assert f"draft with prompt lookup ({best.drafts.key.model}), " in choice.sentence()
    # By hand: each round is a verification, or a plain step where nothing was found.
    cell = next(each for each in prediction.cells if (each.key, each.draft_length) == (best.key, best.draft_length))
    rounds = cell.rounds_by_drafted.sum(axis=0)
    assert best.speedup == pytest.approx(cell.tokens / (rounds[0] + 1.1 * rounds[1:].sum()))
    assert all(each.speedup <= best.speedup for each in choice.ranking)

    drafting = Drafting.of(choice)
    assert drafting == Drafting(best.draft_length, lookup=best.drafts)
    export(trace, tmp_path / "to", name, choice)
    document = json.loads((tmp_path / "to" / "choice.json").read_text())
    assert (document["method"], document["exit_layer"], document["drafter"]) == (
        "speculative", None, best.drafts.key.model,
    )  # fmt: skip
    told = json.dumps(json.loads((tmp_path / "to" / "settings.json").read_text()))
    assert {"transformers": "prompt_lookup_num_tokens", "vllm": "prompt_lookup_max", "llama.cpp": "ngram-simple"}[
        name
    ] in told


def test_an_exit_that_is_cheaper_still_wins():
    trace = fabricate(vocabulary=1000, tokens=40, prompts=8, agreement=[0.9] * 6)
    costs = EngineProfile("vllm", "cpu", "float32", steps(0.05)).costs(trace.depth)
    choice = choose(predict_inside(trace, ENGINES["vllm"]), costs)
    assert choice.best.key.is_exit
    assert Drafting.of(choice).exit_layer == choice.exit_layer
    assert Drafting.of(dataclasses.replace(choice, ranking=choice.ranking[-1:])) == Drafting()
