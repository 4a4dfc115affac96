"""`load`: every way to name a model, and one clear line for everything that can be wrong with it."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import probekit
from probekit.errors import InputError
from probekit.hooks.sites import open_hooks
from probekit.models import checkpoint, reference, shipped, weight_files
from probekit.models.checkpoint import check_device
from probekit.models.loaded import describe, load
from probekit.models.shipped import bundled_models
from probekit.models.synthetic import END_OF_TEXT, byte_tokenizer, synthetic
from probekit.models.weight_files import hash_files

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(IDS).logits


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever reaches for the hub without being told what it answers fails the test."""

    def reach(*args, **kwargs):
        pytest.fail(f"reached for the network: {args} {kwargs}")

    monkeypatch.setattr(reference, "snapshot_download", reach)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A checkpoint folder of `tiny` that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "damaged"))


def rewrite(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_gives_the_same_model(tiny, tiny_folder):
    loaded = load(tiny_folder)
    assert torch.equal(logits(loaded), logits(tiny))
    assert loaded.tokenizer("hello").input_ids == tiny.tokenizer("hello").input_ids
    assert (loaded.name, loaded.reference, loaded.path) == ("tiny", str(tiny_folder), tiny_folder)
    assert (loaded.depth, loaded.dtype, loaded.device) == (5, torch.float32, torch.device("cpu"))
    assert loaded.revision is None
    assert loaded.eos_ids == frozenset({96})
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert open_hooks(loaded.model) == []


def test_a_tied_folder_stays_tied(tiny_tied, tiny_tied_folder):
    assert "lm_head.weight" not in load_file(tiny_tied_folder / "model.safetensors")
    loaded = load(str(tiny_tied_folder))
    assert loaded.anatomy.tied
    assert torch.equal(logits(loaded), logits(tiny_tied))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_dtype(tiny, tmp_path, dtype, stored):
    model = synthetic("tiny", seed=1, dtype=stored)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    assert str(loaded.dtype).endswith(str(dtype).removeprefix("torch."))
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.allclose(logits(loaded).float(), logits(load(tmp_path)), atol=0.15)


def test_float32_is_the_default_on_the_cpu_and_the_stored_dtype_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert checkpoint.default_dtype(cpu, "BF16") == torch.float32
    assert checkpoint.default_dtype(gpu, "BF16") == torch.bfloat16
    assert checkpoint.default_dtype(gpu, "F16") == torch.float16
    assert checkpoint.default_dtype(gpu, "F32") == torch.float32
    assert checkpoint.default_dtype(gpu, "Q4_K") == torch.bfloat16


def test_shards(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path, max_shard_size="60KB")
    tiny.tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(tiny))
    assert loaded.weights_hash == f"sha256:{hashlib.sha256(b''.join(p.read_bytes() for p in shards)).hexdigest()}"
    shards[1].unlink()
    with pytest.raises(InputError, match=rf"lacks weight files that its index names: {shards[1].name}"):
        load(tmp_path)


def test_end_tokens_come_from_the_generation_config_first(folder):
    rewrite(folder / "generation_config.json", eos_token_id=[5, 96])
    assert load(folder).eos_ids == frozenset({5, 96})
    (folder / "generation_config.json").unlink()
    rewrite(folder / "config.json", eos_token_id=7)
    assert load(folder).eos_ids == frozenset({7})


@pytest.mark.parametrize(
    "told", [{"return_dict": False}, {"output_hidden_states": True, "output_attentions": True, "use_cache": False}]
)
def test_how_outputs_are_handed_over_changes_nothing(folder, tiny, told):
    rewrite(folder / "config.json", **told)
    loaded = load(folder, device="cpu")
    assert (
        probekit.decode(loaded, "abc", max_new_tokens=6).tokens == probekit.decode(tiny, "abc", max_new_tokens=6).tokens
    )
    found, meant = (probekit.trace(each, ["abc"], max_new_tokens=6) for each in (loaded, tiny))
    assert found.layers.equals(meant.layers)
    assert probekit.inspect_prompt(loaded, "abc") is not None


def test_processors_of_the_generation_config_are_named(folder):
    assert load(folder).ignored_processors == ()
    rewrite(folder / "generation_config.json", repetition_penalty=1.1, no_repeat_ngram_size=0, temperature=0.6)
    rewrite(folder / "generation_config.json", do_sample=True, suppress_tokens=[1, 2])
    loaded = load(folder)
    assert loaded.ignored_processors == ("repetition_penalty=1.1", "suppress_tokens=[1, 2]")
    assert describe(loaded)["ignored_processors"] == ["repetition_penalty=1.1", "suppress_tokens=[1, 2]"]


