"""A model that is larger than its device: which parts lie where, as accelerate deals them out, the last ones on disk.

Norm and head stay on the first device, whatever their place in the model: the lens reads them after every layer.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import get_max_memory
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from probekit.errors import InputError, ResourceError
from probekit.models.anatomy import anatomy
from probekit.models.states import count_numbers

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EXAMPLE = "Write auto, or auto:0=70GiB,cpu=100GiB."


@dataclass(frozen=True)
class DeviceMap:
    """How a model is dealt out: memory is the most bytes of weights on each device (GPUs by number, and "cpu").

    A device that is not named gives what it has free; what finds no room lies on disk.
    """

    memory: Mapping[int | str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> DeviceMap:
        """As --device-map has it: `auto`, or `auto:0=70GiB,cpu=100GiB`. Raises InputError."""
        kind, colon, limits = text.partition(":")
        if kind != "auto" or (colon and not limits):
            raise InputError(f"the device map is {text!r}; auto is the one that there is.", _EXAMPLE)
        memory: dict[int | str, int] = {}
        for limit in limits.split(",") if limits else ():
            found = re.fullmatch(r"(cpu|\d{1,3})=(\d+(?:\.\d+)?)\s*([kKmMgG]?i?[bB])", limit.strip())
            if found is None:
                raise InputError(f"the device map has {limit.strip()!r}, which is no device with its memory.", _EXAMPLE)
            device, size, unit = found.groups()
            memory[int(device) if device.isdecimal() else device] = int(float(size) * _UNITS[unit.upper()])
        for device in memory:
            if isinstance(device, int) and device >= torch.cuda.device_count():
                raise InputError(f"the device map names GPU {device}; there are {torch.cuda.device_count()}.", _EXAMPLE)
        return cls(memory)


_chosen: ContextVar[DeviceMap | None] = ContextVar("device map", default=None)


@contextmanager
def dealing_out(device_map: str | None) -> Iterator[None]:
    """Within it every load deals its model out so: what `--device-map` is to a command. Raises InputError."""
    before = _chosen.set(None if device_map is None else DeviceMap.of(device_map))
    try:
        yield
    finally:
        _chosen.reset(before)


_splitting: ContextVar[bool] = ContextVar("tensor parallelism", default=False)


@contextmanager
def splitting() -> Iterator[None]:
    """Within it every load splits its model over the processes of the job: what `--tensor-parallel` is to a command."""
    before = _splitting.set(True)
    try:
        yield
    finally:
        _splitting.reset(before)


def is_splitting() -> bool:
    return _splitting.get()


def split_options() -> dict[str, Any]:
    """Arguments of `from_pretrained` that split a model by its own `tp_plan`. Raises InputError outside a job."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise InputError(
            "tensor parallelism splits a model over the processes of a job, and this is one alone.",
            "Start it with torchrun --nproc-per-node N -m probekit ...",
        )
    settings: Any = getattr(import_module("transformers.distributed"), "DistributedConfig", None)
    if settings is not None and "tp_plan" in inspect.signature(settings).parameters:
        return {"distributed_config": settings(tp_plan="auto")}
    return {"tp_plan": "auto"}


def chosen_map(given: str | None) -> DeviceMap | None:
    """The device map of a load: the one that was given, else that of the command."""
    return _chosen.get() if given is None else DeviceMap.of(given)


def dealt_out(device_map: DeviceMap, folder: Path, dtype: torch.dtype) -> dict[str, int | str]:
    """{module: device} for the model of a checkpoint folder; a device is a GPU's number, "cpu" or "disk".

    Raises ResourceError where not even norm and head fit on the first device.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    parts = anatomy(model)
    memory = get_max_memory(dict(device_map.memory) or None)
    first = next(device for device, most in memory.items() if most > 0 or device == "cpu")
    size = torch.empty((), dtype=dtype).element_size()
    needed = size * (count_numbers(parts.norm) + count_numbers(parts.head))
    if memory[first] < needed:
        raise ResourceError(
            f"norm and head of this model take {needed:,} bytes, more than the {memory[first]:,} of device {first!r}.",
            "Give it more: --device-map auto:..",
        )
    memory[first] -= size * count_numbers(parts.norm) if parts.tied else needed  # a tied head lies with the embedding
    split = getattr(model, "_no_split_modules", None) or [type(parts.layers[0]).__name__]
    found = infer_auto_device_map(model, memory, no_split_module_classes=sorted(split), dtype=dtype)
    places: dict[str, int | str] = {}
    for name, module in model.named_modules():
        if module is parts.norm or module is parts.head or (parts.tied and module is parts.embedding):
            places[name] = first
        elif module in parts.layers or (_has_tensors(module) and not _within(name, places)):
            places[name] = _place_of(name, found)
    return {"": first} if set(places.values()) == {first} else places


def _has_tensors(module: nn.Module) -> bool:
    return any(each is not None for each in (*module._parameters.values(), *module._buffers.values()))


def _within(name: str, places: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{each}.") for each in places)


def _place_of(name: str, places: Mapping[str, Any]) -> Any:
    """Where a module lies by a map that may name one that holds it."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places[name]
