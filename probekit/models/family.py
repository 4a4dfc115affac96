"""What makes a family of models different, declared once: everything else asks its family instead of knowing it.

A family is a description of a transformers causal decoder whose layers are called one after the other on a residual
stream. Its layers run as transformers wrote them; the description says what they are called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probekit.errors import InputError

FULL, SLIDING = "full_attention", "sliding_attention"
CACHE = "cache" if tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24) else "past_key_values"
"""The keyword that models take their cache by; renamed in transformers 5.24, which still takes the old one."""


def cache_in(inputs: Mapping[str, Any]) -> Any:
    """The cache that a model is called with, by either name; None where there is none."""
    given = inputs.get(CACHE)
    return inputs.get("past_key_values") if given is None else given


class Names(NamedTuple):
    """What a model calls its parts: `decoder` and `head` are its own attributes, the others the decoder's.

    cache: the keyword that its layers take their cache by.
    """

    decoder: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str = "rotary_emb"
    head: str = "lm_head"
    cache: str = CACHE


class LayerKind(NamedTuple):
    """What a layer is called with. Layers of one kind share masks and rotary embeddings.

    name: as `config.layer_types` has it. window: the most tokens that a token sees, itself among them; None: all.
    """

    name: str
    window: int | None = None


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """By `config.layer_types` and `config.sliding_window`, as most of transformers' models do."""
    names = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    if strange := sorted(set(names) - {FULL, SLIDING}):
        raise InputError(
            f"this model has layers of the kind {strange[0]!r}; expected {FULL!r} and {SLIDING!r} only.",
            "Its family knows no others.",
        )
    return tuple(LayerKind(name, _window(config) if name == SLIDING else None) for name in names)


def one_window(config: Any) -> tuple[LayerKind, ...]:
    """One window for every layer, where the configuration has one (Mistral, Phi-3)."""
    window = _window(config)
    kind = LayerKind(FULL) if window is None else LayerKind(SLIDING, window)
    return (kind,) * config.num_hidden_layers


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    if window is not None and window < 2:
        raise InputError(
            f"the sliding window of this model is {window}; expected 2 tokens or more, or none.",
            "transformers' own cache does not keep to it: the model says something else with a cache than without.",
        )
    return window


def shared_rotary(rotary: Any, like: Tensor, positions: Tensor, kind: LayerKind) -> tuple[Tensor, Tensor]:
    """One rotary embedding for every layer."""
    return rotary(like, positions)


def rotary_by_kind(rotary: Any, like: Tensor, positions: Tensor, kind: LayerKind) -> tuple[Tensor, Tensor]:
    """A rotary embedding for each kind of layer (Gemma 3)."""
    return rotary(like, positions, kind.name)


class Branches(NamedTuple):
    """The modules of a layer whose outputs are added to the residual stream: paths within it.

    A norm behind a branch belongs to it, so that h[l+1] = h[l] + attention + mlp, each times the branch factor.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"


def norm_weight(norm: Any) -> Tensor:
    """The gain of a norm that multiplies with its weight."""
    return norm.weight.float()


def one_plus_weight(norm: Any) -> Tensor:
    """The gain of a norm that multiplies with 1 + its weight (Gemma)."""
    return 1.0 + norm.weight.float()


def no_weight(norm: Any) -> Tensor:
    """The gain of a norm without parameters (OLMo)."""
    return torch.ones(())  # without dimensions it is at home on every device


def _no_number(config: Any) -> float | None:
    return None


@dataclass(frozen=True)
class Family:
    """One family of models.

    Parameters
    ----------
    model_type: as in `config.json`.
    names: what its models call their parts.
    kinds: config -> the kind of each layer.
    rotary: (module, like, positions, kind) -> (cos, sin), each (rows, tokens, head width), of a kind of layer.
    embedding_factor: config -> what the model multiplies embeddings with outside its embedding module; None: nothing.
    logit_factor, logit_divisor: config -> what it multiplies the head's products with, or divides them by; above 0;
        None: nothing.
    logit_cap: config -> c of c tanh(logit / c), after those; None: none.
    branches: the modules whose outputs a layer adds to the stream; None: not known.
    branch_factor: config -> what it multiplies them with before it adds them; None: nothing.
    gain: final norm -> (width,) float32, or one number, what it multiplies h / rms(h) with.
    decodes: whether the engine may run its layers; if not, its models are traced and read through their own forward.
    """

    model_type: str
    names: Names = Names()  # noqa: RUF009 - a tuple
    kinds: Callable[[Any], Sequence[LayerKind]] = layer_kinds
    rotary: Callable[[Any, Tensor, Tensor, LayerKind], tuple[Tensor, Tensor]] = shared_rotary
    embedding_factor: Callable[[Any], float | None] = _no_number
    logit_factor: Callable[[Any], float | None] = _no_number
    logit_divisor: Callable[[Any], float | None] = _no_number
    logit_cap: Callable[[Any], float | None] = _no_number
    branches: Branches | None = Branches()  # noqa: RUF009 - a tuple
    branch_factor: Callable[[Any], float | None] = _no_number
    gain: Callable[[Any], Tensor] = norm_weight
    decodes: bool = True

    def changes_logits(self, config: Any) -> bool:
        """Whether logits are anything but the head's products."""
        return any(change(config) is not None for change in (self.logit_factor, self.logit_divisor, self.logit_cap))

    def embed(self, parts: Any, tokens: Tensor) -> Tensor:
        """(rows, tokens) -> the input of the first layer, (rows, tokens, width)."""
        embedded = parts.embedding(tokens)
        factor = self.embedding_factor(parts.config)
        return embedded if factor is None else embedded * factor

    def logits(self, parts: Any, products: Tensor) -> Tensor:
        """What the model makes of the head's products, (..., vocabulary), in its own order of operations."""
        config = parts.config
        factor, divisor, cap = (change(config) for change in (self.logit_factor, self.logit_divisor, self.logit_cap))
        if factor is not None:
            products = products * factor
        if divisor is not None:
            products = products / divisor
        if cap is not None:
            products = torch.tanh(products / cap) * cap
        return products

    def mask(self, kind: LayerKind, positions: Tensor, visible: int, dtype: torch.dtype) -> Tensor:
        """Additive: a token at position s sees slots 0..s, or the last `window` of them.

        positions: (rows, tokens). Returns (rows, 1, tokens, visible).
        """
        slots = torch.arange(visible, device=positions.device)
        at = positions[:, None, :, None]
        hidden = at < slots
        if kind.window is not None:
            hidden = hidden | (slots <= at - kind.window)
        return hidden.to(dtype).mul_(torch.finfo(dtype).min)
