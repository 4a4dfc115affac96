"""Decoder layers by Triton kernels (`models.layer_kernels`, `.attention_kernel`): ten launches for some 35 of torch's.

    norm, query/key/value product, rotary and cache write, attention (two), output product,
    residual and norm, gate/up product, activation, down product

The model is left as it is: the weights of query, key and value, and of gate and up, are copied into one matrix each,
and copied again by `refresh`. Only layers whose classes are known to the letter are read that way; any other model,
and any with hooks, keeps its own layers. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from probekit.hooks.fast_forward import is_known
from probekit.hooks.sites import is_hooked
from probekit.models.anatomy import Anatomy
from probekit.models.family import LayerKind
from probekit.models.states import has_plain_weight


@dataclass(frozen=True)
class Reading:
    """What the layers of a family do, beside what every Llama does.

    one_plus: norms multiply with 1 + their weight. behind: norms stand behind attention and MLP too.
    normed_heads: queries and keys have norms of their own. soft_cap: attention caps its scores.
    """

    one_plus: bool = False
    behind: bool = False
    normed_heads: bool = False
    soft_cap: bool = False


READINGS: Mapping[str, Reading] = {
    "Llama": Reading(),
    "Mistral": Reading(),
    "Qwen2": Reading(),
    "Qwen3": Reading(normed_heads=True),
    "Gemma2": Reading(one_plus=True, behind=True, soft_cap=True),
    "Gemma3": Reading(one_plus=True, behind=True, normed_heads=True),
}
"""By what transformers' classes are called: LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm."""
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' name: the kernel's
Map = tuple[Tensor, Tensor | None]  # weight and bias


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """The weights of one layer. Norms are their weights; None where there is none."""

    qkv: Map
    output: Map
    gate_up: Map
    down: Map
    before_attention: Tensor
    behind_attention: Tensor | None
    before_mlp: Tensor
    behind_mlp: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    epsilon: float
    scale: float
    soft_cap: float | None
    activation: str
    kind: LayerKind


