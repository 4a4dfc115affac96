"""The first layers of a GGUF file as a GGUF file of its own, for llama.cpp: every tensor as it is quantised there.

Or the same file with plain float32 numbers, in which llama.cpp computes what its transformers copy does: with
quantised weights it quantises the activations, too.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from probekit.errors import InputError
from probekit.files import built
from probekit.models.gguf_header import read_header

_LAYER = "blk."
# What llama.cpp (b11434) computes by the number of layers: with fewer, the same weights are another model.
_BY_DEPTH = {("gemma2", 46), ("gemma3", 62), ("exaone4", 64)}
_ALWAYS_BY_DEPTH = {"minicpm", "minicpm3", "deepseek2", "baichuan"}


def cut_gguf(path: str | Path, exit_layer: int | None, target: str | Path, *, plain: bool = False) -> Path:
    """Write `path` with its first E layers only: `block_count` is E, and arrays with an entry a layer keep E.

    exit_layer: None keeps all. plain: dequantise every tensor to float32.

    Raises InputError for an exit that the file does not have, and for a model whose layers llama.cpp computes by their
    number.
    """
    path, target = Path(path), Path(target)
    header = read_header(path)
    depth = header.setting("block_count")
    if not isinstance(depth, int):
        raise InputError(f"{path.name} does not say how many layers it has.", "Take another file of this model.")
    if exit_layer is None:
        exit_layer = depth
    elif not 1 <= exit_layer < depth:
        raise InputError(f"exit layer {exit_layer} is out of range: {path.name} has exits 1..{depth - 1}.")
    elif header.architecture in _ALWAYS_BY_DEPTH or (header.architecture, depth) in _BY_DEPTH:
        raise InputError(
            f"llama.cpp computes a {header.architecture!r} model of {depth} layers otherwise than one of {exit_layer}: "
            "its first layers are no draft model there.",
            "Draft with n-grams, or with a small model of its family.",
        )
    library: Any = import_module("gguf")
    reader = library.GGUFReader(path)
    with built(target) as place:
        writer = library.GGUFWriter(place, header.architecture)
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue  # the writer's own
            value = field.contents()
            kind, sub = field.types[0], field.types[-1]
            if kind != library.GGUFValueType.ARRAY:
                cut = exit_layer if name == f"{header.architecture}.block_count" else value
                writer.add_key_value(name, cut, kind)
            else:
                cut = (
                    value[:exit_layer] if name.startswith(f"{header.architecture}.") and len(value) == depth else value
                )
                if cut:
                    writer.add_key_value(name, cut, kind, sub)
        for tensor in reader.tensors:
            if _layer_of(tensor.name) >= exit_layer:
                continue
            if plain:
                writer.add_tensor(tensor.name, library.quants.dequantize(tensor.data, tensor.tensor_type))
            else:
                writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def _layer_of(name: str) -> int:
    """The layer that a tensor belongs to; -1: none."""
    return int(name[len(_LAYER) :].split(".", 1)[0]) if name.startswith(_LAYER) else -1
