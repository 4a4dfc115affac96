"""Adapters in folders of their own (LoRA and the like), read by peft and put into the model that they were made for.

As with checkpoints, weights come from safetensors only, and no code that comes with an adapter is run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from probekit.errors import InputError
from probekit.foreign.json import read_object
from probekit.models.checkpoint import first_line
from probekit.models.weight_files import ADAPTER_CONFIG as CONFIG
from probekit.models.weight_files import ADAPTER_WEIGHTS as WEIGHTS
from probekit.models.weight_files import PICKLES, adapter_files, hash_files

_BEFORE_TEXT = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")
_REFUSED_KEYS = ("megatron_config", "layer_replication")
"""Settings that import a module by its name, and that make other layers of the model's."""


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder: `reference` is its absolute path, `kind` peft's name of it, as LORA.

    weights_hash: as of a checkpoint, over the adapter's configuration and weights.
    """

    name: str
    reference: str
    kind: str
    weights_hash: str

    @property
    def folder(self) -> Path:
        return Path(self.reference)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return os.path.isfile(folder / CONFIG) and not os.path.isfile(folder / "config.json")


def find_adapter(reference: str | Path) -> Adapter:
    """The adapter in a folder, its configuration and files checked. Raises InputError."""
    folder = Path(os.path.expanduser(reference))
    if not os.path.isdir(folder):
        raise InputError(f"there is no adapter {str(reference)!r}: no folder has that name.", "Give the folder of one.")
    folder = folder.resolve()
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no adapter: it has no {CONFIG}.")
    config = read_object(folder / CONFIG)
    kind, task = str(config.get("peft_type")), config.get("task_type")
    if kind in _BEFORE_TEXT:
        raise InputError(
            f"the adapter {folder} ({kind}) puts states of its own before the text, which no trace can show.",
            "Take one that changes layers, as LoRA does.",
        )
    if task not in (None, "CAUSAL_LM"):
        raise InputError(f"the adapter {folder} is for {task} models, not for causal language models.")
    if strange := next((key for key in _REFUSED_KEYS if config.get(key)), None):
        raise InputError(f"the adapter {folder} has `{strange}` set, which probekit does not read.")
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise InputError(
                f"{folder} holds its adapter only as a pickle ({pickles[0]}), which can run code when it is read.",
                f"Save it again as {WEIGHTS}.",
            )
        raise InputError(f"{folder} holds no weights of an adapter: it has no {WEIGHTS}.")
    return Adapter(folder.name, str(folder), kind, hash_files(adapter_files(folder)))


def base_reference(adapter: Adapter) -> str:
    """What an adapter names as the model that it was made for: a folder (also beside it), or a reference."""
    base = read_object(adapter.folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"the adapter {adapter.folder} does not name the model that it was made for.",
            "Name the model, and this folder with --adapter.",
        )
    if "://" in base:
        raise InputError(
            f"the adapter {adapter.folder} names {base!r} as its model: expected a folder or a Hugging Face id.",
            "Name the model, and this folder with --adapter.",
        )
    beside = adapter.folder / base
    found = beside if os.path.isdir(beside) else Path(os.path.expanduser(base))
    if os.path.isdir(found) and not (found / "config.json").is_file() and (found / CONFIG).is_file():
        raise InputError(
            f"the adapter {adapter.folder} was made for another adapter ({found}), not for a model.",
            "Merge that one into its model first.",
        )
    return str(beside.resolve()) if os.path.isdir(beside) else base


def put_in(model: Any, adapter: Adapter) -> Any:
    """The model with the adapter in its layers, every tensor of it there and of the right shape.

    Raises InputError where peft is not installed, or the adapter is not one of this model.
    """
    if find_spec("peft") is None:
        raise InputError("adapters are read by peft, which is not installed.", "Install probekit[adapters].")
    from peft import PeftModel, get_peft_model_state_dict

    problem = f"the adapter {adapter.folder} cannot be put into this model"
    stored = _checked_weights(adapter)
    try:
        with_adapter = PeftModel.from_pretrained(model, adapter.folder, torch_device=str(model.device))
        expected = set(get_peft_model_state_dict(with_adapter, save_embedding_layers=False))
    except Exception as error:  # whatever peft makes of other shapes and names
        mismatch = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        raise InputError(f"{problem}: {mismatch or first_line(error)}", "Was it made for another one?") from error
    if missing := sorted(expected - stored):
        raise InputError(f"{problem}: its file lacks {len(missing)} of its tensors, among them {missing[0]}.")
    if strange := sorted(stored - expected - set(with_adapter.state_dict())):
        raise InputError(f"{problem}: its file holds {len(strange)} tensors without a place, among them {strange[0]}.")
    return with_adapter.get_base_model()


def _checked_weights(adapter: Adapter) -> set[str]:
    """The names of an adapter's tensors, all of them finite numbers."""
    path = adapter.folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {first_line(error)}") from error
    if bad := next((name for name in sorted(tensors) if not torch.isfinite(tensors[name].float()).all()), None):
        raise InputError(f"{path} holds numbers that are not finite (NaN or infinity): in {bad}.", "It is damaged.")
    return set(tensors)
