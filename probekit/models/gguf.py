"""Checkpoints in one GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from probekit.errors import InputError
from probekit.models.checkpoint import (
    Source,
    check_family,
    default_dtype,
    first_line,
    read_weights,
)
from probekit.models.gguf_copies import GGUFCopy, copy_of, read_tokenizer
from probekit.models.gguf_header import GGUFHeader, read_header
from probekit.models.weight_files import PICKLES, hash_files

# What transformers calls the architectures that llama.cpp calls otherwise.
MODEL_TYPES = {
    "command-r": "cohere",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
}
SAFETENSORS = "Take the safetensors checkpoint of this model."
_OWN_HEAD_SCALE = {("gemma2", 46), ("gemma3", 62)}  # Gemma's 27B models, by their layers


class GGUFRead(NamedTuple):
    """A model as read. remark: why no copy was kept, where one was wanted."""

    model: Any
    tokenizer: Any
    weights_hash: str
    remark: str | None


def check_gguf(source: Source) -> Source:
    """Everything that the header can tell, in a fraction of a second: no tensor is read."""
    path = source.path
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when it is read.", "Give safetensors or GGUF.")
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is one file of a checkpoint.", "Give the folder that it lies in.")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem) and not path.stem.endswith("-00001-of-00001"):
        raise InputError(f"{path} is one part of a split GGUF file.", "Merge it with `llama-gguf-split --merge`.")
    header = read_header(path)
    _check_architecture(header, source.name)
    scaling = header.setting("rope.scaling.type")
    if scaling not in (None, "none") or any("rope_factors_" in name for name in header.tensors):
        raise InputError(
            f"{path} scales its rotary embedding ({scaling or 'by factors'}), which transformers does not read from "
            "GGUF.",
            SAFETENSORS,
        )
    if "tokenizer.ggml.tokens" not in header.counts:
        raise InputError(f"{path} holds no tokenizer.", "Take a GGUF file that has one.")
    if "token_embd.weight" not in header.tensors:
        raise InputError(f"{path} holds no embedding: it is not a whole model.", "Take a GGUF file that is.")
    return source


def _check_architecture(header: GGUFHeader, name: str) -> None:
    """Whether this is a model, of a family that is read, that transformers reads from GGUF."""
    kind, architecture = header.values.get("general.type", "model"), header.architecture
    if kind != "model":
        raise InputError(f"{name} is a GGUF file of kind {kind!r}, not a model.", "Give the file of the model.")
    check_family({"model_type": MODEL_TYPES.get(architecture, architecture)}, name)
    if architecture not in readable_architectures():
        raise InputError(
            f"{name} is a GGUF file of architecture {architecture!r}, which transformers "
            f"{version('transformers')} does not read from GGUF.",
            SAFETENSORS,
        )
    if architecture == "llama" and header.setting("expert_count"):
        raise InputError(
            f"{name} is a mixture of {header.setting('expert_count')} experts under the architecture 'llama', which "
            "transformers reads from GGUF as if it had one.",
            SAFETENSORS,
        )


@cache
def readable_architectures() -> frozenset[str]:
    """The architectures, by llama.cpp's names, that this transformers makes a model of."""
    legacy: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    found = set(legacy.GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    with suppress(ImportError, AttributeError):  # before 5.23
        found |= set(import_module("transformers.integrations.gguf").GGUF_ARCHS)
    found |= {theirs for theirs, ours in MODEL_TYPES.items() if {ours, ours.removesuffix("_text")} & found}
    return frozenset(found)


def read_gguf(source: Source, device: torch.device, asked: torch.dtype | None, copies: Path | None) -> GGUFRead:
    """The model and tokenizer of a checked GGUF file: from the copy below `copies`, else from the file."""
    header, weights_hash = read_header(source.path), hash_files([source.path])
    dtype = asked or default_dtype(device, _stored(header))
    place = None if copies is None else copy_of(copies, weights_hash, source.path, dtype)
    remark = None
    read = None if place is None else _from_copy(place, source, device, dtype)
    if read is None:
        read = _from_file(source, header, device, dtype)
        if place is not None and (why := place.keep(*read)) is not None:
            remark = f"no dequantised copy of {source.name} was kept: {why}. It is dequantised again at every load."
    model, tokenizer = read
    if "rope_freqs.weight" in header.tensors:
        # Llama 3.1 and later: GGUF writes the rope scaling as divisors of the frequencies, which transformers
        # leaves out (as of 5.23).
        divisors = torch.from_numpy(header.numbers("rope_freqs.weight")).to(device)
        rotary = model.model.rotary_emb
        rotary.inv_freq.div_(divisors)
        rotary.original_inv_freq.div_(divisors)
    return GGUFRead(model, tokenizer, weights_hash, remark)


def _stored(header: GGUFHeader) -> str:
    """The type of the embedding, by ggml's name."""
    quantisations: Any = import_module("gguf").GGMLQuantizationType
    return str(quantisations(header.tensors["token_embd.weight"].type).name)


def _from_copy(place: GGUFCopy, source: Source, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """None where there is none, or a damaged one."""
    if not place.whole:
        return None
    copied = Source(place.folder, None, source.name, source.reference)
    try:
        return read_weights(copied, device, dtype), read_tokenizer(place.folder)
    except (OSError, ValueError, InputError, SafetensorError):  # another process took it away meanwhile
        return None


def _from_file(source: Source, header: GGUFHeader, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    with _one_gguf_reader(source.path) as reader:
        config = AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf, local_files_only=True)
        check_family(config.to_dict(), source.name)
        _complete(config, header)
        with _standing_in(reader) as lacking:
            tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf, local_files_only=True)
        for token in lacking:
            setattr(tokenizer, token, None)
        if isinstance(config.eos_token_id, int) and tokenizer.eos_token_id != config.eos_token_id:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)  # 5.17 takes bos
        options = {"config": config, "gguf_file": source.gguf, **_plain_weights()}
        return read_weights(source, device, dtype, **options), tokenizer


