"""The choice: speedups by hand and by brute force, the ranking, the words, and what is handed to transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from traces.fabricate import fabricate

from probekit.choice.choose import SCHEMA, choose, decoding_seconds, speedups
from probekit.costs.profile import Costs, DraftModelCosts
from probekit.drafting.drafters import DraftModel, ExitLayer
from probekit.engines.engine import Pretrained
from probekit.engines.export import export_choice
from probekit.engines.transformers import transformers_settings
from probekit.errors import InputError
from probekit.prediction.predict import predict
from probekit.prediction.rounds import rounds_of
from probekit.prediction.table import Cell, Prediction
from probekit.settings import Sampling


def linear_costs(depth: int = 6, longest: int = 8, layer: float = 1.0, head: float = 0.5, drafter: str | None = None):
    """A layer takes `layer`, a head `head`, whatever the rows: so K drafts cost K layers-and-heads more."""
    widths = range(1, longest + 2)
    return Costs(
        source="measured", device="cpu", dtype="float32", context=64, depth=depth,
        autoregressive_s=depth * layer + head,
        early_s={exit_layer: exit_layer * layer for exit_layer in range(1, depth)}, head_s=head,
        verify_s={(e, rows): (depth - e) * layer + head for e in range(1, depth) for rows in widths},
        draft_model=DraftModelCosts(drafter, layer, layer, {rows: depth * layer + head for rows in widths})
        if drafter
        else None,
    )  # fmt: skip


def one_cell(exit_layer=1, rounds=((0, 0, 2), (1, 0, 1)), tokens=(6, 4), drafter="self", copies=1) -> Prediction:
    """Two prompts at K = 2, each `copies` times; rounds with 0, 1, 2 drafts of each."""
    cell = Cell(
        ExitLayer(exit_layer) if drafter == "self" else DraftModel(drafter), draft_length=2,
        tokens_of_prompt=np.array(tokens * copies),
        rounds_by_drafted=np.array(rounds * copies), accepted_at=np.array([[2, 2], [1, 1]] * copies),
        rejections_of_prompt=np.array([0, 0] * copies),
    )  # fmt: skip
    decoding = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    return Prediction("toy", "greedy", decoding, "prefill", 7, True, tuple(range(2 * copies)), (cell,))


def test_a_speedup_by_hand():
    """Exit 1 of 6: 3 rounds of two drafts at 3 x 1 + 2 x .5 + 5.5 = 9.5, one plain step of 6.5; 10 tokens at 6.5."""
    assert choose(one_cell(), linear_costs()).interval is None  # of two prompts nobody can say
    choice = choose(one_cell(copies=2), linear_costs())
    assert choice.speedup == pytest.approx(10 * 6.5 / (3 * 9.5 + 6.5))
    assert (choice.method, choice.exit_layer, choice.draft_length, choice.speculate) == ("self-speculative", 1, 2, True)
    low, high = choice.interval  # four prompts of two kinds: Student's t, on a logarithmic scale
    assert low * high == pytest.approx(choice.speedup**2)
    residuals = np.array([6 * 6.5 - choice.speedup * 2 * 9.5, 4 * 6.5 - choice.speedup * (9.5 + 6.5)] * 2)
    error = np.sqrt(4 / 3 * (residuals**2).sum()) / (2 * (3 * 9.5 + 6.5))
    assert np.log(high / choice.speedup) == pytest.approx(3.1824 * error / choice.speedup, rel=1e-4)
    assert choice.runners_up == ()
    assert speedups(one_cell().cells, linear_costs()) == [pytest.approx(choice.speedup)]


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_fastest_of_all(seed):
    """By brute force: every round of every pair, added up one by one."""
    trace = fabricate(depth=6, prompts=6, tokens=30, seed=seed, agreement=[0.1, 0.7, 0.75, 0.8, 0.85, 0.9])
    costs = linear_costs()
    choice = choose(predict(trace), costs)
    totals = {}
    for exit_layer in range(1, 6):
        for length in range(1, 9):
            rounds = [rounds_of(trace.agreement(prompt)[exit_layer], length, 30) for prompt in trace.prompts]
            totals[exit_layer, length] = sum(costs.round_seconds(exit_layer, k) for r in rounds for k in r.drafted)
    tokens = sum(len(trace.outputs(prompt)) - 1 for prompt in trace.prompts)
    ranked = sorted(totals, key=totals.get)
    assert [row.cell for row in choice.ranking] == ranked
    assert choice.ranking[0].speedup == pytest.approx(tokens * costs.autoregressive_s / totals[ranked[0]])
    assert [row.cell for row in choice.runners_up] == ranked[1:3]
    assert (choice.exit_layer, choice.draft_length) == ranked[0]
    assert len(choice.ranking) == 40
    low, high = choice.interval
    assert low < choice.speedup < high


def test_expected_rounds_are_weighed_too():
    trace = fabricate(text="sampled")
    prediction = predict(trace)
    choice = choose(prediction, linear_costs())
    cell = prediction.cell(*choice.ranking[0].cell)
    assert choice.ranking[0].speedup == pytest.approx(cell.tokens * 6.5 / decoding_seconds(cell, linear_costs()).sum())


def test_do_not_speculate():
    """An exit that never agrees: every draft is wasted."""
    choice = choose(predict(fabricate(agreement=[0.0] * 6)), linear_costs())
    assert not choice.speculate
    assert (choice.method, choice.exit_layer, choice.draft_length, choice.speedup) == ("autoregressive", None, None, 1)
    assert choice.interval is None
    assert len(choice.runners_up) == 2
    assert choice.runners_up[0].cell == (1, 1)  # the least that can be lost
    assert choice.runners_up[0].speedup < 1
    assert "do not speculate" in choice.sentence()
    assert "the first layer (exit layer 1), 1 token at a time" in choice.sentence()
    assert transformers_settings(choice) == {"generate": {}, "generation_config": {}}


def test_three_methods_are_ranked():
    trace = fabricate(drafter=True, agreement=[0.0] * 6)
    choice = choose(predict(trace), linear_costs(drafter="fabricated-drafter"))
    assert [each.method for each in choice.methods] == ["speculative", "autoregressive", "self-speculative"]
    assert (choice.method, choice.exit_layer, choice.drafter) == ("speculative", None, "fabricated-drafter")
    assert choice.draft_length >= 1
    assert "the model fabricated-drafter" in choice.sentence()
    # costs without the draft model cannot weigh it
    alone = choose(predict(trace), linear_costs())
    assert [each.method for each in alone.methods] == ["autoregressive", "self-speculative"]


def test_json_has_the_contract_keys():
    choice = choose(one_cell(), linear_costs())
    document = json.loads(json.dumps(choice.to_json()))
    assert document["schema"] == SCHEMA
    assert {"exit_layer", "draft_length", "speedup", "interval", "speculate", "runners_up", "costs"} <= set(document)
    assert document["speculate"] is True
    assert Costs.from_json(document["costs"]) == linear_costs()
    refused = choose(predict(fabricate(agreement=[0.0] * 6)), linear_costs()).to_json()
    assert (refused["exit_layer"], refused["draft_length"], refused["speculate"]) == (None, None, False)
    assert all({"exit_layer", "draft_length", "speedup", "interval"} <= set(row) for row in refused["runners_up"])


def test_the_sentence_says_what_and_how_sure():
    sentence = choose(one_cell(copies=2), linear_costs()).sentence()
    assert sentence.endswith("From 4 prompts only: take at least 8.")
    assert not choose(one_cell(copies=4), linear_costs()).few_prompts
    assert "From" not in choose(one_cell(copies=4), linear_costs()).sentence()
    assert sentence.startswith("toy: draft with the first layer (exit layer 1), 2 tokens at a time; ")
    assert "1.86x [1.51, 2.29]" in sentence
    assert "on cpu in float32 (measured costs, context 64)" in sentence
    unsure = one_cell(rounds=((0, 0, 2), (0, 0, 3)), copies=2)  # the first prompt loses, the second gains
    assert "may gain nothing" in choose(unsure, linear_costs()).sentence()


def test_given_text_is_called_an_estimate():
    choice = choose(predict(fabricate(text="given", agreement=[0.9] * 6)), linear_costs())
    assert "Estimated from given text" in choice.sentence()


def test_frames_and_html():
    choice = choose(predict(fabricate(drafter=True)), linear_costs(drafter="fabricated-drafter"))
    frame = choice.to_pandas()
    assert frame["speedup"].is_monotonic_decreasing
    assert len(frame) == 6 * 8
    page = choice._repr_html_()
    assert page.count("<td") == len(choice.ranking)
    assert page.count("outline:") == int(choice.speculate)


def test_costs_of_another_model():
    with pytest.raises(InputError, match=r"exits 1\.\.3; the prediction has exit layer 4"):
        choose(predict(fabricate(depth=6)), linear_costs(depth=4))


def test_nothing_to_choose_from():
    with pytest.raises(InputError, match="nothing to choose from"):
        choose(predict(fabricate(tokens=1)), linear_costs())
    with pytest.raises(InputError, match="nothing to choose from"):
        choose(predict(fabricate(), draft_lengths=[20]), linear_costs())


# ------------------------------------------------------------------------------------------------ export
def test_an_exported_choice_can_be_used(tmp_path):
    choice = choose(one_cell(), linear_costs())
    folder = export_choice(choice, tmp_path / "chosen")
    assert json.loads((folder / "choice.json").read_text())["exit_layer"] == 1
    settings = json.loads((folder / "settings.json").read_text())
    assert settings == {
        "generate": {"assistant_early_exit": 1},
        "generation_config": {
            "num_assistant_tokens": 2,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        },
    }
    readme = (folder / "README.md").read_text()
    assert "model.generation_config.num_assistant_tokens = 2" in readme
    assert "assistant_early_exit=1" in readme
    compile(readme.split("```python\n")[1].split("```")[0], "snippet", "exec")
    export_choice(choice, folder)  # again, over itself


def test_export_of_two_models_and_of_none(tmp_path):
    prediction = predict(fabricate(drafter=True, agreement=[0.0] * 6))
    two = choose(prediction, linear_costs(drafter="fabricated-drafter"))
    readme = (export_choice(two, tmp_path / "two") / "README.md").read_text()
    assert "assistant.generation_config.num_assistant_tokens" in readme
    assert "assistant_model=assistant" in readme
    compile(readme.split("```python\n")[1].split("```")[0], "snippet", "exec")
    none = choose(prediction, linear_costs())
    assert "without an assistant" in (export_choice(none, tmp_path / "none") / "README.md").read_text()


def test_an_export_of_sampled_text_samples(tmp_path):
    prediction = replace(one_cell(), text="sampled", decoding={"temperature": 0.7, "top_k": 40, "top_p": 0.9})
    choice = choose(prediction, linear_costs())
    here = Pretrained(repr("/models/a b"))
    readme = (export_choice(choice, tmp_path / "sampled", here) / "README.md").read_text()
    for words in ("do_sample=True, temperature=0.7, top_k=40, top_p=0.9", "from_pretrained('/models/a b')",
                  "in no single one", "speed was not measured"):  # fmt: skip
        assert words in readme
    settings = json.loads((tmp_path / "sampled" / "settings.json").read_text())
    assert settings["generate"] == {
        "assistant_early_exit": 1, "do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9,
    }  # fmt: skip
    compile(readme.split("```python\n")[1].split("```")[0], "snippet", "exec")
    assert choice.sampling == Sampling(0.7, 40, 0.9)


def test_export_keeps_off_other_folders(tmp_path):
    choice = choose(one_cell(), linear_costs())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        export_choice(choice, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        export_choice(choice, tmp_path / "notes.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_a_gain_beyond_the_tokens_of_a_round_is_remarked_on():
    quiet = linear_costs()
    for share, told in ((1.0, False), (5.0, True)):
        choice = choose(one_cell(copies=4), replace(quiet, autoregressive_s=share * quiet.autoregressive_s))
        assert (choice.speedup > choice.best.tokens_per_round) == told
        assert ("time them again on a quiet machine" in choice.sentence()) == told
