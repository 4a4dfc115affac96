"""The states that models in memory are in: what was put around them, what their weights are made of, their hash.

Libraries wrap a model (peft, torch.compile, data parallelism), swap its weights for tensors of their own (torchao,
bitsandbytes, torch's dynamic quantisation), or keep them elsewhere until they are needed (accelerate). None of these
libraries is imported here: their objects are known by what they offer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

MEMORY = "memory-sampled:"
SAMPLED = 4096  # numbers of each tensor that a hash of weights in memory reads


def unwrapped(model: Any) -> Any:
    """The model inside what `torch.compile`, `peft` and data parallelism put around it; anything else as it is."""
    while isinstance(model, nn.Module):
        library, parts = type(model).__module__, model._modules
        if "_orig_mod" in parts:
            model = parts["_orig_mod"]
        elif library.startswith("torch.nn.parallel."):
            model = parts["module"]
        elif library.startswith("peft.") and (parts.get("base_model") or parts.get("model")) is not None:
            model = parts.get("base_model") or parts["model"]
        else:
            return model
    return model


def prompt_learning(model: Any) -> str | None:
    """The kind of a peft adapter that puts learned states before the text (prompt or prefix tuning); else None."""
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if not type(part).__module__.startswith("peft."):
            continue
        config: Any = getattr(part, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            return str(config.peft_type).removeprefix("PeftType.")
    return None


def in_training(model: nn.Module) -> str | None:
    """The name of a module that behaves as in training: the model itself, or a dropout in it. None: none does."""
    if model.training:
        return "the model"
    for name, part in model.named_modules():
        if part.training and isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return name
    return None


def without_weights(model: nn.Module) -> str | None:
    """The name of a tensor that is nowhere: on torch's meta device, and no hook of accelerate's fetches it."""
    hooked = {name for name, part in model.named_modules() if hasattr(part, "_hf_hook")}
    for name, parameter in model.named_parameters():
        pieces = name.split(".")
        owners = {".".join(pieces[:depth]) for depth in range(len(pieces))}
        if parameter.device.type == "meta" and not owners & hooked:
            return name
    return None


def has_plain_weight(module: nn.Module) -> bool:
    """Whether a module's weight is an ordinary tensor at hand: no other class of tensor, no function of others.

    Not so where hooks, or a forward of the instance's own, come between a call and the weight.
    """
    weight: Any = module._parameters.get("weight")
    between = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type != "meta" and weight.is_floating_point()
    return plain and not between


def only_placed(module: nn.Module) -> bool:
    """Whether all that was put around a module's forward is accelerate's hook that moves inputs and weights."""
    hook, forward = getattr(module, "_hf_hook", None), module.__dict__.get("forward")
    around = getattr(getattr(forward, "func", None), "__module__", "")
    return _moves(hook) and (forward is None or around == "accelerate.hooks")


def _moves(hook: Any) -> bool:
    if type(hook).__name__ == "SequentialHook":
        return all(map(_moves, hook.hooks))
    return type(hook).__module__ == "accelerate.hooks" and type(hook).__name__ == "AlignDevicesHook"


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: that of its weight, or where accelerate brings it before it is called."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        place = getattr(each, "execution_device", None)
        if place is not None:
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return next(module.parameters()).device


def devices_of(model: nn.Module) -> set[torch.device]:
    """All devices that parts of a model compute on."""
    owners = (part for part in model.modules() if any(True for _ in part.parameters(recurse=False)))
    return {device_of(part) for part in owners}


def count_numbers(module: nn.Module) -> int:
    """Distinct weights, as the model uses them: a packed one counts as what it stands for."""
    return sum(_logical(tensor) for tensor in _weights(module))


def count_bytes(module: nn.Module) -> int:
    """Bytes of a module's distinct weights as they are stored, scales and zero points with them."""
    return sum(stored.numel() * stored.element_size() for tensor in _weights(module) for stored in _stored(tensor))


def is_quantised(module: nn.Module) -> bool:
    """Whether some weights are stored otherwise than as the numbers that the model computes with."""
    return any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized for tensor in _weights(module))


