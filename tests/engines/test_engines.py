"""What engines are told, and the names under which they report: by their own rules, written out here."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from traces.fabricate import fabricate

from probekit.choice.choose import NO_DRAFTS
from probekit.drafting.drafters import DraftModel, ExitLayer
from probekit.drafting.text_drafters import PromptLookup, SuffixLookup
from probekit.engines.acceptance import AcceptanceProfile, simulated
from probekit.engines.engine import Drafting, Entry, Pretrained, check_drafting, ranges
from probekit.engines.export import Export, profile_of, readme, schedule_document, write_export
from probekit.engines.known import ENGINES, engine_named, register
from probekit.engines.tensorrt_llm import schedule as draft_len_schedule
from probekit.engines.transformers import lines
from probekit.errors import InputError
from probekit.prediction.predict import predict
from probekit.presentation.export_card import write_export_card
from probekit.settings import Sampling

PLACES = Pretrained(path="/models/a b", drafter_path="/out/drafter")
EXIT = Drafting(4, exit_layer=3)
ENTRIES = st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True).flatmap(
    lambda rows: st.tuples(*(st.builds(Entry, st.just(each), st.integers(0, 5)) for each in rows))
)


def profile(**changes) -> AcceptanceProfile:
    """10 rounds of 3 drafts; 7, 5 and 0 accept their first, second and third."""
    made = AcceptanceProfile(
        "toy", "layer 3", 3, "greedy", "vllm", 4, 10, 30, 12, 0.6, 2.1, None, (7, 5, 0), True
    )  # fmt: skip
    return replace(made, **changes)


# ------------------------------------------------------------------------------------------------ acceptance
def test_rates_by_hand():
    found = profile()
    assert found.acceptance_rate == pytest.approx(12 / 30)
    assert found.mean_acceptance_length == pytest.approx(1 + 12 / 10)
    assert found.unconditional == [0.7, 0.5, 0.0]
    assert found.conditional == pytest.approx([0.7, 5 / 7, 0.0])
    assert profile(accepted_by_position=(7, 0, 0), accepted=7).conditional == [0.7, 0.0, None]


def test_what_engines_simulate_is_what_they_would_have_counted():
    """vLLM and llama.cpp: P(the first i + 1 are accepted); AIConfigurator: a product of conditional rates."""
    found = profile()
    told = simulated(found)
    rates = told["vllm"]["synthetic_acceptance_rates"]
    assert rates == [0.7, 0.5, 0.0]
    assert all(one >= other for one, other in itertools.pairwise(rates))
    assert told["llama.cpp"] == ["--spec-synth-rates", "0.7,0.5,0"]
    assert float(told["sglang"]["SGLANG_SIMULATE_ACC_LEN"]) == pytest.approx(found.mean_acceptance_length)
    command = told["aiconfigurator"]
    assert command[:3] == ["--nextn", "3", "--nextn-accept-rates"]
    conditional = [float(rate) for rate in command[3].split(",")]
    assert len(conditional) == 5

    def calc_expectation(nextn: int) -> float:  # as `aiconfigurator.sdk.models` has it
        product = 1.0
        for rate in conditional[:nextn]:
            product *= rate
        return product + (calc_expectation(nextn - 1) if nextn > 1 else 0.0)

    assert 1 + calc_expectation(3) == pytest.approx(found.mean_acceptance_length, abs=1e-4)
    assert "aiconfigurator" not in simulated(profile(draft_length=6, accepted_by_position=(7, 5, 0, 0, 0, 0)))


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_profile_holds_the_counts_of_its_prediction(engine):
    trace, told = fabricate(agreement=[0.6] * 6), ENGINES[engine]
    found = profile_of(trace, told, 3, ExitLayer(2))
    assert found.convention == told.first_round
    budget = trace.manifest.settings.max_new_tokens - 3 if engine == "vllm" else None
    cell = predict(trace, [2], [3], told.first_round, budget=budget).cells[0]
    assert (found.drafted, found.accepted) == (cell.drafted, cell.accepted)
    assert found.rounds == cell.rounds - cell.rounds_by_drafted[:, 0].sum()
    words = told.words(found)
    assert words
    assert all(isinstance(value, (int, float, list)) for value in words.values())
    if engine == "vllm":
        assert words["Mean acceptance length"] == pytest.approx(1 + words["vllm:spec_decode_num_accepted_tokens"]
                                                                / words["vllm:spec_decode_num_drafts"])  # fmt: skip


def test_sampled_text_has_expected_rates_by_our_convention_of_ends():
    found = profile_of(fabricate(text="sampled"), ENGINES["llama.cpp"], 3, ExitLayer(2))
    assert found.convention == "prefill"
    assert 0 < found.acceptance_rate < 1


def test_nothing_drafted_is_no_profile():
    trace = fabricate()
    with pytest.raises(InputError, match="drafts nothing on these texts"):
        profile_of(trace, ENGINES["transformers"], 3, PromptLookup(9, 9))


# ------------------------------------------------------------------------------------------------ schedules
def wanted(entries, batch: int) -> int | None:
    """The length of the largest batch asked about that is no larger; the smallest one's below; None beyond."""
    ordered = sorted(entries, key=lambda each: each.rows)
    if batch > ordered[-1].rows:
        return None
    return ([ordered[0], *(each for each in ordered if each.rows <= batch)][-1]).draft_length