@contextmanager
def _standing_in(reader: Any) -> Iterator[list[str]]:
    """The token that ends a text stands in for special ones that the file does not have: their names, to be unset.

    transformers (5.17) looks the first token up wherever there is a last one, and fails without one.
    """
    last, named = "tokenizer.ggml.eos_token_id", {"bos_token": "bos", "pad_token": "padding"}
    ids = {token: f"tokenizer.ggml.{name}_token_id" for token, name in named.items()}
    lacking = {token: key for token, key in ids.items() if last in reader.fields and key not in reader.fields}
    reader.fields.update(dict.fromkeys(lacking.values(), reader.fields.get(last)))
    try:
        yield list(lacking)
    finally:
        for key in lacking.values():
            del reader.fields[key]


def _plain_weights() -> dict[str, Any]:
    """Ask for floating-point weights: from 5.23 on transformers else calls the model quantised."""
    settings = getattr(import_module("transformers"), "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def _complete(config: Any, header: GGUFHeader) -> None:
    """Put into the configuration what the file says, or llama.cpp knows, and transformers (5.23) leaves out."""
    architecture, width = header.architecture, header.setting("attention.key_length")
    if width and getattr(config, "head_dim", None) not in (None, width):
        config.head_dim = width
    if architecture == "phi3" and (window := header.setting("attention.sliding_window")):
        config.sliding_window = window
    if (architecture, config.num_hidden_layers) in _OWN_HEAD_SCALE:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


@contextmanager
def _one_gguf_reader(path: Path) -> Iterator[Any]:
    """Parse a GGUF file's header, and gguf's list of tensor names, once.

    transformers (5.23) opens the file anew for config, tokenizer and weights, and makes the list anew for every
    module of the model: more than half of the seconds that a small model takes to load.
    """
    library: Any = import_module("gguf")
    original, name_map = library.GGUFReader, library.get_tensor_name_map
    try:
        reader = original(path)
    except Exception as error:
        raise InputError(f"{path} cannot be read as GGUF: {first_line(error)}") from error

    def shared(asked: Any, *args: Any, **kwargs: Any) -> Any:
        return reader if Path(asked) == path else original(asked, *args, **kwargs)

    library.GGUFReader, library.get_tensor_name_map = shared, cache(name_map)
    try:
        yield reader
    finally:
        library.GGUFReader, library.get_tensor_name_map = original, name_map
