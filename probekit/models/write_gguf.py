"""A model in memory, or its first layers, as a GGUF file for llama.cpp, through the `gguf` package.

For the families whose tensors llama.cpp takes as they are (but for the order of the rotary pairs in a Llama), and
byte-level BPE tokenizers that it splits text for as they do. Everything else is refused: llama.cpp's own converter
knows more, and a GGUF file that was traced is cut as it is (`probekit.models.cut_gguf`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probekit.errors import InputError
from probekit.files import built
from probekit.models.cut import adapted, kept
from probekit.models.loaded import Loaded

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
CONVERTER = "Convert the model with llama.cpp's convert_hf_to_gguf.py, and trace and export that GGUF file."
_GPT2, _QWEN2, _LLAMA3 = "gpt-2", "qwen2", "llama-bpe"
# How llama.cpp calls a pre-tokenizer, by the pattern that its `tokenizer.json` splits with.
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
        _QWEN2,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
    r"\s+": _LLAMA3,
}  # fmt: skip


def write_gguf(loaded: Loaded, target: str | Path, exit_layer: int | None = None) -> Path:
    """Write a model with its tokenizer as GGUF, matrices in the dtype that it was loaded in.

    exit_layer: the first E layers only; None: all.

    Raises InputError for another family, an adapter, rotary embeddings that are scaled, and a tokenizer that llama.cpp
    would split text for otherwise.
    """
    library: Any = import_module("gguf")
    config, parts = loaded.model.config, loaded.anatomy
    depth = parts.depth if exit_layer is None else parts.check_exit(exit_layer)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise InputError(
            f"{loaded.name} is a {config.model_type!r} model; GGUF is written of {', '.join(ARCHITECTURES)}.", CONVERTER
        )
    if (kind := adapted(loaded)) is not None:
        raise InputError(f"{loaded.name} has an adapter ({kind}), which this file cannot hold.", "Merge it first.")
    rope = getattr(config, "rope_parameters", None) or {}
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{loaded.name} has another activation than SiLU: {config.hidden_act}.", CONVERTER)
    if rope.get("rope_type", "default") != "default" or (getattr(config, "layer_types", None) and _windowed(config)):
        raise InputError(f"{loaded.name} scales its rotary embedding or has a window.", CONVERTER)
    vocabulary = tokenizer_fields(loaded)
    target = Path(target)
    with built(target) as place:
        writer = library.GGUFWriter(place, architecture)
        writer.add_name(loaded.name)
        writer.add_context_length(parts.context)
        writer.add_embedding_length(parts.width)
        writer.add_block_count(depth)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(parts.key_value_heads)
        writer.add_key_length(parts.head_dim)
        writer.add_value_length(parts.head_dim)
        writer.add_rope_dimension_count(parts.head_dim)
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(parts.vocabulary)
        for add, value in vocabulary:
            getattr(writer, add)(value)
        for name, tensor in _tensors(library, loaded, architecture, depth):
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def _windowed(config: Any) -> bool:
    return any(kind != "full_attention" for kind in config.layer_types)


def _tensors(library: Any, loaded: Loaded, architecture: str, depth: int) -> Iterator[tuple[str, np.ndarray]]:
    number = {name: key for key, name in library.MODEL_ARCH_NAMES.items()}[architecture]
    names = library.get_tensor_name_map(number, depth)
    config, half = loaded.model.config, loaded.dtype != torch.float32
    for name, tensor in loaded.model.state_dict().items():
        if not kept(name, depth) or (loaded.anatomy.tied and name.startswith("lm_head.")):
            continue
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise InputError(f"{loaded.name} has a weight that GGUF has no name for: {name}.", CONVERTER)
        values = tensor.detach().float().cpu().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = _paired(values, config.num_attention_heads)
        elif architecture == "llama" and ".k_proj." in name:
            values = _paired(values, loaded.anatomy.key_value_heads)
        yield mapped, values.astype(np.float16) if half and values.ndim > 1 else values


def _paired(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order in which llama.cpp rotates them: pairs side by side, not half a head apart."""
    split = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def tokenizer_fields(loaded: Loaded) -> list[tuple[str, Any]]:
    """(method of a GGUFWriter, value) of a byte-level BPE tokenizer. Raises InputError for any other."""
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())
    pre = pre_tokenizer(described)
    if pre is None:
        raise InputError(
            f"the tokenizer of {loaded.name} splits text as no pre-tokenizer that is known here.", CONVERTER
        )
    size = loaded.anatomy.vocabulary
    tokens = [f"[PAD{place}]" for place in range(size)]
    kinds = [5] * size  # unused
    for text, place in described["model"]["vocab"].items():
        tokens[place], kinds[place] = text, 1
    for added in described.get("added_tokens", ()):
        tokens[added["id"]], kinds[added["id"]] = added["content"], 3 if added["special"] else 4
    merges = [each if isinstance(each, str) else " ".join(each) for each in described["model"]["merges"]]
    fields: list[tuple[str, Any]] = [
        ("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", pre), ("add_token_list", tokens),
        ("add_token_types", kinds), ("add_token_merges", merges), ("add_add_bos_token", _adds_bos(loaded)),
    ]  # fmt: skip
    if loaded.eos_ids:
        fields.append(("add_eos_token_id", min(loaded.eos_ids)))
    if (first := loaded.tokenizer.bos_token_id) is not None:
        fields.append(("add_bos_token_id", first))
    if template := getattr(loaded.tokenizer, "chat_template", None):
        fields.append(("add_chat_template", template))
    return fields


def pre_tokenizer(described: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a `tokenizer.json` splits text before its merges; None: none that is known here."""
    given = described.get("pre_tokenizer") or {}
    plain = (described.get("normalizer") or {}).get("type") in (None, "NFC")
    if (described.get("model") or {}).get("type") != "BPE" or not plain:
        return None
    if given.get("type") == "ByteLevel" and given.get("use_regex") and not given.get("add_prefix_space"):
        return _GPT2
    steps = given.get("pretokenizers") or []
    if [each.get("type") for each in steps] == ["Split", "ByteLevel"] and not steps[1].get("use_regex"):
        return _PATTERNS.get((steps[0].get("pattern") or {}).get("Regex", ""))
    return None


def _adds_bos(loaded: Loaded) -> bool:
    ids = loaded.tokenizer("a").input_ids
    return bool(ids) and ids[0] == loaded.tokenizer.bos_token_id
