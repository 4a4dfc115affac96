"""The first layers of a model as a checkpoint of its own: a draft model for every engine that knows draft models.

Embedding, layers 0..E-1, final norm, head and tokenizer are the model's; `num_hidden_layers` is E. What it drafts is
what exit layer E drafts. A model out of a folder keeps its files' own tensors, names and quantisation; any other is
written from memory.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from probekit.errors import InputError
from probekit.files import atomic_text, built
from probekit.models.checkpoint import Source, config_of
from probekit.models.discovery import text_config
from probekit.models.loaded import Loaded, silent
from probekit.models.reference import find_checkpoint
from probekit.models.states import is_quantised
from probekit.models.weight_files import SINGLE, weight_files

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_BESIDE = (
    "tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json",
)  # fmt: skip
SHARD_BYTES = 4 * 10**9


def cut_checkpoint(loaded: Loaded, exit_layer: int, folder: str | Path) -> Path:
    """Write layers 0..E-1 of a model with its embedding, norm, head and tokenizer into a folder, as safetensors.

    Raises InputError for an exit that does not exist, and for a model whose first layers are no checkpoint by
    themselves: one with an adapter, one that is more than a text decoder, quantised weights that no file holds.
    """
    parts, folder = loaded.anatomy, Path(folder)
    parts.check_exit(exit_layer)
    if (kind := adapted(loaded)) is not None:
        raise InputError(
            f"{loaded.name} has an adapter ({kind}) in its layers, which a draft checkpoint cannot hold.",
            "Merge it into the model first (peft's merge_and_unload), and trace the merged one.",
        )
    if text_config(loaded.model) is not loaded.model.config:
        raise InputError(
            f"{loaded.name} is more than a text decoder ({type(loaded.model).__name__}): its first layers are no "
            "checkpoint that an engine loads by itself.",
            "Take the text model of its family.",
        )
    source = _folder_of(loaded)
    if source is None and is_quantised(loaded.model):
        raise InputError(
            f"the weights of {loaded.name} are quantised in memory, and no checkpoint holds them so.",
            "Load it from its folder, or take the unquantised model.",
        )
    with built(folder) as place:
        place.mkdir()
        if source is None:
            _from_memory(loaded, exit_layer, place)
        else:
            _from_folder(source, loaded.depth, exit_layer, place)
        for path in place.glob("*.safetensors"):  # which safetensors writes for its owner only
            path.chmod((place / "config.json").stat().st_mode)
    return folder


def adapted(loaded: Loaded) -> str | None:
    """The kind of the adapter in a model's layers, as peft names it; None without one."""
    if loaded.adapter is not None:
        return loaded.adapter.kind
    parts = (type(part) for part in loaded.model.modules())
    return next((part.__name__ for part in parts if part.__module__.startswith("peft.")), None)


def cut_config(config: Mapping[str, Any], depth: int, exit_layer: int) -> dict[str, Any]:
    """A configuration of L layers with E of them: lists that have an entry a layer keep the first E."""
    cut = dict(config)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == depth and "layer" in name:
            cut[name] = value[:exit_layer]
    cut.pop("transformers_weights", None)
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):  # layers that would come after the last
        if cut.get(name):
            cut[name] = 0
    counted = [name for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if name in config]
    for name in counted or ["num_hidden_layers"]:
        cut[name] = exit_layer
    return cut


def kept(name: str, exit_layer: int) -> bool:
    """Whether a tensor of this name belongs to the first E layers or to none."""
    layer = LAYER.search(name)
    return layer is None or int(layer[1]) < exit_layer


def _folder_of(loaded: Loaded) -> Source | None:
    """The checkpoint folder that a model was read from as it is; None for GGUF and for a model in memory."""
    if loaded.path is None or not loaded.path.is_dir():
        return None
    return find_checkpoint(loaded.reference)


def _from_folder(source: Source, depth: int, exit_layer: int, folder: Path) -> None:
    files = weight_files(source.folder)
    _write_weights(_tensors(files, exit_layer), folder)
    _write_config(cut_config(config_of(source.folder), depth, exit_layer), folder)
    for pattern in _BESIDE:
        for path in source.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _tensors(files: list[Path], exit_layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if kept(name, exit_layer):
                    yield name, weights.get_tensor(name)


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """In files of about 4 GB, with their index where there are several."""
    shards: list[dict[str, torch.Tensor]] = []
    places: dict[str, int] = {}
    filled = SHARD_BYTES + 1
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if filled + size > SHARD_BYTES:
            _flush(shards, folder)
            shards.append({})
            filled = 0
        shards[-1][name], places[name] = tensor.contiguous(), len(shards) - 1
        filled += size
    _flush(shards, folder)
    if len(shards) == 1:
        (folder / _shard(0)).rename(folder / SINGLE)
        return
    atomic_text(
        folder / f"{SINGLE}.index.json",
        json.dumps({"metadata": {}, "weight_map": {name: _shard(place) for name, place in places.items()}}, indent=1),
    )


def _flush(shards: list[dict[str, torch.Tensor]], folder: Path) -> None:
    """Write the last shard, and let go of it."""
    if shards:
        try:
            save_file(shards[-1], folder / _shard(len(shards) - 1), metadata={"format": "pt"})
        except SafetensorError as error:  # what the system said, without its number
            raise OSError(errno.ENOSPC if "No space" in str(error) else None, str(error)) from None
        shards[-1] = {}


def _shard(place: int) -> str:
    return f"model-{place + 1:05d}.safetensors"


def _from_memory(loaded: Loaded, exit_layer: int, folder: Path) -> None:
    """Through transformers' own writer, so that tensors bear the names that engines look for."""
    model = loaded.model
    described = cut_config(model.config.to_dict(), loaded.depth, exit_layer)
    config = type(model.config).from_dict(described)
    config.dtype = loaded.dtype
    with torch.device("meta"):
        small = type(model)(config)
    own = {name: tensor for name, tensor in model.state_dict().items() if kept(name, exit_layer)}
    small.load_state_dict(own, assign=True, strict=False)
    small.tie_weights()
    if empty := [name for name, tensor in small.named_parameters() if tensor.is_meta]:
        raise InputError(f"the first {exit_layer} layers of {loaded.name} lack weights, among them {empty[0]}.")
    small.generation_config = model.generation_config
    with silent():
        small.save_pretrained(folder)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)


def _write_config(config: Mapping[str, Any], folder: Path) -> None:
    atomic_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
