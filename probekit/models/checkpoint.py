"""The files of a checkpoint: which there are, whether they are whole, and their weights as a model.

Weights come from safetensors or GGUF only, never from a pickle, and no code that comes with a checkpoint is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from probekit.errors import InputError
from probekit.models import families
from probekit.models.configuration import check_configuration, check_depth
from probekit.models.families import FAMILIES
from probekit.models.placement import DTYPES, check_device_name, check_dtype_name
from probekit.models.quantised import check_dtypes, check_runs, quantised_by
from probekit.models.weight_files import config_of, weight_files

_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Source:
    """A checkpoint found on this machine, checked, its weights not read yet."""

    folder: Path
    gguf: str | None
    name: str
    reference: str
    revision: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / self.gguf if self.gguf else self.folder


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The torch dtype of that name, or InputError with the names that there are."""
    return getattr(torch, check_dtype_name(dtype))


def check_device(device: torch.device | str) -> torch.device:
    """The torch device of that name, or InputError where this machine has none such."""
    name = check_device_name(device)
    kind, _, index = name.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:  # of the name: torch takes its number modulo 65,536
            there = f"this machine has {count}" if count else "this machine has none that torch can use"
            raise InputError(f"CUDA device {name!r} is not there: {there}.", "Use --device cpu.")
    return torch.device(name)


def check_folder(source: Source) -> Source:
    folder = source.folder
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        if ggufs:
            raise InputError(f"{folder} holds GGUF files: {', '.join(ggufs)}.", "Give the path of one of them.")
        raise InputError(f"{folder} holds no model: it has no config.json.")
    if (folder / "adapter_config.json").is_file():  # transformers would load both
        raise InputError(
            f"{folder} holds a model and an adapter; which of them is meant is not said.",
            "Put adapter_config.json and its weights into a folder of their own, and give that with --adapter.",
        )
    config = config_of(folder)
    check_configuration(config, folder / "config.json")
    check_family(config, source.name, decoded=False)
    check_runs(config, source.name)
    weights = weight_files(folder)
    if missing := [path.name for path in weights if not path.is_file()]:
        raise InputError(f"{folder} lacks weight files that its index names: {', '.join(missing)}.")
    check_depth(config, weights, folder / "config.json")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"{folder} holds no tokenizer: neither {' nor '.join(_TOKENIZER_FILES)} is there.",
            "Copy the tokenizer's files beside the weights.",
        )
    return source


def check_family(config: dict[str, Any], name: str, *, decoded: bool = True) -> None:
    """Refuse what is no causal decoder that transformers knows; unless `decoded` is False, also what is only traced."""
    family = config.get("model_type")
    classes = config.get("architectures") or []
    written = f" ({', '.join(classes)})" if classes else ""
    if classes and not any(entry.endswith(("ForCausalLM", "LMHeadModel")) for entry in classes):
        raise InputError(f"{name} is no causal decoder: it is a {family!r} model{written}.")
    if family not in FAMILIES and (decoded or (why := _not_traced(config))):
        raise InputError(
            f"{name} is a {family!r} model{written}{'' if decoded else f', and {why}'}; probekit reads "
            f"{families.names()}.",
            "Take a model of one of these." if decoded else "Of other families it traces causal decoders.",
        )


def _not_traced(config: dict[str, Any]) -> str:
    """Why a model of an unknown family cannot even be traced; empty where it may."""
    family = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder"
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal language model of that type"
    made = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], None)
    if getattr(made, "_is_stateful", False):
        return "its layers carry a state from token to token"
    return ""


Deal = Callable[[Path, torch.dtype], dict[str, Any]]
"""How the model of a folder is dealt out over devices or processes, as arguments of `from_pretrained`."""


