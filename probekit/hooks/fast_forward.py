"""The same layers with less overhead per call, for loops that run them one token at a time.

The model itself is never touched. Each module without hooks gets a shallow copy: the same class, code and weights, but
with its children as plain attributes, so that calling one costs a function call instead of `nn.Module.__call__`.
Three parts of a Llama take fewer steps to the same result: a linear map (by the kernel for its size), the RMS norm (in
float32; of a few rows the last bits may differ), and attention, which rotates queries and keys in one go (the same
bits) and stacks the queries that share a key/value head instead of repeating keys and values. Other families keep their
own norms and attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from probekit.hooks.attention import attend, once, rows_apart, with_rows_apart
from probekit.hooks.sites import is_hooked
from probekit.models.anatomy import Anatomy
from probekit.models.linear_kernels import product
from probekit.models.norm_kernels import rms_norm
from probekit.models.states import has_plain_weight


def fast_forward(parts: Anatomy, *, apart: bool = False) -> Anatomy:
    """`parts` with fast copies of its layers and its norm.

    apart: whether attention takes one row at a time, so that a row has the same bits in any place of a batch.
    Modules that carry hooks, or whose forward was replaced, stay as they are, with everything in them: hooks that are
    there beforehand fire as ever, with the modules that they were registered on.
    """
    if _hooked_globally():
        return parts
    layers: Any = [_fast(layer, apart) for layer in parts.layers]
    norm: Any = _fast(parts.norm)
    return replace(parts, layers=layers, norm=norm, sizes=None)


def fast_head(parts: Anatomy) -> Callable[[Tensor], Tensor]:
    """A fast copy of the head: (..., width) -> (..., vocabulary)."""
    return parts.head if _hooked_globally() else _fast(parts.head)


def _hooked_globally() -> bool:
    return bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)


def _fast(module: nn.Module, apart: bool = False) -> Callable[..., Any]:
    if is_hooked(module) or not is_known(module):
        return module
    if type(module) is nn.Linear:
        return product(module.weight, module.bias) if has_plain_weight(module) else module
    if type(module) is LlamaRMSNorm and has_plain_weight(module) and module.weight.dtype == torch.float32:
        return rms_norm(module.weight, module.variance_epsilon)
    if type(module) is LlamaAttention and module.config._attn_implementation == "sdpa":
        return _fast_attention(module, partial(rows_apart, attend) if apart else attend)
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__.update(module._parameters)
    copied.__dict__.update((name, child and _fast(child, apart)) for name, child in module._modules.items())
    if apart and hasattr(getattr(module, "config", None), "_attn_implementation"):
        copied.__dict__["config"] = with_rows_apart(module.config)
    return copied.forward


def is_known(module: nn.Module) -> bool:
    """Whether a module's forward calls its children and reads its weights, and does nothing else with them.

    True for linear maps and for what transformers' own models are made of, with the forward that they came with;
    adapters, quantised or parametrised maps, a class whose forward was patched and whatever a user put in keep their
    own call, with everything in them.
    """
    kind = type(module)
    ours = kind in (nn.Linear, nn.SiLU) or kind.__module__.startswith(
        ("transformers.models.", "transformers.activations")
    )
    home = getattr(kind.forward, "__module__", "")
    return ours and home in {each.__module__ for each in kind.__mro__} and not hasattr(module, "parametrizations")


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`, queries and keys in one go: x cos + roll(x) (-sin, sin).

    query, key: (rows, heads, tokens, head width); cos, sin: (rows or 1, tokens, head width).
    """
    heads, width = query.shape[unsqueeze_dim], query.shape[-1]
    plain = once(cos, f"between {unsqueeze_dim}", lambda cos: cos.unsqueeze(unsqueeze_dim))
    signed = once(sin, f"signed {unsqueeze_dim}", lambda sin: _negate_first_half(sin).unsqueeze(unsqueeze_dim))
    both = torch.cat([query, key], unsqueeze_dim)
    both = both * plain + both.roll(width // 2, -1) * signed
    return both.narrow(unsqueeze_dim, 0, heads), both.narrow(unsqueeze_dim, heads, both.shape[unsqueeze_dim] - heads)


def _negate_first_half(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def _fast_attention(module: LlamaAttention, attention: Callable[..., Any]) -> Callable[..., tuple[Tensor, None]]:
    """The forward of a Llama's attention with `rotate` and `attend`: (rows, tokens, width), and no weights."""
    queries, keys, values, outputs = map(_fast, (module.q_proj, module.k_proj, module.v_proj, module.o_proj))
    width, scaling, index = module.head_dim, module.scaling, module.layer_idx

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # the same, from transformers 5.24 on
        **_: Any,
    ) -> tuple[Tensor, None]:
        rows = hidden_states.shape[:-1]
        query, key, value = queries(hidden_states), keys(hidden_states), values(hidden_states)
        if rows[-1] == 1:  # heads before tokens, without a step
            query, key, value = (each.view(*rows[:-1], -1, 1, width) for each in (query, key, value))
        else:
            query, key, value = (each.view(*rows, -1, width).transpose(1, 2) for each in (query, key, value))
        query, key = rotate(query, key, *position_embeddings)
        held = past_key_values if cache is None else cache
        if held is not None:
            key, value = held.update(key, value, index)
        mixed = attention(module, query, key, value, attention_mask, scaling)[0]
        return outputs(mixed.reshape(*rows, -1).contiguous()), None

    return forward
