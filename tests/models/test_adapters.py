"""Adapters in folders: loaded with their model, named in the run, loaded again, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import probekit
from probekit.cli.app import run as run_line
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import InputError
from probekit.models import adapters
from probekit.models.loaded import describe, load
from probekit.models.weight_files import BUNDLED
from probekit.traces.manifest import read_manifest

peft = pytest.importorskip("peft")

PROMPT = "Once upon a time there was a king"
NEW = 12


def make_adapter(folder: Path, base: str = "tales-draft", *, seed: int = 1, strength: float = 0.2, **settings) -> Path:
    """An adapter with random weights, saved by peft as people have it."""
    torch.manual_seed(seed)
    kind = settings.pop("kind", peft.LoraConfig)
    if kind is peft.LoraConfig:
        settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    model = peft.get_peft_model(load(base).model, kind(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(strength * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def edited(folder: Path, **changes) -> Path:
    """The same adapter with other settings; None takes a key away."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def reweighed(folder: Path, change) -> Path:
    """The same adapter with other weights."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "tone")


@pytest.fixture
def own(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tone"))


@pytest.fixture
def run(capsys):
    """A command line's exit status, what it printed and what it said."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = run_line([str(each) for each in arguments])
        return status, *capsys.readouterr()

    return run


def peft_tokens(folder: Path, base: str = "tales-draft") -> list[int]:
    """What peft's own model generates."""
    plain = load(base)
    model = peft.PeftModel.from_pretrained(plain.model, folder).eval()
    ids = torch.tensor([plain.tokenizer(PROMPT)["input_ids"]])
    return model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()


def tokens_of(loaded) -> list[int]:
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    plain = Autoregressive(loaded).decode([ids], max_new_tokens=NEW)[0].tokens
    assert SelfSpeculative(loaded, 1, 3).decode([ids], max_new_tokens=NEW)[0].tokens == plain
    return plain


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm"]},
        {"kind": peft.IA3Config, "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ],
    ids=["LoRA", "DoRA", "embedding and head", "modules to save", "IA3"],
)
def test_tokens_are_those_of_peft(settings, tmp_path):
    folder = make_adapter(tmp_path / "own", **settings)
    loaded = load("tales-draft", adapter=folder)
    expected = peft_tokens(folder)
    assert tokens_of(loaded) == expected
    assert expected != tokens_of(load("tales-draft"))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_it_is_named_and_hashed(made):
    plain, loaded = load("tales-draft"), load("tales-draft", adapter=made)
    assert loaded.name == "tales-draft+tone"
    assert loaded.weights_hash == f"{plain.weights_hash}+{loaded.adapter.weights_hash}"
    said = describe(loaded)["adapter"]
    assert said == {"reference": str(made), "kind": "LORA", "weights_hash": loaded.adapter.weights_hash}
    assert describe(plain)["adapter"] is None


@pytest.mark.parametrize("base", ["tales-draft", "../base", str(BUNDLED / "tales-draft")])
def test_a_folder_that_holds_only_an_adapter(own, base):
    if base == "../base":
        shutil.copytree(BUNDLED / "tales-draft", own.parent / "base")
    loaded = load(edited(own, base_model_name_or_path=base))
    assert tokens_of(loaded) == peft_tokens(own)
    assert loaded.adapter.reference == str(own)


def test_later_commands_load_it_again_and_refuse_a_changed_one(own, tmp_path, run):
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("Once upon a time\nThe king\n")
    trace = ["trace", "tales-draft", "--adapter", own, "--prompts", prompts, "-o", folder, "--max-new-tokens", "8"]
    assert run(*trace)[0] == 0
    record = read_manifest(folder).model
    assert record.adapter.reference == str(own) and record.adapter.kind == "LORA"
    assert record.reference == "tales-draft"
    assert run("validate", folder, "--draft-lengths", "2")[0] == 0
    assert run("choose", folder, "--costs", "roofline", "--device", "h100", "--export", tmp_path / "choice")[0] == 0
    readme = (tmp_path / "choice" / "README.md").read_text()
    assert f"model.load_adapter({str(own)!r})" in readme or "without an assistant" in readme
    edited(own, lora_alpha=64)
    for command in (["validate", folder], ["choose", folder], ["fit-heads", folder, "-o", tmp_path / "heads"]):
        status, _, said = run(*command)
        assert status == 2
        assert "the adapter" in said and "holds other weights than when this run was traced" in said
    status, _, said = run(*trace, "--resume")
    assert status == 2 and "model" in said


def test_commands_that_load_a_model_take_one(own, tmp_path, run):
    assert json.loads(run("inspect", "tales-draft", "--adapter", own, "--json")[1])["adapter"]["kind"] == "LORA"
    both = [
        json.loads(run("decode", *model, PROMPT, "--max-new-tokens", "8", "--json")[1])["tokens"]
        for model in (["tales-draft", "--adapter", own], [edited(own, base_model_name_or_path="tales-draft")])
    ]
    assert both[0] == both[1] == peft_tokens(own)[:8]
    assert run("lens", "tales-draft", PROMPT, "--adapter", own, "--max-new-tokens", "2")[0] == 0
    status, _, said = run("study", "tales-tied", "tales-draft", "--adapter", own, "-o", tmp_path / "study")
    assert status == 2 and "an adapter belongs to one model" in said


