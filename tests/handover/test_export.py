"""`probekit.export`: what the command writes, from Python; a model in memory; and what is refused."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

import probekit
from probekit.choice.schedule import schedule
from probekit.cli.app import run
from probekit.costs.roofline import roofline_costs
from probekit.drafting.drafters import ExitLayer
from probekit.drafting.text_drafters import SuffixLookup
from probekit.errors import InputError
from probekit.prediction.predict import predict

PROMPTS = ["Once upon a time", "The wolf said to the goat", "There was a king who"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "run"
    probekit.trace(probekit.load("tales-layerskip", device="cpu"), PROMPTS, place, max_new_tokens=12)
    return place


def written(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def costs_at(trace):
    return lambda rows, context: roofline_costs(
        trace, context=context, device="h100", dtype="bfloat16", longest_draft=8, rows=rows
    )


@pytest.mark.parametrize(
    ("engine", "named", "given"),
    [
        ("transformers", ["--exit-layer", "3"], {"drafter": 3}),
        ("sglang", ["--exit-layer", "3", "--settings-only"], {"drafter": 3, "checkpoint": False}),
        ("vllm", ["--drafter", "exit", "--exit-layer", "2"], {"drafter": ExitLayer(2)}),
    ],
)
def test_python_writes_what_the_command_writes(folder, tmp_path, engine, named, given):
    to = tmp_path / "exported"  # one place: its path stands in the settings
    assert run(["export", str(folder), "-o", str(to), "--engine", engine, "--draft-length", "2", *named]) == 0
    expected = written(to)
    told = probekit.export(probekit.Trace.open(folder), to, engine, draft_length=2, **given)
    assert written(to) == expected
    assert told.drafting.draft_length == 2
    assert probekit.verify(to).whole


def test_a_choice_with_its_schedule(folder, tmp_path):
    trace = probekit.Trace.open(folder)
    prediction = predict(trace, draft_lengths=range(1, 9))
    choice = probekit.choose(prediction, costs_at(trace)(1, 1024))
    assert choice.best.drafts is not None
    mine = predict(trace, draft_lengths=range(1, 9), drafters=[choice.best.drafts])
    plan = schedule(mine, costs_at(trace), [1, 8], [1024])
    probekit.export(trace, tmp_path / "a", "tensorrt-llm", choice, schedule=plan, checkpoint=False)
    rows = ["export", str(folder), "--costs", "roofline", "--device", "h100", "--rows", "1,8", "--settings-only"]
    assert run([*rows, "-o", str(tmp_path / "b"), "--engine", "tensorrt-llm"]) == 0
    assert written(tmp_path / "a") == written(tmp_path / "b")
    with pytest.raises(InputError, match="the schedule is of tales-layerskip, drafts from layer"):
        probekit.export(trace, tmp_path / "c", "tensorrt-llm", drafter=11, draft_length=1, schedule=plan)
    assert not (tmp_path / "c").exists()


def test_nobody_drafts(folder, tmp_path):
    told = probekit.export(probekit.Trace.open(folder), tmp_path / "to", "vllm", draft_length=0)
    assert told.sentence == "tales-layerskip: decode without drafts."
    assert not (tmp_path / "to" / "drafter").exists()
    assert "without an assistant" in (tmp_path / "to" / "README.md").read_text()


def test_a_model_in_memory_is_cut_from_memory(tiny, tmp_path):
    loaded = probekit.wrap(tiny.model, tiny.tokenizer, name="mine")
    trace = probekit.trace(loaded, ["a b", "b c d"], max_new_tokens=6)
    with pytest.raises(InputError, match="a model that was in memory"):
        probekit.export(trace, tmp_path / "no", "vllm", drafter=1, draft_length=2)
    probekit.export(trace, tmp_path / "to", "vllm", drafter=1, draft_length=2, model=loaded)
    drafter = AutoModelForCausalLM.from_pretrained(tmp_path / "to" / "drafter")
    assert drafter.config.num_hidden_layers == 1
    assert json.loads((tmp_path / "to" / "settings.json").read_text())["speculative_config"]["model"].endswith(
        "drafter"
    )
    other = probekit.load("tales-draft", device="cpu")
    with pytest.raises(InputError, match="holds other weights than the traced"):
        probekit.export(trace, tmp_path / "other", "vllm", drafter=1, draft_length=2, model=other)


def test_what_is_refused(folder, tmp_path):
    trace, to = probekit.Trace.open(folder), tmp_path / "to"
    for given in ({}, {"drafter": 3}, {"draft_length": 2}, {"drafter": 3, "draft_length": 0, "choice": None}):
        with pytest.raises(InputError):
            probekit.export(trace, to, "vllm", **given)
    choice = probekit.choose(predict(trace, draft_lengths=[1, 2]), costs_at(trace)(1, 1024))
    with pytest.raises(InputError, match="of a choice, or of a drafter"):
        probekit.export(trace, to, "vllm", choice, drafter=3, draft_length=2)
    with pytest.raises(InputError, match="there is no export to 'mlx'"):
        probekit.export(trace, to, "mlx", choice)
    with pytest.raises(InputError, match="12"):
        probekit.export(trace, to, "vllm", drafter=12, draft_length=2)
    with pytest.raises(InputError, match="no engine that is exported to knows it"):
        probekit.export(trace, to, "vllm", drafter=SuffixLookup(), draft_length=2)
    with pytest.raises(InputError, match=r"gguf is a file for llama\.cpp"):
        probekit.export(trace, to, "vllm", choice, gguf="x.gguf")
    other = probekit.trace(probekit.load("tales-untied", device="cpu"), PROMPTS[:1], max_new_tokens=4)
    with pytest.raises(InputError, match="the choice is of tales-layerskip, the trace of tales-untied"):
        probekit.export(other, to, "vllm", choice)
    assert not to.exists()