def read_folder(
    source: Source, device: torch.device, asked: torch.dtype | None, deal: Deal | None = None
) -> tuple[Any, Any, list[Path]]:
    files, config = weight_files(source.folder), config_of(source.folder)
    check_runs(config, source.name, device)
    with safe_open(files[0], framework="pt") as weights:
        stored = weights.get_slice(next(iter(weights.keys()))).get_dtype()
    dtype = asked or _own_dtype(config) or default_dtype(device, stored)
    tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    options = {} if deal is None else deal(source.folder, dtype)
    if not quantised_by(config):  # whose weights are packed
        _check_sizes(source)
    model = read_weights(source, device, dtype, **options)
    check_dtypes(model, source.name, dtype)
    return model, tokenizer, files


def _own_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """What a quantised model computes in, whatever the device: the scales of its weights are of that kind."""
    name = str(config.get("dtype") or config.get("torch_dtype"))
    return getattr(torch, name) if name in DTYPES and quantised_by(config) else None


def default_dtype(device: torch.device, stored: str) -> torch.dtype:
    """float32 on the CPU, else what the weights are `stored` in; bfloat16 for quantised ones."""
    return torch.float32 if device.type == "cpu" else _STORED_DTYPES.get(stored, torch.bfloat16)


def read_weights(source: Source, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    if device.type != "cpu" and not {"device_map", "distributed_config", "tp_plan"} & set(options):
        options["device_map"] = {"": device}  # straight to the device; with one device accelerate adds no hook
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except RuntimeError:  # which says that shapes differ, and not which
        if (unfit := _misfit(source.folder)) is not None:
            raise _unfit(source, unfit) from None
        raise
    model, report = loaded
    model.config.return_dict = True  # False, and transformers' own models do not find their parts' outputs (5.23)
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{source.path} lacks {len(missing)} of the model's weights, among them {missing[0]}.")
    strange = sorted(key for key in report["unexpected_keys"] if ".layers." in key and "rotary_emb" not in key)
    if strange:
        raise InputError(f"{source.path} holds weights that no model of its configuration has: {strange[0]}.")
    return model


class Misfit(NamedTuple):
    """A tensor whose shape in the files is another than in the model of their configuration."""

    name: str
    there: list[int]
    asked: list[int]


def _check_sizes(source: Source) -> None:
    """Refuse a configuration by which tensors are far larger than in the files, before the memory for them is taken."""
    unfit = _misfit(source.folder)
    if unfit is not None and math.prod(unfit.asked) > 4 * math.prod(unfit.there):
        raise _unfit(source, unfit)


def _unfit(source: Source, unfit: Misfit) -> InputError:
    what = f"{unfit.name} is {unfit.there}, where it asks for {unfit.asked}"
    return InputError(f"{source.path} does not fit its configuration: {what}.", "Fetch it again.")


def _misfit(folder: Path) -> Misfit | None:
    """The first one."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: list(weights.shape) for name, weights in model.state_dict().items()}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                there = weights.get_slice(name).get_shape()
                if shapes.get(name, there) != there:
                    return Misfit(name, there, shapes[name])
    return None


def first_line(error: BaseException) -> str:
    """The first line of what an error says, and the next where that one only introduces it (it ends in a colon)."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    taken = next((place for place, line in enumerate(lines) if not line.endswith(":")), 0) + 1
    return " ".join(lines[:taken])


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Raise InputError, which names the tensor, for weights that are NaN or infinite. where: the sentence's beginning.

    One pass over the weights, without memory of its own; what is stored otherwise than in floating point is left out.
    """
    for name, weights in model.named_parameters():
        if (
            type(weights.data) is not torch.Tensor
            or weights.device.type == "meta"  # on disk until it is called; the tracer's own check sees what it gives
            or weights.dtype not in _STORED_DTYPES.values()
            or not weights.numel()
        ):
            continue
        least, most = torch.aminmax(weights.detach())
        if not (torch.isfinite(least) and torch.isfinite(most)):
            raise InputError(f"{where} weights that are not finite (NaN or infinity): {name}.", "They are damaged.")
