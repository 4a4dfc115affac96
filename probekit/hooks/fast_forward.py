"""The same layers, quicker to call: for loops that run them one token at a time, where Python is most of the time.

The model itself is never touched. Each module without hooks gets a shadow: the same class, code and weights, but with
its children as plain attributes, so that calling one costs a function call. Four leaves take fewer steps to the same
result: a linear map (by the kernel for its size), the RMS norm (in float32, where the bits are the same), the rotation
by position (the same bits), and attention, which folds grouped queries into rows instead of repeating keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as modules
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from probekit.hooks.sites import is_hooked
from probekit.models.anatomy import Anatomy
from probekit.models.linear_kernels import product

FOLDED = "probekit-folded"


def fast_forward(parts: Anatomy) -> Anatomy:
    """`parts` with shadows of its layers and its norm.

    Modules that carry hooks, or whose forward was replaced, stay as they are, with everything in them: hooks that are
    there beforehand fire as ever, with the modules that they were registered on.
    """
    if _hooked_globally():
        return parts
    layers: Any = [_shadow(layer) for layer in parts.layers]
    norm: Any = _shadow(parts.norm)
    return replace(parts, layers=layers, norm=norm)


def fast_head(parts: Anatomy) -> Callable[[Tensor], Tensor]:
    """The same of the head: (..., width) -> (..., vocabulary)."""
    return parts.head if _hooked_globally() else _shadow(parts.head)


def _hooked_globally() -> bool:
    return bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)


def _shadow(module: nn.Module) -> Callable[..., Any]:
    if is_hooked(module):
        return module
    if type(module) is nn.Linear:
        return product(module.weight, module.bias)
    if type(module) is LlamaRMSNorm and module.weight.dtype == torch.float32:
        scale, epsilon, shape = module.weight, module.variance_epsilon, tuple(module.weight.shape)
        return lambda inputs: torch.rms_norm(inputs, shape, scale, epsilon)
    shadow = object.__new__(type(module))
    shadow.__dict__.update(module.__dict__)
    shadow.__dict__.update(module._parameters)
    shadow.__dict__.update((name, child and _shadow(child)) for name, child in module._modules.items())
    if type(module) is LlamaAttention:
        if module.config._attn_implementation == "sdpa":
            shadow.__dict__["config"] = _Folded(module.config)
        return MethodType(_rotating(type(module).forward), shadow)
    return shadow.forward


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`, queries and keys in one go: x cos + roll(x) (-sin, sin).

    query, key: (rows, heads, tokens, head width); cos, sin: (rows or 1, tokens, head width).
    """
    signed = _once(sin, "signed", _negate_first_half).unsqueeze(unsqueeze_dim)
    both = torch.cat([query, key], unsqueeze_dim)
    both = both * cos.unsqueeze(unsqueeze_dim) + both.roll(both.shape[-1] // 2, -1) * signed
    rotated, rotated_key = both.split([query.shape[unsqueeze_dim], key.shape[unsqueeze_dim]], unsqueeze_dim)
    return rotated, rotated_key


def _negate_first_half(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


@cache
def _rotating(forward: Any) -> Any:
    """The same code of an attention's forward, which finds `rotate` where it looks up transformers' function."""
    if not isinstance(forward, FunctionType):
        return forward
    names = forward.__globals__ | {"apply_rotary_pos_emb": rotate}
    found = FunctionType(forward.__code__, names, None, forward.__defaults__, forward.__closure__)
    found.__kwdefaults__ = forward.__kwdefaults__
    return found


class _Folded:
    """A model's configuration, with our attention chosen; the configuration itself stays as it is."""

    _attn_implementation = FOLDED

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention behind transformers' interface: the queries that share a key/value head stand as rows of one product.

    query: (rows, heads, tokens, head width); key, value: (rows, key-value heads, slots, head width);
    attention_mask: additive, (rows or 1, 1, tokens, slots), or None: one token that sees all, or causal from slot 0.
    Returns (rows, tokens, heads, head width).
    """
    rows, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    attention = functional.scaled_dot_product_attention
    if groups == 1 or (attention_mask is None and tokens > 1):
        causal = attention_mask is None and tokens > 1
        mixed = attention(query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=groups > 1)
    else:
        folded = query.reshape(rows, key.shape[1], groups * tokens, width)
        mask = attention_mask
        if mask is not None:
            mask = _once(mask, "folded", lambda mask: mask.repeat(1, 1, groups, 1))
        mixed = attention(folded, key, value, mask, scale=scaling)
        mixed = mixed.view(rows, heads, tokens, width)
    return mixed.transpose(1, 2), None


def _once(tensor: Tensor, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What `make` makes of a tensor, kept with it: all layers of a pass share both."""
    made = getattr(tensor, name, None)
    if made is None:
        made = make(tensor)
        setattr(tensor, name, made)
    return made


AttentionInterface.register(FOLDED, attend)