# ------------------------------------------------------------------------------------------------ bundled


def test_a_bundled_name(monkeypatch, tmp_path):
    for room in (reference, shipped):
        monkeypatch.setattr(room, "BUNDLED", tmp_path)
    assert bundled_models() == []
    with pytest.raises(InputError, match=r"'tales-tied' is not in this installation.*Hugging Face id, a folder"):
        load("tales-tied")
    for name, tied in (("tales-draft", False), ("tales-tied", True)):
        model = synthetic("tiny", tied=tied, dtype="bfloat16")
        model.model.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "tales-tied" / "training.json").write_text(json.dumps({"says": "tied", "tokens_seen": 6_000_000}))
    tied, draft = bundled_models()
    assert (tied.name, tied.layers, tied.tied, tied.says) == ("tales-tied", 5, True, "tied")
    assert (draft.name, draft.tied) == ("tales-draft", False)
    assert draft.parameters - tied.parameters == 97 * 36
    assert tied.trained_on.endswith("6.0 million tokens")
    assert {"name", "path", "layers", "tied", "parameters", "trained_on"} <= set(tied.to_json())
    loaded = load("tales-tied")
    assert (loaded.name, loaded.reference, loaded.dtype) == ("tales-tied", "tales-tied", torch.float32)
    assert loaded.anatomy.parameters == tied.parameters


@pytest.mark.parametrize("model", bundled_models(), ids=lambda model: model.name)
def test_what_ships_loads(model):
    loaded = load(model.name)
    parts = loaded.anatomy
    assert (parts.depth, parts.tied, parts.parameters) == (model.layers, model.tied, model.parameters)
    assert len(loaded.eos_ids) == 1
    assert logits(loaded).isfinite().all()


# ------------------------------------------------------------------------------------------------ GGUF


