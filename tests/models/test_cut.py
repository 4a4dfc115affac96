"""The first layers as a checkpoint: transformers loads it, and it says what the lens says at that exit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models.test_families import PROMPTS, small
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.lens.lens import Lens
from probekit.models.cut import cut_checkpoint, cut_config, kept
from probekit.models.cut_gguf import cut_gguf
from probekit.models.families import FAMILIES
from probekit.models.gguf_header import read_header
from probekit.models.loaded import load, wrap
from probekit.tracing.tracer import trace
from probekit.validation.draft_checkpoint import check_draft_checkpoint

EXIT = 3
TEXT = PROMPTS[0] * 2  # past the windows
FAST = {"llama", "gemma3_text", "smollm3", "cohere2"}


def lens_argmax(loaded, ids: list[int], exit_layer: int) -> list[int]:
    with torch.inference_mode(), Capture(loaded.anatomy, [exit_layer]) as capture:
        loaded.model(torch.tensor([ids]))
        return Lens(loaded.anatomy)(capture[exit_layer][0], exit_layer).argmax(-1).tolist()


def model_argmax(folder: Path, ids: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].argmax(-1).tolist()


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.second) for name in sorted(FAMILIES)]
)
def test_a_cut_checkpoint_of_every_family_drafts_what_the_exit_drafts(name, tmp_path, unchanged, record_property):
    loaded = small(name)
    unchanged(loaded.model)
    folder = cut_checkpoint(loaded, EXIT, tmp_path / "memory")
    assert model_argmax(folder, TEXT) == lens_argmax(loaded, TEXT, EXIT)
    assert check_draft_checkpoint(loaded, EXIT, folder, TEXT) < 1e-4

    small(name).model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")  # a folder without one is no checkpoint
    on_disk = replace(loaded, path=tmp_path / "whole", reference=str(tmp_path / "whole"))
    again = cut_checkpoint(on_disk, EXIT, tmp_path / "files")
    assert model_argmax(again, TEXT) == lens_argmax(loaded, TEXT, EXIT)
    record_property("counted", "families whose cut checkpoint drafts as the lens says")


def test_the_bundled_model_cut_drafts_as_its_trace_says(tmp_path):
    loaded = load("tales-layerskip", device="cpu")
    run = trace(loaded, ["Once upon a time", "The wolf said"], max_new_tokens=24)
    folder = cut_checkpoint(loaded, 3, tmp_path / "drafter")
    for prompt in run.prompts:
        ids, text = run.prompt_ids(prompt).tolist(), run.outputs(prompt).tolist()
        said = np.array(model_argmax(folder, ids + text))[len(ids) - 1 : -1]
        assert ((said == text) == run.agreement(prompt)[3]).all()
    with (
        safe_open(loaded.path / "model.safetensors", "pt") as whole,
        safe_open(folder / "model.safetensors", "pt") as cut,
    ):
        assert {name for name in whole.keys() if kept(name, 3)} == set(cut.keys())  # noqa: SIM118
        for name in cut.keys():  # noqa: SIM118
            assert torch.equal(whole.get_tensor(name), cut.get_tensor(name))
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    there = AutoTokenizer.from_pretrained(folder)
    assert there("Once upon").input_ids == loaded.tokenizer("Once upon").input_ids
    assert load(folder, device="cpu").depth == 3


def test_lists_with_an_entry_a_layer_are_cut_and_others_are_not():
    config = {
        "num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "no_rope_layers": [1, 1, 1, 0],
        "eos_token_id": [1, 2, 3, 4], "num_nextn_predict_layers": 1, "transformers_weights": "x.safetensors",
    }  # fmt: skip
    assert cut_config(config, 4, 2) == {
        "num_hidden_layers": 2, "layer_types": ["a", "b"], "no_rope_layers": [1, 1], "eos_token_id": [1, 2, 3, 4],
        "num_nextn_predict_layers": 0,
    }  # fmt: skip
    assert kept("model.layers.1.mlp.experts.7.w", 2)
    assert not kept("model.layers.2.mlp.experts.1.w", 2)
    assert not kept("gpt_neox.layers.11.attention.dense.bias", 2)


def test_weights_in_several_files_stay_in_several(tmp_path, tiny, monkeypatch):
    from probekit.models import cut

    tiny.model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    tiny.tokenizer.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors.index.json").is_file()
    loaded = load(tmp_path / "whole", device="cpu")
    monkeypatch.setattr(cut, "SHARD_BYTES", 30_000)
    folder = cut_checkpoint(loaded, 2, tmp_path / "cut")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    ids = list(range(5, 25))
    assert model_argmax(folder, ids) == lens_argmax(loaded, ids, 2)


def test_what_no_draft_checkpoint_can_hold_is_refused(tmp_path, tiny):
    with pytest.raises(InputError, match=r"exit layer 5 is out of range: this model has exits 1\.\.4"):
        cut_checkpoint(tiny, 5, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    quantised = torch.ao.quantization.quantize_dynamic(small("llama").model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(InputError, match="quantised in memory"):
        cut_checkpoint(wrap(quantised, name="small"), 2, tmp_path / "x")


def test_a_model_with_an_adapter_is_to_be_merged_first(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small("llama").model, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with pytest.raises(InputError, match=r"has an adapter .* Merge it"):
        cut_checkpoint(wrap(model, name="small"), 2, tmp_path / "x")


def test_a_checkpoint_that_says_something_else_is_found_out(tmp_path):
    """As of a model that scales its layers by their number: here, layers that are others."""
    loaded = small("llama")
    folder = cut_checkpoint(loaded, EXIT, tmp_path / "drafter")
    other = cut_checkpoint(small("llama", initializer_range=0.3), EXIT, tmp_path / "other")
    assert check_draft_checkpoint(loaded, EXIT, folder, TEXT) < 1e-4
    with pytest.raises(InputError, match="say something else than the lens at layer 3"):
        check_draft_checkpoint(loaded, EXIT, other, TEXT)


@pytest.mark.long
def test_a_gguf_cut_drafts_as_the_whole_file_says(smollm2, tmp_path):
    """Every tensor as it was quantised; and transformers reads the cut file as what the lens says."""
    cut = cut_gguf(smollm2.path, 10, tmp_path / "cut.gguf")
    whole, small_header = read_header(smollm2.path), read_header(cut)
    assert small_header.setting("block_count") == 10
    assert {name for name in whole.tensors if not re.match(r"blk\.([12]\d)\.", name)} == set(small_header.tensors)
    ids = smollm2.tokenizer("The quick brown fox jumps over the lazy dog, and then").input_ids
    drafter = load(cut, device="cpu", dtype="float32", cache=False)
    with torch.inference_mode():
        said = drafter.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert said == lens_argmax(smollm2, ids, 10)
    assert drafter.tokenizer("Once upon a time").input_ids == smollm2.tokenizer("Once upon a time").input_ids
    with pytest.raises(InputError, match=r"exits 1\.\.29"):
        cut_gguf(smollm2.path, 30, tmp_path / "none.gguf")


@pytest.mark.parametrize(("architecture", "layers"), [("gemma3", 62), ("minicpm", 40)])
def test_a_gguf_that_llama_cpp_reads_by_its_depth_is_refused(tmp_path, architecture, layers):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", architecture)
    writer.add_block_count(layers)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(4, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(InputError, match=f"llama.cpp computes a {architecture!r} model of {layers} layers otherwise"):
        cut_gguf(tmp_path / "whole.gguf", 3, tmp_path / "cut.gguf")
