"""Bad input: one clear line on standard error, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from presentation.fabricate_study import fabricate_study

from probekit.cli.app import run


def fails(capsys, arguments, *said: str) -> str:
    """Run a command line that must fail as wrong input; return its one line."""
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    for words in said:
        assert words in lines[0]
    return lines[0]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("abc\ndefg\nhij\n")
    return path


@pytest.fixture
def run_folder(tiny_folder, prompts, tmp_path):
    folder = tmp_path / "run"
    assert run(["trace", str(tiny_folder), "--prompts", str(prompts), "-o", str(folder), "--max-new-tokens", "6",
                "--device", "cpu", "--quiet"]) == 0  # fmt: skip
    return folder


def test_a_model_that_does_not_exist(capsys, tmp_path):
    fails(capsys, ["inspect", tmp_path / "nowhere"], "nowhere")
    fails(capsys, ["inspect", "tales-untid"], "tales-untid", "tales-untied")


def test_a_pickle_only_checkpoint(capsys, tiny_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")
    fails(capsys, ["inspect", folder], "safetensors")


def test_another_family_is_refused_by_name(capsys, tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    fails(capsys, ["inspect", folder], "bert")


def test_no_tokenizer(capsys, tiny_folder, tmp_path):
    folder = tmp_path / "mute"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("token*", "special*"))
    fails(capsys, ["inspect", folder], "tokenizer")


@pytest.mark.parametrize("layer", ["0", "5", "99"])
def test_exit_layers_out_of_range(capsys, run_folder, tiny_folder, layer):
    fails(capsys, ["predict", run_folder, "--exit-layers", layer], layer, "exits 1..4")
    fails(capsys, ["decode", tiny_folder, "abc", "--method", "self-speculative", "--exit-layer", layer,
                   "--draft-length", "2"], layer, "exits 1..4")  # fmt: skip


def test_a_draft_length_of_zero(capsys, run_folder, tiny_folder):
    fails(capsys, ["predict", run_folder, "--draft-lengths", "0"], "draft length")
    fails(capsys, ["decode", tiny_folder, "abc", "--method", "self-speculative", "--exit-layer", "2",
                   "--draft-length", "0"], "draft length")  # fmt: skip


@pytest.mark.parametrize("words", ["two", "", "1,,2", "8-1"])
def test_lists_that_are_no_numbers(capsys, run_folder, words):
    fails(capsys, ["predict", run_folder, "--exit-layers", words], "--exit-layers")


def test_zero_new_tokens(capsys, tiny_folder, prompts, tmp_path):
    fails(capsys, ["trace", tiny_folder, "--prompts", prompts, "-o", tmp_path / "r", "--max-new-tokens", "0"], "0")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b"abc\n\ndef\n", "line 2"),
        ("latin.txt", b"abc\xff\xfe\n", "UTF-8"),
        ("columns.csv", b"text\nabc\n", "prompt"),
        ("keys.jsonl", b'{"text": "abc"}\n', "prompt"),
        ("broken.jsonl", b'{"prompt": "abc"\n', "line 1"),
        ("prompts.xyz", b"abc\n", ".txt"),
    ],
)
def test_prompt_files(capsys, tiny_folder, tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    fails(capsys, ["trace", tiny_folder, "--prompts", path, "-o", tmp_path / "r"], said)
    assert not (tmp_path / "r").exists()


def test_a_prompt_longer_than_the_context(capsys, tiny, tiny_folder, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a" * (tiny.anatomy.context + 10) + "\n")
    fails(capsys, ["trace", tiny_folder, "--prompts", path, "-o", tmp_path / "r"], str(tiny.anatomy.context))
    assert not (tmp_path / "r").exists()


def test_folders_that_are_no_run_and_no_study(capsys, run_folder, tiny_folder, prompts, tmp_path):
    fails(capsys, ["predict", tmp_path / "nowhere"], "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    fails(capsys, ["predict", other], "other")
    fails(capsys, ["report", other], "study")
    fails(capsys, ["study", tiny_folder, "--prompts", prompts, "-o", other], "not a study")
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    manifest = json.loads((run_folder / "manifest.json").read_text())
    (run_folder / "manifest.json").write_text(json.dumps({**manifest, "schema": "probekit/trace/99"}))
    fails(capsys, ["predict", run_folder], "probekit/trace/99")


def test_a_run_of_another_model(capsys, run_folder, tiny_folder):
    manifest = json.loads((run_folder / "manifest.json").read_text())
    manifest["model"]["weights_hash"] = "sha256:0"
    (run_folder / "manifest.json").write_text(json.dumps(manifest))
    fails(capsys, ["validate", run_folder], "model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_cuda_device_that_is_not_there(capsys, tiny_folder):
    fails(capsys, ["inspect", tiny_folder, "--device", "cuda"], "cuda")


def test_an_unknown_dtype_and_option(capsys, tiny_folder):
    fails(capsys, ["inspect", tiny_folder, "--dtype", "float8"], "float8", "float32")
    fails(capsys, ["inspect", tiny_folder, "--nonsense"], "--nonsense")
    fails(capsys, ["decode", tiny_folder, "abc", "--method", "magic"], "magic", "early-exit")
    fails(capsys, ["decode", tiny_folder, "abc", "--temperature", "-1"], "temperature")
    fails(capsys, ["decode", tiny_folder, "abc", "--top-p", "0"], "top-p")
    fails(capsys, ["decode", tiny_folder, "abc", "--stop", ""], "stop")


def test_bad_input_with_json_is_a_json_document(capsys, tmp_path):
    assert run(["predict", str(tmp_path / "nowhere"), "--json"]) == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert set(document) == {"schema", "error", "hint"}
    assert document["schema"] == "probekit/predict/1"
    assert captured.err == ""


def test_validate_refuses_given_text(capsys, tiny_folder, tmp_path):
    path = tmp_path / "given.jsonl"
    path.write_text('{"prompt": "abc", "response": "def"}\n{"prompt": "gh", "response": "ij"}\n')
    folder = tmp_path / "given"
    assert run(["trace", str(tiny_folder), "--prompts", str(path), "-o", str(folder), "--given", "--quiet"]) == 0
    capsys.readouterr()
    fails(capsys, ["validate", folder], "given")


@pytest.mark.parametrize("command", ["predict", "compare", "verify", "probe", "fit-heads"])
def test_a_device_that_no_machine_has(capsys, tmp_path, command):
    words = [command, tmp_path, *(["-o", tmp_path / "heads"] if command == "fit-heads" else []),
             *(["--label", "agrees"] if command == "probe" else [])]  # fmt: skip
    fails(capsys, [*words, "--device", "evil"], "device 'evil' is not known")
    fails(capsys, [*words, "--dtype", "float99"], "dtype 'float99' is not known")


def test_numbers_far_out_of_bounds(capsys, run_folder, tmp_path):
    fails(capsys, ["predict", run_folder, "--drafter", "ngram:99999999999"], "expected 1000 at most")
    exported = ["export", run_folder, "--engine", "vllm", "--exit-layer", "1", "-o", tmp_path / "out", "--draft-length"]
    fails(capsys, [*exported, 2**63 - 1], "expected 1 to 10,000")
    fails(capsys, ["choose", run_folder, "--costs", "roofline", "--context", 10**23], "--context", "expected 1 to")
    fails(capsys, ["choose", run_folder, "--contexts", "1-100000"], "more than 10,000 numbers")
    fails(capsys, ["choose", run_folder, "--contexts", 10**9], "numbers up to 10,000,000 make sense here")
    assert run(["choose", str(run_folder), "--costs", "roofline", "--device", "h100", "--contexts", "16384"]) == 0
    capsys.readouterr()
    fails(capsys, ["fit-heads", run_folder, "-o", tmp_path / "heads", "--ridge", "1e999"], "finite")
    ranked = ["rank", str(run_folder), "--costs", "roofline", "--device", "h100", "--exit-layers", "1", "--json"]
    assert run([*ranked, "--draft-lengths", "10000"]) == 0  # which is 64 here, where costs of 10,000 took minutes
    assert max(way["draft_length"] for way in json.loads(capsys.readouterr().out)["ways"]) == 64


@pytest.mark.parametrize("option", ["--rows", "--contexts"])
def test_a_batch_of_nothing(capsys, run_folder, tmp_path, option):
    for words in (["choose", run_folder], ["costs", "no model", "--engine", "transformers"]):
        fails(capsys, [*words, option, "0,4"], f"{option} is 0; expected 1 or more")


def test_a_study_has_chosen_already(capsys, tmp_path):
    """An option that asks for another choice is not passed over."""
    study = fabricate_study(tmp_path / "study", ("one", "two"), prompts=2, tokens=4, depth=3, draft_lengths=(1,))
    (study / "study.json").write_text("{}")
    fails(capsys, ["choose", study, "--rows", "1,4", "--policy", "confidence:0.6"],
          "a choice with --rows and --policy is of one run", "study/traces/one")  # fmt: skip
    fails(capsys, ["choose", study, "--export", tmp_path / "out"], "Give one of its runs")
    assert run(["choose", str(study)]) == 0


def test_where_costs_go_is_looked_at_before_they_are_measured(capsys, tmp_path):
    words = ["costs", "no-such-model", "--engine", "transformers", "-o"]
    fails(capsys, [*words, tmp_path / "none" / "costs.json"], "--output is", "there is no folder")
    fails(capsys, [*words, tmp_path], "which is no file that can be written")
