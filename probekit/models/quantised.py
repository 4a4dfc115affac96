"""Checkpoints whose weights are quantised: transformers' own integrations read them, where these run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from probekit.errors import InputError
from probekit.models.states import is_quantised, tensor_libraries

_NO_GPU = re.compile(r"\b(gpu|cuda|accelerator|xpu)\b", re.IGNORECASE)


def quantised_by(config: Mapping[str, Any]) -> str | None:
    """The method that a `config.json` says its weights are quantised by; None for plain weights."""
    given = config.get("quantization_config")
    if not given:
        return None
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method is None and isinstance(given, Mapping) and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method or "a method without a name")


def check_runs(config: Mapping[str, Any], name: str, device: torch.device | None = None) -> None:
    """Raise InputError, naming what is missing, where transformers cannot read these quantised weights here."""
    method = quantised_by(config)
    if method is None:
        return
    problem = f"{name} is quantised ({method}), which cannot be read here: "
    advice = "Take the model that it was made from, or a GGUF file of it."
    place = None if device is None else {"": str(device)}
    try:
        settings = AutoQuantizationConfig.from_dict(dict(config["quantization_config"]))
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(
            device_map=place, dtype=None, weights_only=True
        )
    except ImportError as error:
        raise InputError(f"{problem}{_line(error)}", f"Install what it names. {advice}") from error
    except Exception as error:  # whatever transformers, or the library of the method, makes of strange settings
        line = _line(error)
        missing = "it needs a GPU: " if _NO_GPU.search(line) and not torch.cuda.is_available() else ""
        raise InputError(f"{problem}{missing}{line}", advice) from error


def check_dtypes(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Raise InputError where quantised weights compute in another dtype than the rest of the model."""
    if not is_quantised(model):
        return
    own = {each.dtype for each in tensor_libraries(model)} - {dtype}
    if own:
        stored = str(own.pop()).removeprefix("torch.")
        raise InputError(
            f"the quantised weights of {name} compute in {stored}, not in {str(dtype).removeprefix('torch.')}.",
            f"Leave --dtype out, or give --dtype {stored}.",
        )


def _line(error: BaseException) -> str:
    """The first sentence or two of an error of another library, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
