"""Checkpoints in one GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from probekit.errors import InputError
from probekit.models.checkpoint import PICKLES, Source, check_family, default_dtype, first_line, read_weights


def check_gguf(source: Source) -> Source:
    path = source.path
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when it is read.", "Give safetensors or GGUF.")
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is one file of a checkpoint.", "Give the folder that it lies in.")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} is no GGUF file: it begins with {magic!r}.")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem) and not path.stem.endswith("-00001-of-00001"):
        raise InputError(f"{path} is one part of a split GGUF file.", "Merge it with `llama-gguf-split --merge`.")
    return source


def read_gguf(source: Source, device: torch.device, asked: torch.dtype | None) -> tuple[Any, Any, list[Path]]:
    with _one_gguf_reader(source.path) as reader:
        config = AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf, local_files_only=True)
        check_family(config.to_dict(), source.name)
        scaling = reader.get_field(f"{config.model_type}.rope.scaling.type")
        if scaling is not None and scaling.contents() != "none":
            raise InputError(
                f"{source.path} scales its rotary embedding ({scaling.contents()}), which transformers does not "
                "read from GGUF.",
                "Take the safetensors checkpoint of this model.",
            )
        if reader.get_field("tokenizer.ggml.tokens") is None:
            raise InputError(f"{source.path} holds no tokenizer.", "Take a GGUF file that has one.")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        dtype = asked or default_dtype(device, tensors["token_embd.weight"].tensor_type.name)
        tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf, local_files_only=True)
        if isinstance(config.eos_token_id, int) and tokenizer.eos_token_id != config.eos_token_id:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)  # 5.17 takes bos
        model = read_weights(source, device, dtype, config=config, gguf_file=source.gguf)
        if "rope_freqs.weight" in tensors:
            # Llama 3.1 and later: GGUF writes the rope scaling as divisors of the frequencies, which transformers
            # leaves out (as of 5.23).
            divisors = torch.tensor(tensors["rope_freqs.weight"].data, dtype=torch.float32, device=device)
            rotary = model.model.rotary_emb
            rotary.inv_freq.div_(divisors)
            rotary.original_inv_freq.div_(divisors)
    return model, tokenizer, [source.path]


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
