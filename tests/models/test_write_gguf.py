"""A model written as GGUF is the same model when transformers reads it, and its first layers are the exit."""

from __future__ import annotations

import pytest
import torch
from models.test_cut import lens_argmax
from models.test_families import small

from probekit.errors import InputError
from probekit.models.loaded import load
from probekit.models.write_gguf import pre_tokenizer, write_gguf

pytest.importorskip("gguf", reason="gguf, which writes these files, is not installed")

TEXT = "Once upon a time there lived a king, who said: 'I have 3 daughters!'\n"


@pytest.mark.parametrize(("name", "exit_layer"), [("tales-tied", None), ("tales-layerskip", 3)])
def test_the_bundled_models_as_gguf(name, exit_layer, tmp_path):
    loaded = load(name, device="cpu")
    path = write_gguf(loaded, tmp_path / "written.gguf", exit_layer)
    again = load(path, device="cpu", dtype="float32", cache=False)
    assert again.depth == (exit_layer or 12)
    assert again.anatomy.tied == loaded.anatomy.tied
    ids = loaded.tokenizer(TEXT).input_ids
    assert again.tokenizer(TEXT).input_ids == ids
    assert again.eos_ids == loaded.eos_ids
    assert again.tokenizer.eos_token_id == loaded.tokenizer.eos_token_id
    assert again.tokenizer.bos_token_id is again.tokenizer.pad_token_id is None
    with torch.inference_mode():
        said = again.model(torch.tensor([ids])).logits[0]
        whole = loaded.model(torch.tensor([ids])).logits[0]
    if exit_layer is None:
        torch.testing.assert_close(said, whole, atol=1e-4, rtol=1e-4)
    else:
        assert said.argmax(-1).tolist() == lens_argmax(loaded, ids, exit_layer)


def test_what_is_not_written_is_refused_with_the_way_out(tmp_path, tiny):
    with pytest.raises(InputError, match="is a 'gemma2' model; GGUF is written of llama, qwen2, qwen3"):
        write_gguf(small("gemma2"), tmp_path / "x.gguf")
    with pytest.raises(InputError, match=r"the tokenizer of .* splits text as no pre-tokenizer"):
        write_gguf(tiny, tmp_path / "x.gguf")
    with pytest.raises(InputError, match="scales its rotary embedding or has a window"):
        write_gguf(small("qwen2"), tmp_path / "x.gguf")
    with pytest.raises(InputError, match="out of range"):
        write_gguf(load("tales-tied", device="cpu"), tmp_path / "x.gguf", 12)
    assert not (tmp_path / "x.gguf").exists()


def test_pre_tokenizers_by_their_pattern():
    bpe = {"model": {"type": "BPE"}}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert pre_tokenizer(bpe | {"pre_tokenizer": plain}) == "gpt-2"
    assert pre_tokenizer(bpe | {"pre_tokenizer": plain | {"add_prefix_space": True}}) is None
    assert pre_tokenizer({"model": {"type": "Unigram"}, "pre_tokenizer": plain}) is None
    qwen = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": qwen}}
    steps = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    assert pre_tokenizer(bpe | {"pre_tokenizer": steps, "normalizer": {"type": "NFC"}}) == "qwen2"
    steps["pretokenizers"][0]["pattern"] = {"Regex": r"\w+"}
    assert pre_tokenizer(bpe | {"pre_tokenizer": steps}) is None
