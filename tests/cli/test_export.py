"""`probekit export` and `choose --export`, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from cli.test_commands import document
from cli.test_front_door import fails
from transformers import AutoModelForCausalLM

from probekit.cli.app import run
from probekit.models.loaded import load
from probekit.models.write_gguf import write_gguf
from probekit.traces.trace import Trace


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(["trace", "tales-layerskip", "-o", str(folder), "--max-new-tokens", "16", "--device", "cpu", "--quiet",
                "--prompts", str(_prompts(tmp_path_factory))]) == 0  # fmt: skip
    return folder


def _prompts(factory):
    path = factory.mktemp("prompts") / "prompts.txt"
    path.write_text("Once upon a time\nThe wolf said to the goat\nThere was a king who\nIn the forest\n")
    return path


def test_an_exit_layer_for_vllm(capsys, traced, tmp_path):
    found = document(capsys, "export", traced, "-o", tmp_path / "to", "--engine", "vllm", "--exit-layer", 3,
                     "--draft-length", 3)  # fmt: skip
    assert found["schema"] == "probekit/export/1"
    assert (found["exit_layer"], found["draft_length"], found["drafter"]) == (3, 3, "layer 3")
    assert {"README.md", "acceptance.json", "drafter/model.safetensors", "schedule.json"} <= set(found["files"])
    settings = json.loads((tmp_path / "to" / "settings.json").read_text())["speculative_config"]
    drafter = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    assert drafter.config.num_hidden_layers == 3
    trace = Trace.open(traced)
    ids = [*trace.prompt_ids(0).tolist(), *trace.outputs(0).tolist()]
    with torch.inference_mode():
        said = drafter(torch.tensor([ids])).logits[0].argmax(-1)[len(trace.prompt_ids(0)) - 1 : -1]
    assert ((said.numpy() == trace.outputs(0)) == trace.agreement(0)[3]).all()


def test_chosen_with_a_schedule(capsys, traced, tmp_path):
    found = document(capsys, "export", traced, "-o", tmp_path / "to", "--engine", "tensorrt-llm", "--costs", "roofline",
                     "--device", "h100", "--rows", "1,8,4096", "--settings-only")  # fmt: skip
    assert not any("drafter" in name for name in found["files"])
    plan = json.loads((tmp_path / "to" / "schedule.json").read_text())
    assert [entry["rows"] for entry in plan["entries"]] == [1, 8, 4096]
    assert plan["entries"][0]["draft_length"] > 0
    assert all(entry["speedup"] >= 1 for entry in plan["entries"])
    chosen = json.loads((tmp_path / "to" / "choice.json").read_text())
    assert chosen["exit_layer"] == found["exit_layer"] == plan["exit_layer"]


def test_for_llama_cpp_a_gguf_of_the_first_layers(capsys, traced, tmp_path):
    pytest.importorskip("gguf", reason="gguf, which writes these files, is not installed")
    document(capsys, "export", traced, "-o", tmp_path / "to", "--engine", "llama.cpp", "--exit-layer", 2,
             "--draft-length", 2)  # fmt: skip
    assert load(tmp_path / "to" / "drafter.gguf", device="cpu", cache=False).depth == 2
    whole = write_gguf(load("tales-layerskip", device="cpu"), tmp_path / "served.gguf")
    document(capsys, "export", traced, "-o", tmp_path / "to", "--engine", "llama.cpp", "--exit-layer", 4,
             "--draft-length", 2, "--gguf", whole)  # fmt: skip
    assert load(tmp_path / "to" / "drafter.gguf", device="cpu", cache=False).depth == 4
    page = (tmp_path / "to" / "README.md").read_text()
    assert "--spec-draft-n-max 2" in page
    assert "draft_n_accepted" in page


def test_a_lookup_needs_no_checkpoint(capsys, traced, tmp_path):
    found = document(capsys, "export", traced, "-o", tmp_path / "to", "--engine", "vllm", "--drafter", "ngram:1-2:vllm",
                     "--draft-length", 4)  # fmt: skip
    assert found["drafter"] == "ngram:2:vllm"
    assert not any(name.startswith("drafter") for name in found["files"])


def test_choose_hands_over_what_it_chose(capsys, traced, tmp_path):
    found = document(capsys, "choose", traced, "--costs", "roofline", "--device", "h100", "--export", tmp_path / "to",
                     "--engine", "vllm", "--rows", "1,64")  # fmt: skip
    settings = json.loads((tmp_path / "to" / "settings.json").read_text())["speculative_config"]
    plan = {last: length for _, last, length in settings.get("num_speculative_tokens_per_batch_size", [])}
    assert settings["num_speculative_tokens"] == max(plan.values()) >= found["draft_length"]
    rates = json.loads((tmp_path / "to" / "acceptance.json").read_text())["simulated"]["vllm"]
    assert len(rates["synthetic_acceptance_rates"]) == settings["num_speculative_tokens"]
    assert settings["num_speculative_tokens_per_batch_size"][0][2] == found["draft_length"]
    assert (tmp_path / "to" / "drafter" / "model.safetensors").is_file()
    assert "MODEL_CARD.md" in {path.name for path in (tmp_path / "to").iterdir()}


def test_an_engine_is_told_its_own_lookup_where_that_is_best(capsys, traced, tmp_path):
    """Costs of vLLM whose drafts take as long as plain steps; another engine has no lookup by its rule."""
    costs = tmp_path / "vllm.csv"
    costs.write_text(
        "engine,step,exit_layer,tokens,seconds\nvllm,autoregressive,,1,0.01\nvllm,draft,1,1,0.01\n"
        "vllm,draft,11,1,0.01\nvllm,verify,,2,0.0101\nvllm,verify,,5,0.0102\n"
    )
    chosen = document(capsys, "choose", traced, "--costs", costs, "--export", tmp_path / "to", "--engine", "vllm")
    assert chosen["drafter"].startswith("ngram:")
    assert chosen["drafter"].endswith(":vllm")
    settings = json.loads((tmp_path / "to" / "settings.json").read_text())["speculative_config"]
    assert settings["method"] == "ngram"
    assert settings["num_speculative_tokens"] == chosen["draft_length"]
    assert document(capsys, "export", traced, "-o", tmp_path / "same", "--engine", "vllm", "--costs", costs)[
        "drafter"
    ] == chosen["drafter"]  # fmt: skip
    other = document(capsys, "export", traced, "-o", tmp_path / "other", "--engine", "llama.cpp", "--costs", costs,
                     "--settings-only")  # fmt: skip
    assert other["drafter"] is None or other["drafter"].startswith("layer ")
    named = document(capsys, "choose", traced, "--costs", costs, "--exit-layers", "2,3")
    assert all(each["drafter"] is None for each in [named, *named["runners_up"]])


@pytest.mark.second  # it times an engine
def test_an_export_times_the_engine_that_it_is_for(capsys, traced, tmp_path, monkeypatch):
    monkeypatch.setattr("probekit.cli.costs.SWEEPS", 1)
    found = document(capsys, "export", traced, "-o", tmp_path / "to", "--engine", "transformers", "--costs",
                     "transformers")  # fmt: skip
    chosen = json.loads((tmp_path / "to" / "choice.json").read_text())
    assert chosen["costs"]["source"] == "transformers"
    assert found["draft_length"] == chosen["draft_length"]


def test_wrong_use_is_one_line(capsys, traced, tmp_path):
    to = ["-o", tmp_path / "to"]
    assert "there is no export to 'mlx'" in fails(capsys, "export", traced, *to, "--engine", "mlx")
    assert "go together" in fails(capsys, "export", traced, *to, "--exit-layer", 3)
    assert "go together" in fails(capsys, "export", traced, *to, "--draft-length", 3)
    assert "out of range" in fails(capsys, "export", traced, *to, "--exit-layer", 12, "--draft-length", 3)
    assert "--gguf is a file for llama.cpp" in fails(
        capsys, "export", traced, *to, "--exit-layer", 3, "--draft-length", 3, "--gguf", "x.gguf"
    )
    assert "there is no file" in fails(capsys, "export", traced, *to, "--engine", "llama.cpp", "--exit-layer", 3,
                                       "--draft-length", 3, "--gguf", "x.gguf")  # fmt: skip
    assert "needs the costs of a batch" in fails(capsys, "export", traced, *to, "--exit-layer", 3, "--draft-length", 3,
                                                 "--rows", "1,4")  # fmt: skip
    assert "is the run of one model" in fails(capsys, "export", traced, *to, "--model", "x")
    assert "no prompt lookup" in fails(capsys, "export", traced, *to, "--engine", "sglang", "--drafter", "ngram:2",
                                       "--draft-length", 3)  # fmt: skip
    assert not (tmp_path / "to").exists()