@given(ENTRIES)
def test_ranges_have_no_gaps_and_say_what_was_asked(entries):
    found = ranges(entries)
    assert found[0][0] == 1
    assert found[-1][1] == max(each.rows for each in entries)
    for (_, last, length), (first, _, next_length) in itertools.pairwise(found):
        assert first == last + 1
        assert length != next_length
    for first, last, length in found:
        for batch in range(first, last + 1):
            assert length == wanted(entries, batch)


@given(ENTRIES)
def test_tensorrt_llm_reads_its_schedule_so(entries):
    """`_compute_dynamic_draft_len_mapping`: the first key that is not below the batch; none: 0."""
    plan = draft_len_schedule(EXIT, entries)
    if len(entries) < 2:
        assert plan is None
        return
    for batch in range(1, max(each.rows for each in entries) + 1):
        key = next((each for each in sorted(plan) if each >= batch), None)
        assert (0 if key is None else plan[key]) == wanted(entries, batch)


def test_schedules_in_each_engines_form():
    entries = (Entry(1, 4, 1.5), Entry(4, 2, 1.2), Entry(16, 0, 1.0))
    told = Export(ENGINES["vllm"], EXIT, PLACES, "toy", "a choice", None, None, entries, 128)
    assert schedule_document(told)["setting"] == [[1, 3, 4], [4, 15, 2], [16, 16, 0]]
    assert schedule_document(replace(told, engine=ENGINES["tensorrt-llm"]))["setting"] == {3: 4, 15: 2}
    assert schedule_document(replace(told, engine=ENGINES["sglang"]))["setting"] == {"candidate_steps": [2, 4]}
    for name in ("transformers", "llama.cpp"):
        assert schedule_document(replace(told, engine=ENGINES[name]))["setting"] is None
    assert "| 16 | off | 1.00× |" in readme(told)
    config = ENGINES["vllm"].settings(EXIT, PLACES, (Entry(1, 2), Entry(8, 6)))["speculative_config"]
    assert config["num_speculative_tokens"] == 6


# ------------------------------------------------------------------------------------------------ settings
def options_of(arguments: list[str]) -> dict[str, str]:
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def test_settings_of_an_exit_layer():
    settings = {name: engine.settings(EXIT, PLACES, (Entry(1, 4),)) for name, engine in ENGINES.items()}
    assert settings["transformers"]["generate"] == {"assistant_early_exit": 3}
    assert settings["vllm"]["speculative_config"] == {
        "method": "draft_model", "model": "/out/drafter", "num_speculative_tokens": 4,
    }  # fmt: skip
    assert options_of(settings["llama.cpp"]["arguments"]) == {
        "--spec-type": "draft-simple", "--spec-draft-model": "/out/drafter", "--spec-draft-n-max": "4",
        "--spec-draft-n-min": "0", "--spec-draft-p-min": "0",
    }  # fmt: skip
    assert options_of(settings["sglang"]["arguments"]) == {
        "--speculative-algorithm": "STANDALONE", "--speculative-draft-model-path": "/out/drafter",
        "--speculative-num-steps": "4", "--speculative-eagle-topk": "1", "--speculative-num-draft-tokens": "5",
    }  # fmt: skip
    assert settings["tensorrt-llm"]["speculative_config"] == {
        "decoding_type": "Draft_Target", "max_draft_len": 4, "speculative_model": "/out/drafter",
    }  # fmt: skip