def write_gguf(loaded, path: Path, *, tokenizer=True, leave_out="", extra=None, **keys) -> Path:
    """The model as llama.cpp would write it: float32 tensors, query and key rows in pairs."""
    config, parts = loaded.model.config, loaded.anatomy
    writer = gguf.GGUFWriter(path, keys.get("architecture", "llama"))
    writer.add_block_count(parts.depth)
    writer.add_context_length(parts.context)
    writer.add_embedding_length(parts.width)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(parts.vocabulary)
    if "scaling" in keys:
        writer.add_rope_scaling_type(gguf.RopeScalingType(keys["scaling"]))
    if tokenizer:
        vocabulary = loaded.tokenizer.get_vocab()
        spelling = sorted(vocabulary, key=vocabulary.get)
        spelling[94:96] = "bc", "ab"  # the merges of a GGUF tokenizer: at least two, or they are read as one string
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(spelling)
        writer.add_token_types([3 if token == END_OF_TEXT else 1 for token in spelling])
        writer.add_token_merges(["a b", "b c"])
        writer.add_bos_token_id(parts.vocabulary - 1)  # transformers 5.17 reads no tokenizer without one
        writer.add_add_bos_token(False)
        writer.add_eos_token_id(parts.vocabulary - 1)
        writer.add_pad_token_id(parts.vocabulary - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, parts.depth)
    for name, tensor in loaded.model.state_dict().items():
        if (parts.tied and name == "lm_head.weight") or (leave_out and leave_out in name):
            continue
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.contiguous().numpy())
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    """No test writes into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def spelled():
    """An untied model with a tokenizer, for GGUF."""
    return synthetic("tiny", seed=6, width=40, heads=4, key_value_heads=2, head_dim=10)


def test_gguf_gives_the_same_model(spelled, tmp_path):
    path = write_gguf(spelled, tmp_path / "spelled.Q8.gguf")
    loaded = load(path)
    assert torch.equal(logits(loaded), logits(spelled))
    assert not loaded.anatomy.tied
    assert loaded.tokenizer.decode(loaded.tokenizer("hello world").input_ids) == "hello world"
    assert (loaded.name, loaded.path, loaded.reference) == ("spelled.Q8", path, str(path))
    assert loaded.eos_ids == frozenset({96})
    assert loaded.tokenizer.eos_token == END_OF_TEXT
    assert loaded.weights_hash == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gguf_in_half_precision(spelled, tmp_path, dtype):
    loaded = load(write_gguf(spelled, tmp_path / "spelled.gguf"), dtype=dtype)
    assert {str(p.dtype) for p in loaded.model.parameters()} == {f"torch.{dtype}"}
    assert torch.allclose(logits(loaded).float(), logits(spelled), atol=0.15)


def test_gguf_without_a_head_is_tied(tmp_path):
    tied = synthetic("tiny", tied=True, width=40, heads=4, key_value_heads=2, head_dim=10)
    loaded = load(write_gguf(tied, tmp_path / "tied.gguf"))
    assert loaded.anatomy.tied
    assert torch.equal(logits(loaded), logits(tied))


def test_gguf_frequency_divisors(spelled, tmp_path):
    """Llama 3.1 and later: the rope scaling is a tensor of divisors in GGUF."""
    divisors = torch.tensor([1.0, 1.0, 2.0, 8.0, 32.0])
    loaded = load(write_gguf(spelled, tmp_path / "long.gguf", extra={"rope_freqs.weight": divisors}))
    plain = spelled.model.model.rotary_emb.inv_freq
    assert torch.equal(loaded.model.model.rotary_emb.inv_freq, plain / divisors)
    assert not torch.allclose(logits(loaded), logits(spelled))


def test_gguf_that_cannot_be_read(spelled, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(InputError, match=r"model\.gguf cannot be read as GGUF"):
        load(path)
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"is no GGUF file: it begins with b'some'"):
        load(path)
    whole = write_gguf(spelled, tmp_path / "whole.gguf").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.gguf is cut short: its tensors reach to byte"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"is no GGUF file"):
        load(path)


def test_gguf_that_is_not_for_us(spelled, tmp_path):
    with pytest.raises(InputError, match=r"'gpt2'|gpt2"):
        load(write_gguf(spelled, tmp_path / "family.gguf", architecture="gpt2"))
    with pytest.raises(InputError, match=r"scales its rotary embedding \(yarn\)"):
        load(write_gguf(spelled, tmp_path / "scaled.gguf", scaling="yarn"))
    with pytest.raises(InputError, match=r"holds no tokenizer"):
        load(write_gguf(spelled, tmp_path / "mute.gguf", tokenizer=False))
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights, among them model\.layers\.2\.mlp"):
        load(write_gguf(spelled, tmp_path / "holed.gguf", leave_out="layers.2.mlp.up_proj"))
    part = tmp_path / "big-00001-of-00003.gguf"
    write_gguf(spelled, part)
    with pytest.raises(InputError, match=r"one part of a split GGUF file"):
        load(part)


def test_gguf_leaves_the_library_as_it_was(spelled, tmp_path):
    library = gguf.GGUFReader, gguf.get_tensor_name_map
    load(write_gguf(spelled, tmp_path / "good.gguf"))
    with pytest.raises(InputError, match=r"no tokenizer"):
        load(write_gguf(spelled, tmp_path / "mute.gguf", tokenizer=False))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == library


@pytest.mark.second
def test_smollm2(smollm2):
    """The real thing: tied, 30 layers, grouped queries, and it knows Paris."""
    found = describe(smollm2)
    assert {key: found[key] for key in ("layers", "width", "heads", "key_value_heads", "vocabulary", "tied")} == {
        "layers": 30, "width": 576, "heads": 9, "key_value_heads": 3, "vocabulary": 49152, "tied": True,
    }  # fmt: skip
    assert found["parameters"] == 134_515_008
    assert found["bytes"] == 4 * found["parameters"]
    assert found["exits"] == list(range(1, 30))
    assert found["chat_template"]
    assert found["eos_ids"] == [2]
    json.dumps(found)
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert smollm2.tokenizer.decode(smollm2.model(ids).logits[0, -1].argmax()) == " Paris"


# ------------------------------------------------------------------------------------------------ the hub


class Hub:
    """Answers for `snapshot_download`: a folder whose files arrive as they are asked for, or an error."""

    def __init__(self, source: Path | None = None, target: Path | None = None, error: Exception | None = None) -> None:
        self.source, self.target, self.error = source, target, error
        self.asked: list[dict] = []

    def __call__(self, repository: str, **options) -> str:
        self.asked.append({"repository": repository, **options})
        if self.error is not None:
            raise self.error
        assert self.source is not None
        assert self.target is not None
        self.target.mkdir(parents=True, exist_ok=True)
        for pattern in options["allow_patterns"]:
            for path in self.source.glob(pattern):
                shutil.copy(path, self.target)
        return str(self.target)


def answer(error_type: type) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    return error_type("403 Client Error\nmore lines", response=response)


def test_a_hub_id(monkeypatch, tiny, tiny_folder, tmp_path):
    hub = Hub(tiny_folder, tmp_path / "snapshots" / "0a1b2c")
    monkeypatch.setattr(reference, "snapshot_download", hub)
    loaded = load("someone/tiny-llama@main")
    assert torch.equal(logits(loaded), logits(tiny))
    assert (loaded.name, loaded.reference, loaded.revision) == ("tiny-llama", "someone/tiny-llama@main", "0a1b2c")
    assert [call["revision"] for call in hub.asked] == ["main", "0a1b2c"]
    assert not any("safetensors" in pattern for pattern in hub.asked[0]["allow_patterns"])
    assert hub.asked[1]["allow_patterns"] == ["model.safetensors"]


def test_a_hub_model_of_another_family_is_refused_before_its_weights(monkeypatch, folder, tmp_path):
    rewrite(folder / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    hub = Hub(folder, tmp_path / "hub")
    monkeypatch.setattr(reference, "snapshot_download", hub)
    with pytest.raises(InputError, match=r"someone/mamba is a 'mamba' model \(MambaForCausalLM\)"):
        load("someone/mamba")
    assert len(hub.asked) == 1


def test_a_hub_model_without_safetensors(monkeypatch, folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setattr(reference, "snapshot_download", Hub(folder, tmp_path / "hub"))
    with pytest.raises(InputError, match=r"holds no safetensors weights; a pickle"):
        load("someone/old")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            answer(GatedRepoError),
            r"is gated.*https://huggingface\.co/meta/llama, then run `hf auth login`",
        ),
        (answer(RepositoryNotFoundError), r"there is no model 'meta/llama'.*Hugging Face shows none"),
        (answer(RevisionNotFoundError), r"has no revision 'v9'"),
        (LocalEntryNotFoundError("no\nnetwork"), r"Hugging Face cannot be reached.*HF_HUB_OFFLINE"),
        (OSError("disk full\nmore"), r"could not be fetched from Hugging Face: disk full$"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, message):
    monkeypatch.setattr(reference, "snapshot_download", Hub(error=error))
    with pytest.raises(InputError, match=message) as caught:
        load("meta/llama@v9")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "reference",
    [
        "nope",
        "./owner/name",
        "~/owner/name",
        "/no/where",
        "a/b/c",
        "owner/m.gguf",
        "x.safetensors",
        "",
        "a b/c",
        "a//b",
    ],
)
def test_what_does_not_exist_and_is_no_id(reference):
    with pytest.raises(InputError, match=r"there is no model .*tales-untied"):
        load(reference)


def test_folders_that_hold_no_model(tmp_path, folder):
    with pytest.raises(InputError, match=r"holds no model: it has no config\.json"):
        load(tmp_path / "..")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no weights of an adapter"):
        load(tmp_path / "adapter")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds GGUF files: b\.gguf"):
        load(tmp_path / "ggufs")
    (folder / "config.json").write_text("{not json")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"is no configuration"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"no causal decoder.*'bert'.*BertForMaskedLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"no causal decoder"),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            r"is a 'mamba' model \(MambaForCausalLM\), and its layers carry a state.*; probekit reads llama, mistral",
        ),
        (
            {"model_type": "t5", "architectures": None},
            r"is a 't5' model, and transformers has no causal language model",
        ),
        ({"model_type": "gpt4", "architectures": ["GPT4ForCausalLM"]}, r"is a 'gpt4' model .* has no causal language"),
        (
            {"model_type": "bart", "architectures": None, "is_encoder_decoder": True},
            r"'bart' model, and an encoder-decoder",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantised \(gptq\)"),
        ({"num_hidden_layers": 6}, r"lacks 9 of the model's weights, among them model\.layers\.5"),
        ({"num_hidden_layers": 4}, r"holds weights that no model of its configuration has: model\.layers\.4"),
        ({"intermediate_size": 50}, r"does not fit its configuration: model.layers.0.mlp"),
        ({"num_attention_heads": 7}, r"cannot be read as a checkpoint"),
        ({"hidden_act": "nothing"}, r"cannot be read as a checkpoint"),
    ],
)
def test_configurations_that_do_not_fit(folder, config, message):
    rewrite(folder / "config.json", **config)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_no_pickle_is_ever_read(folder, monkeypatch):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no weights"):
        load(folder)
    torch.save(state, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(InputError, match=r"only as a pickle \(pytorch_model\.bin\), which can run code"):
        load(folder)
    with pytest.raises(InputError, match=r"is a pickle"):
        load(folder / "pytorch_model.bin")


def test_weights_that_are_damaged(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot be read as a checkpoint"):
        load(folder)
    with pytest.raises(InputError, match=r"one file of a checkpoint"):
        load(path)
    path.write_bytes(whole)
    state = load_file(path)
    save_file({**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(60)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no model of its configuration has: model\.layers\.0\.self_attn\.q_proj"):
        load(folder)


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer: neither tokenizer\.json nor tokenizer\.model"):
        load(folder)


def test_no_code_of_a_checkpoint_is_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}
    rewrite(folder / "config.json", auto_map=auto)
    rewrite(folder / "tokenizer_config.json", auto_map=auto)
    try:
        loaded = load(folder)
    except InputError:
        return
    assert type(loaded.model).__module__.startswith("transformers.")


@pytest.mark.parametrize("dtype", ["float64", "fp16", "int8", torch.float64, ""])
def test_unknown_dtype(tiny_folder, dtype):
    with pytest.raises(InputError, match=r"is not known; give one of float32, float16, bfloat16"):
        load(tiny_folder, dtype=dtype)


def test_devices(tiny_folder, monkeypatch):
    for device in ("abacus", "mps", "", "cuda:x", "cpu cuda", "cuda:01", "cpu:300"):
        with pytest.raises(InputError, match=r"is not known; give cpu, cuda or cuda:N"):
            load(tiny_folder, device=device)
    assert check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"CUDA device 'cuda' is not there: this machine has none.*--device cpu"):
        load(tiny_folder, device="cuda")
    assert load(tiny_folder).device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == torch.device("cuda:1")
    for number in (2, 65_536):  # torch.device("cuda:65536") is cuda:0
        with pytest.raises(InputError, match=rf"'cuda:{number}' is not there: this machine has 2"):
            check_device(f"cuda:{number}")


# ------------------------------------------------------------------------------------------------ manners


def test_loading_is_quiet_and_changes_nothing_for_good(tiny_folder, folder, spelled, tmp_path, capfd):
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    filters = list(warnings.filters)
    try:
        load(tiny_folder)
        load(write_gguf(spelled, tmp_path / "spelled.gguf"))
        rewrite(folder / "config.json", num_hidden_layers=6)
        with pytest.raises(InputError, match=r"lacks"):
            load(folder)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
        assert warnings.filters == filters
    finally:
        transformers_logging.set_verbosity_warning()
    written = capfd.readouterr()
    assert written.out == ""
    assert "Loading weights" not in written.err
    assert "de-quantizing" not in written.err


def test_hash_of_large_files_is_sampled_and_says_so(tmp_path, monkeypatch):
    small, large = tmp_path / "a", tmp_path / "b"
    small.write_bytes(b"x" * 10)
    large.write_bytes(bytes(range(256)) * 4096 * 70)
    whole = hash_files([large, small])
    assert whole == f"sha256:{hashlib.sha256(small.read_bytes() + large.read_bytes()).hexdigest()}"
    monkeypatch.setattr(weight_files, "FULL_HASH_BYTES", 1000)
    sampled = hash_files([small, large])
    assert sampled.startswith("sha256-sampled:")
    assert sampled == hash_files([large, small])
    with large.open("r+b") as stream:  # the last byte is in the sample
        stream.seek(-1, 2)
        stream.write(b"!")
    assert hash_files([small, large]) != sampled


def test_describe_is_plain_json(any_tiny):
    found = json.loads(json.dumps(describe(any_tiny)))
    assert found["schema"] == "probekit/inspect/1"
    assert found["sites"] == list(range(any_tiny.depth + 1))
    assert found["exits"] == list(range(1, any_tiny.depth))
    assert found["dtype"] == "float32"
    assert found["parameters"] * 4 == found["bytes"]
    assert found["head_dim"] == (12 if found["tied"] else 10)


def test_byte_tokenizer_survives_a_folder(tmp_path):
    byte_tokenizer(257, ends=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