class FusedLayers:
    """The layers and the final norm of a model, for passes of a few tokens over a `PositionCache`.

    rotary: {kind: (cos, sin), (1, slots, head width)}.
    """

    def __init__(
        self,
        parts: Anatomy,
        reading: Reading,
        kinds: Sequence[LayerKind],
        rotary: Mapping[LayerKind, tuple[Tensor, Tensor]],
    ) -> None:
        self._one_plus = reading.one_plus
        self._sources: list[tuple[Tensor, Sequence[Tensor]]] = []
        self._rotary = {kind: (cos[0].contiguous(), sin[0].contiguous()) for kind, (cos, sin) in rotary.items()}
        self._layers = [self._read(layer, reading, kind) for layer, kind in zip(parts.layers, kinds, strict=True)]
        norm: Any = parts.norm
        self._last: Tensor = norm.weight
        self._epsilon = _epsilon(norm)

    def _read(self, layer: Any, reading: Reading, kind: LayerKind) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        before_mlp = layer.pre_feedforward_layernorm if reading.behind else layer.post_attention_layernorm
        activation = next(name for known, name in ACTIVATIONS.items() if type(mlp.act_fn) is type(ACT2FN[known]))
        return FusedLayer(
            qkv=self._one_map(attention.q_proj, attention.k_proj, attention.v_proj),
            output=(attention.o_proj.weight, attention.o_proj.bias),
            gate_up=self._one_map(mlp.gate_proj, mlp.up_proj),
            down=(mlp.down_proj.weight, mlp.down_proj.bias),
            before_attention=layer.input_layernorm.weight,
            behind_attention=layer.post_attention_layernorm.weight if reading.behind else None,
            before_mlp=before_mlp.weight,
            behind_mlp=layer.post_feedforward_layernorm.weight if reading.behind else None,
            query_norm=attention.q_norm.weight if reading.normed_heads else None,
            key_norm=attention.k_norm.weight if reading.normed_heads else None,
            epsilon=_epsilon(layer.input_layernorm),
            scale=float(attention.scaling),
            soft_cap=attention.attn_logit_softcapping if reading.soft_cap else None,
            activation=activation,
            kind=kind,
        )

    def _one_map(self, *maps: nn.Linear) -> Map:
        biases = [each.bias for each in maps if each.bias is not None]
        return self._copied([each.weight for each in maps]), self._copied(biases) if biases else None

    def _copied(self, tensors: Sequence[Tensor]) -> Tensor:
        made = torch.cat([each.detach() for each in tensors])
        self._sources.append((made, tensors))
        return made

    def refresh(self) -> None:
        """Copy the model's weights again: they may have changed in their place."""
        for made, tensors in self._sources:
            torch.cat([each.detach() for each in tensors], out=made)

    def run(
        self, residual: Tensor, positions: Tensor, visible: int, cache: Any, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """Layers first..last-1 on (rows, tokens, width): the residual behind them, and what the final norm makes of it.

        positions: (rows, tokens) int64 on the device, below `visible`. first < last.
        """
        kernels = torch.ops.probekit
        added: Tensor | None = None
        behind: Tensor | None = None
        for index in range(first, last):
            layer = self._layers[index]
            cos, sin = self._rotary[layer.kind]
            keys, values = cache.layer(index)
            setting = layer.epsilon, self._one_plus
            if added is None:
                normed = kernels.norm(residual, layer.before_attention, *setting)
            else:
                residual, normed = kernels.add_norm(residual, added, behind, layer.before_attention, *setting)
            qkv = functional.linear(normed, *layer.qkv)
            kernels.rotate_and_write(qkv, keys, values, cos, sin, positions, layer.query_norm, layer.key_norm, *setting)
            partial = kernels.attend_in_splits(
                qkv, keys, values, positions, visible, layer.scale, layer.kind.window or 0, layer.soft_cap or 0.0
            )
            mixed = kernels.put_together(*partial, positions, qkv, keys.shape[1])
            added = functional.linear(mixed, *layer.output)
            residual, normed = kernels.add_norm(residual, added, layer.behind_attention, layer.before_mlp, *setting)
            gate_up = functional.linear(normed, *layer.gate_up)
            added = functional.linear(kernels.activate(gate_up, layer.activation), *layer.down)
            behind = layer.behind_mlp
        return kernels.add_norm(residual, added, behind, self._last, self._epsilon, self._one_plus)

    def norm(self, residual: Tensor) -> Tensor:
        """The final norm. (..., width) -> (..., width)."""
        return torch.ops.probekit.norm(residual.contiguous(), self._last, self._epsilon, self._one_plus)


def fused_layers(
    parts: Anatomy, kinds: Sequence[LayerKind], rotary: Mapping[LayerKind, tuple[Tensor, Tensor]]
) -> FusedLayers | None:
    """The model's layers by fused kernels; None where it is not known to the letter, or Triton is not installed."""
    reading = reading_of(parts)
    if reading is None or any(cos.shape[-1] != parts.head_dim for cos, _ in rotary.values()):
        return None
    import probekit.models.attention_kernel
    import probekit.models.layer_kernels  # noqa: F401 - their operations

    return FusedLayers(parts, reading, kinds, rotary)


def fused_head(parts: Anatomy) -> Callable[[Tensor], Tensor] | None:
    """States -> the argmax of the head's products; None where the head is anything but a plain linear map."""
    head: Any = parts.head
    if type(head) is not nn.Linear or not has_plain_weight(head) or head.bias is not None:
        return None
    if parts.family.changes_logits(parts.config):
        return None
    from probekit.models.head_kernel import best_tokens

    return lambda states: best_tokens(states.contiguous(), head.weight)


def copied_bytes(parts: Anatomy) -> int:
    """Bytes that the copies of `fused_layers` take."""
    total = 0
    layers: Any = parts.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for each in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            total += sum(weight.numel() * weight.element_size() for weight in each.parameters())
    return total


def reading_of(parts: Anatomy) -> Reading | None:
    """How the layers of a model are to be read; None where that is not known to the letter."""
    if find_spec("triton") is None or any(map(is_hooked, parts.model.modules())):
        return None
    names = {type(layer).__name__.removesuffix("DecoderLayer") for layer in parts.layers}
    name = names.pop() if len(names) == 1 else ""
    reading = READINGS.get(name)
    if reading is None or parts.split_over > 1 or type(parts.norm).__name__ != f"{name}RMSNorm":
        return None
    whole = all(_is_read(layer, name, reading, parts.model.config) for layer in parts.layers)
    return reading if whole and is_known(parts.norm) and has_plain_weight(parts.norm) else None


def _is_read(layer: Any, name: str, reading: Reading, config: Any) -> bool:
    """Whether a layer is made of the parts that its family has, each with the forward that it came with."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if reading.behind:
        norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    if reading.normed_heads:
        norms += [attention.q_norm, attention.k_norm]
    maps = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    maps += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    known = {f"{name}{part}" for part in ("DecoderLayer", "Attention", "MLP", "RMSNorm")}
    parts = {layer, attention, mlp, *norms}
    if {type(part).__name__ for part in parts} != known or not all(map(is_known, parts)):
        return False
    if not all(type(each) is nn.Linear and has_plain_weight(each) for each in maps):
        return False
    if len({each.bias is None for each in maps[:3]}) > 1 or len({each.bias is None for each in maps[4:6]}) > 1:
        return False
    if len({_epsilon(norm) for norm in norms}) > 1 or not all(map(has_plain_weight, norms)):
        return False
    if len({tensor.dtype for part in (*maps, *norms) for tensor in part.parameters()}) > 1:
        return False
    capped = getattr(attention, "attn_logit_softcapping", None) is not None and reading.soft_cap
    plain = not capped or config._attn_implementation == "eager"  # torch's own attention knows no cap
    active = any(type(mlp.act_fn) is type(ACT2FN[known]) for known in ACTIVATIONS)
    return plain and active and attention.is_causal and attention.head_dim % 2 == 0


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