def test_settings_of_sampled_text_ask_for_speculative_sampling():
    """By default vLLM and llama.cpp draft greedily, which accepts otherwise than a trace of sampled text says."""
    drafting = replace(EXIT, sampling=Sampling(0.7, 40, 0.9))
    told = {name: engine.settings(drafting, PLACES, ()) for name, engine in ENGINES.items()}
    assert told["vllm"]["speculative_config"]["draft_sample_method"] == "probabilistic"
    assert told["vllm"]["sampling_params"] == {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    assert told["llama.cpp"]["arguments"][-2:] == ["--spec-draft-sampling", "probabilistic"]
    assert told["llama.cpp"]["sampling"] == {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0}
    assert told["transformers"]["generate"]["do_sample"] is True


def test_settings_of_lookups_and_of_nobody():
    lookups = {
        "transformers": PromptLookup(3), "vllm": PromptLookup(4, 2, "vllm"),
        "llama.cpp": PromptLookup(2, rule="llama.cpp", copied=4),
    }  # fmt: skip
    told = {name: ENGINES[name].settings(Drafting(4, lookup=lookup), PLACES, ()) for name, lookup in lookups.items()}
    assert told["transformers"]["generate"] == {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3}
    assert told["vllm"]["speculative_config"] == {
        "method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2, "num_speculative_tokens": 4,
    }  # fmt: skip
    assert told["llama.cpp"]["arguments"] == [
        "--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "4",
    ]  # fmt: skip
    for engine in ENGINES.values():
        for each in lookups.values():
            if each.rule not in engine.rules:
                with pytest.raises(InputError, match=f"{re.escape(engine.title)} has no prompt lookup by the rule"):
                    check_drafting(engine, Drafting(4, lookup=each))
        nobody = Export(engine, Drafting(), PLACES, "toy", "toy: do not speculate", None, None, (Entry(1, 0),))
        assert "do not speculate" in readme(nobody)
        assert "speculative" not in json.dumps(engine.settings(Drafting(), PLACES, ())).replace(
            "speculative_config", ""
        )


def test_what_a_draft_checkpoint_cannot_hold_is_refused_with_the_reason():
    for name in ("vllm", "llama.cpp", "sglang", "tensorrt-llm"):
        with pytest.raises(
            InputError, match=rf"a draft model of {re.escape(ENGINES[name].title)} cannot hold exit heads"
        ):
            check_drafting(ENGINES[name], replace(EXIT, exit_heads="abc"))
        with pytest.raises(InputError, match="cannot hold a draft head of 256 rows"):
            check_drafting(ENGINES[name], replace(EXIT, draft_rows=256))
    check_drafting(ENGINES["transformers"], replace(EXIT, draft_rows=256))  # it says in words what differs
    with pytest.raises(InputError, match="no engine that is exported to knows it"):
        Drafting.with_drafter(SuffixLookup(), 3, Sampling())
    assert Drafting.with_drafter(DraftModel("small"), 3, Sampling()).drafter == "small"
    with pytest.raises(InputError, match=r"there are transformers, vllm, llama\.cpp, sglang, tensorrt-llm"):
        engine_named("mlx")


# ------------------------------------------------------------------------------------------------ the folder
@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_folder_says_how_to_use_it_and_what_will_be_reported(engine, tmp_path):
    trace, told = fabricate(agreement=[0.7] * 6), ENGINES[engine]
    drafting = Drafting(3, exit_layer=2)
    found = profile_of(trace, told, 3, ExitLayer(2))
    exported = Export(told, drafting, PLACES, "toy", "toy: draft with layer 2", None, found, (Entry(1, 3),))
    made: list[Path] = []

    def drafter(target: Path) -> Path:
        target.mkdir() if told.checkpoint == "safetensors" else target.write_bytes(b"GGUF")
        made.append(target)
        return target

    folder = write_export(exported, tmp_path / "to", drafter if told.checkpoint else None)
    write_export_card(folder, exported, trace.manifest)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md",
        "settings.json",
        "schedule.json",
        "acceptance.json",
        "MODEL_CARD.md",
        "acceptance.png",
    }
    document = json.loads((folder / "acceptance.json").read_text())
    assert document["schema"] == "probekit/acceptance/1"
    assert document["engine"]["name"] == engine
    assert document["unconditional"] == pytest.approx(found.unconditional)
    page = (folder / "README.md").read_text()
    for name in told.words(found):
        assert name in page
    if told.checkpoint is not None:
        assert str(made[0].absolute()) in page
        assert made[0].name == ("drafter.gguf" if told.checkpoint == "gguf" else "drafter")
        assert str(made[0].absolute()) in (folder / "settings.json").read_text()
    for language, code in re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL):
        if language == "bash":
            assert len(shlex.split(code)) > 2
        elif language == "yaml":
            assert yaml.safe_load(code)["speculative_config"]["max_draft_len"] == 3
        else:
            compile(code, "snippet", "exec")
    card = (folder / "MODEL_CARD.md").read_text()
    assert f"| acceptance rate | {found.acceptance_rate:.3f}" in card
    assert "![" in card and "(acceptance.png)" in card
    assert trace.manifest.settings.dtype in card
    write_export(exported, folder, None)  # over itself


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    exported = Export(ENGINES["vllm"], EXIT, PLACES, "toy", "words", None, None, (Entry(1, 4),))
    with pytest.raises(InputError, match="holds other files"):
        write_export(exported, tmp_path)
    with pytest.raises(InputError, match="cannot hold exit heads"):
        write_export(replace(exported, drafting=replace(EXIT, exit_heads="abc")), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert NO_DRAFTS.draft_length == 0


def test_the_readme_names_every_engine_and_its_command():
    told = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = [line for line in told.splitlines() if line.startswith("| ") and "`probekit " in line]
    for name in ENGINES:
        command = "probekit choose RUN --export" if name == "transformers" else f"--engine {name}`"
        assert sum(command in row for row in rows) == 1, name


def test_transformers_settings_are_written_in_one_place():
    """The snippet of a study's next steps and the README of an export."""
    from probekit.presentation.next_steps import next_steps

    entry = {"name": "toy", "choice": {"speculate": True, "exit_layer": 3, "draft_length": 4, "drafter": None,
                                       "few_prompts": False}}  # fmt: skip
    snippet = next_steps(entry, Path("run"))["snippet"]
    assert snippet.splitlines() == lines(EXIT)
    page = readme(Export(ENGINES["transformers"], EXIT, PLACES, "toy", "words", None, None, ()))
    assert all(line in page for line in snippet.splitlines()[:-1])


def test_an_engine_of_ones_own_is_known_from_then_on(monkeypatch):
    monkeypatch.setattr("probekit.engines.known.ENGINES", dict(ENGINES))
    own = replace(ENGINES["vllm"], name="turbo")
    register(own)
    assert engine_named("turbo") is own
    with pytest.raises(InputError, match="there is an engine 'turbo' already"):
        register(own)


def test_another_engines_export_leaves_nothing_behind(tmp_path):
    def export(name: str, drafting: Drafting, maker=None) -> Path:
        told = Export(ENGINES[name], drafting, PLACES, "m", "A sentence.", None, None, (Entry(1, 4),))
        return write_export(told, tmp_path / "out", maker)

    def folder_of(path: Path) -> Path:
        path.mkdir()
        (path / "config.json").write_text("{}")
        return path

    def file_of(path: Path) -> Path:
        path.write_bytes(b"GGUF")
        return path

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    folder = export("vllm", EXIT, folder_of)
    (folder / "mine.txt").write_text("mine")
    assert (export("vllm", EXIT) / "drafter" / "config.json").is_file()  # settings only: the checkpoint stays
    export("llama.cpp", EXIT, file_of)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "SHA256SUMS", "drafter.gguf", "mine.txt", "schedule.json", "settings.json",
    ]  # fmt: skip
    (folder / "drafter.gguf").write_bytes(b"changed")
    (folder / "drafter").symlink_to(tmp_path / "elsewhere")
    export("vllm", Drafting(4, lookup=PromptLookup(3, 2, rule="vllm")))
    assert (folder / "drafter.gguf").read_bytes() == b"changed"  # not ours any more
    assert (tmp_path / "elsewhere" / "config.json").is_file()