def is_split(tensor: Any) -> bool:
    """Whether a weight is split over processes (a DTensor of torch's), each of which holds a part."""
    return hasattr(tensor, "device_mesh")


def tensor_libraries(module: nn.Module) -> list[Tensor]:
    """The weights that are tensors of a library's own (torchao's) and act as numbers of a dtype."""
    return [weight for weight in module.parameters() if hasattr(weight, "__tensor_flatten__")]


def _weights(module: nn.Module) -> Iterator[Any]:
    """Parameters, and what torch's quantised modules hold in their place; each once."""
    yield from module.parameters()
    for part in module.modules():
        packed = getattr(part, "_weight_bias", None)
        inside = any(hasattr(child, "_weight_bias") for child in part.children())  # which is then counted there
        if callable(packed) and not inside:
            yield from (tensor for tensor in packed() if tensor is not None)


def _logical(tensor: Any) -> int:
    shape = getattr(getattr(tensor, "quant_state", None), "shape", None)  # of bitsandbytes, whose bytes hold two
    return tensor.numel() if shape is None else torch.Size(shape).numel()


def _stored(tensor: Any) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor of a library is made of; one that is split over processes is one, whole."""
    if is_split(tensor):
        yield tensor
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _stored(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    scales = state.as_dict(packed=True).values() if state is not None else [getattr(tensor, "SCB", None)]
    yield from (scale for scale in scales if isinstance(scale, Tensor))


def signature(model: nn.Module) -> str:
    """Which modules a model is made of, and the state of its adapters: cheap, to see whether either has changed."""
    parts = (f"{name} {type(part).__qualname__} {_adapters(part)}" for name, part in model.named_modules())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def hash_in_memory(model: nn.Module) -> str:
    """`memory-sampled:hex`: of every module its class and the state of its adapters, and of every tensor in it its
    name, shape, dtype, and some 4,096 evenly spaced numbers.

    No `state_dict` is made: bitsandbytes (0.50) writes into the weights while it makes one.
    """
    digest = hashlib.sha256()
    for name, part in model.named_modules():
        kind = type(part)
        digest.update(f"{name} {kind.__module__}.{kind.__qualname__} {_adapters(part)}\n".encode())
        with _at_hand(part):
            for key, tensor in sorted(_own(part).items()):
                for line in _described(f"{name}.{key}", tensor):
                    digest.update(line)
    return f"{MEMORY}{digest.hexdigest()}"


def _own(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters, buffers and packed weights, by name."""
    named = {**module._parameters, **module._buffers}
    packed = getattr(module, "_weight_bias", None)
    if callable(packed):
        named |= dict(zip(("packed weight", "packed bias"), packed(), strict=True))
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _at_hand(module: nn.Module) -> AbstractContextManager:
    """A context in which a module's own weights are here, wherever accelerate keeps them."""
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    return align_module_device(module) if any(each.device.type == "meta" for each in own) else nullcontext()


def _adapters(module: nn.Module) -> str:
    """Which adapters of a peft layer are active, merged and switched off, and how strongly they count."""
    if not type(module).__module__.startswith("peft."):
        return ""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return repr([getattr(module, name, None) for name in names])


def _described(name: str, tensor: Tensor) -> Iterator[bytes]:
    """Lines that name a tensor and sample its numbers."""
    if tensor.device.type == "meta":
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype} not at hand\n".encode()
        return
    if getattr(tensor, "quant_state", None) is not None:  # of bitsandbytes, which lays them out anew when it is called
        halves = torch.cat([tensor.detach().flatten() & 15, tensor.detach().flatten() >> 4])
        yield f"{name} {_logical(tensor)} {torch.bincount(halves.long(), minlength=16).tolist()}\n".encode()
        return
    for place, stored in enumerate(_stored(tensor.detach())):
        numbers, scale = stored, ""
        if stored.is_quantized:
            numbers, axes = stored.int_repr(), stored.qscheme() == torch.per_channel_affine
            scale = repr(stored.q_per_channel_scales().tolist() if axes else stored.q_scale())
        flat = numbers.reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)].to("cpu", torch.float64)
        yield f"{name} {place} {tuple(numbers.shape)} {numbers.dtype} {scale}\n".encode() + some.numpy().tobytes()