def _as_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def _an_adapter_of_an_adapter(folder):
    shutil.copytree(folder, folder / "inner")
    edited(folder, base_model_name_or_path="inner")


def _cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def _first(tensors):
    return sorted(tensors)[0]


BAD = {
    "wrong shapes": (lambda f: make_adapter(f, "tales-tied"), "cannot be put into this model"),
    "missing tensors": (lambda f: reweighed(f, lambda t: t.pop(_first(t))), "lacks 1 of its tensors"),
    "foreign tensors": (lambda f: reweighed(f, lambda t: t.update(x=torch.ones(2))), "tensors without a place"),
    "NaN": (lambda f: reweighed(f, lambda t: t[_first(t)].fill_(float("nan"))), "not finite"),
    "infinity": (lambda f: reweighed(f, lambda t: t[_first(t)].fill_(float("inf"))), "not finite"),
    "a pickle": (_as_pickle, "can run code when it is read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no weights of an adapter"),
    "a cut file": (_cut, "cannot be read as safetensors"),
    "another task": (lambda f: edited(f, task_type="SEQ_CLS"), "for SEQ_CLS models"),
    "before the text": (lambda f: edited(f, peft_type="PROMPT_TUNING"), "before the text"),
    "an unknown kind": (lambda f: edited(f, peft_type="NONSENSE"), "cannot be put into this model"),
    "no kind": (lambda f: edited(f, peft_type=None), "cannot be put into this model"),
    "a module by its name": (lambda f: edited(f, megatron_config={"a": 1}), "`megatron_config` set"),
    "other layers": (lambda f: edited(f, layer_replication=[[0, 2], [0, 2]]), "`layer_replication` set"),
    "no such part": (lambda f: edited(f, target_modules=["nothing"]), "cannot be put into this model"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json"),
}
BAD_BASE = {
    "a URL": (lambda f: edited(f, base_model_name_or_path="https://example.org/model"), "expected a folder or a"),
    "an adapter of an adapter": (_an_adapter_of_an_adapter, "was made for another adapter"),
    "nothing": (lambda f: edited(f, base_model_name_or_path=None), "does not name the model"),
    "a number": (lambda f: edited(f, base_model_name_or_path=3), "does not name the model"),
    "a folder that is gone": (
        lambda f: edited(f, base_model_name_or_path="/gone/base"),
        "names its model '/gone/base'",
    ),
    "itself": (lambda f: edited(f, base_model_name_or_path="."), "was made for another adapter"),
}


def refused(folder: Path, message: str, *arguments: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(*arguments) if arguments else load("tales-draft", adapter=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", list(BAD))
def test_what_does_not_fit_is_refused_in_a_line(case, own):
    harm, message = BAD[case]
    harm(own)
    refused(own, message)


@pytest.mark.parametrize("case", list(BAD_BASE))
def test_a_base_that_is_none(case, own):
    harm, message = BAD_BASE[case]
    harm(own)
    refused(own, message, own)


def test_other_mistakes(own, made, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no folder has that name"):
        load("tales-draft", adapter=tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no adapter"):
        load("tales-draft", adapter=BUNDLED / "tales-draft")
    with pytest.raises(InputError, match="another one was given with it"):
        load(own, adapter=made)
    both = Path(shutil.copytree(BUNDLED / "tales-draft", tmp_path / "both"))
    shutil.copy(own / "adapter_config.json", both)
    with pytest.raises(InputError, match="holds a model and an adapter"):
        load(both)
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"peft, which is not installed. Install probekit\[adapters\]"):
        load("tales-draft", adapter=own)


def test_a_wrapped_model_with_an_adapter_is_the_loaded_one(made):
    plain = load("tales-draft")
    model = peft.PeftModel.from_pretrained(plain.model, made).eval()
    assert tokens_of(probekit.wrap(model, plain.tokenizer, name="mine")) == tokens_of(load("tales-draft", adapter=made))


def test_an_exported_choice_says_how_to_load_it(made):
    from types import SimpleNamespace

    from probekit.engines.pretrained import pretrained_of

    record = SimpleNamespace(reference="tales-draft", adapter=SimpleNamespace(reference=str(made)))
    plain = SimpleNamespace(reference="tales-draft", adapter=None)
    found = pretrained_of(SimpleNamespace(manifest=SimpleNamespace(model=record, drafter=plain)))
    assert (found.adapter, found.drafter_adapter) == (repr(str(made)), None)
    assert found.model == found.drafter == repr(str(BUNDLED / "tales-draft"))
