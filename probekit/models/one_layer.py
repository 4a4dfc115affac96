"""A model of one layer, of a loaded model's class and configuration, that runs once and notes who was called with what.

It is made on torch's meta device, which computes shapes and no numbers: a model of any size costs some 30 ms.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from probekit.models.family import CACHE, Family

TOKENS, SLOTS = 3, 7  # of the pass; and of the cache that it sees, more than it writes


class OneLayer:
    """A model of one layer, of a given model's class and configuration, and what its parts did in a pass each."""

    def __init__(self, model: Any, family: Family) -> None:
        self.family, self._kind = family, type(model)
        self.config = copy.deepcopy(model.config)
        self.config.num_hidden_layers = 1
        if self.config._attn_implementation != "sdpa":
            self.config._attn_implementation = "eager"

    @cached_property
    def model(self) -> Any:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # some draw a number for their beginning
            return self._kind(self.config).to(torch.bfloat16).eval()

    @property
    def decoder(self) -> Any:
        return getattr(self.model, self.family.names.decoder)

    def part(self, name: str) -> Any:
        return getattr(self.decoder, getattr(self.family.names, name))

    @cached_property
    def rotated(self) -> tuple[Tensor, Tensor]:
        """What the family's call of the rotary embedding gives; it alone lies on the CPU, for it looks at positions."""
        rotary = self.part("rotary").to_empty(device="cpu")
        for buffer in rotary.buffers():
            buffer.zero_()
        kind = self.family.kinds(self.config)[0]
        return self.family.rotary(rotary, torch.zeros(1, TOKENS, 1), torch.arange(TOKENS)[None], kind)

    @cached_property
    def whole(self) -> Pass:
        """A pass of the whole model on token ids, with a cache and an additive mask, and one of its decoder."""
        _ = self.rotated
        names, decoder = self.family.names, self.decoder
        layers, norm = self.part("layers"), _Noted(self.part("norm"))
        layer = layers[0] = _Noted(layers[0])
        setattr(decoder, names.norm, norm)
        setattr(decoder, names.rotary, _NotedRotary(self.part("rotary")))
        cache, mask = DynamicCache(config=self.config), _meta(1, 1, TOKENS, TOKENS)
        given = {"attention_mask": mask, CACHE: cache, "use_cache": True}
        with torch.no_grad():
            output = self.model(input_ids=_ids(), logits_to_keep=1, return_dict=True, **given)
            held: Any = cache.layers[0]
            cached = held.keys, cache.get_seq_length()
            embedded = self.part("embedding")(_ids())
            last = decoder(inputs_embeds=embedded, position_ids=_ids(), attention_mask=mask, use_cache=False)
        return Pass(output.logits, last.last_hidden_state, mask, cached, layer.last, norm.last)

    @cached_property
    def alone(self) -> tuple[Any, list[tuple[Any, ...]], bool]:
        """The layer called as the engine calls it: its output, or the error; what its cache was given; whether the
        instance's own forward ran."""
        layer, cache = self.part("layers")[0], _NotedCache()
        layer, ran = getattr(layer, "inner", layer), []
        runs = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            ran.append(True)
            return runs(*args, **kwargs)

        vars(layer)["forward"] = forward
        inputs = {
            "attention_mask": _meta(1, 1, TOKENS, SLOTS),
            "position_ids": _ids(),
            "position_embeddings": tuple(_meta(*each.shape) for each in self.rotated),
            self.family.names.cache: cache,
            "use_cache": True,
        }
        try:
            with torch.no_grad():
                output = layer(_meta(1, TOKENS, self.width), **inputs)
        except Exception as error:  # which fact that breaks is seen by what happened before
            output = error
        return output, cache.calls, bool(ran)

    @property
    def width(self) -> int:
        return self.part("embedding").embedding_dim

    @property
    def cached_shape(self) -> tuple[int, int, int, int]:
        """Of the keys of the pass, by the configuration: (rows, key-value heads, tokens, head width)."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 1, heads, TOKENS, head_width


class Call(NamedTuple):
    """A call of a module."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


class Pass(NamedTuple):
    """What came of a pass. cached: keys, and how many tokens the cache says it holds. layer, norm: their last calls."""

    logits: Tensor
    last: Tensor
    mask: Tensor
    cached: tuple[Tensor, int]
    layer: Call
    norm: Call


class _Noted(nn.Module):
    """Stands in a module's place and notes its calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, list[Call]()

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    @property
    def last(self) -> Call:
        return self.calls[-1] if self.calls else Call((), {}, None)

    def forward(self, *args: Any, **named: Any) -> Any:
        output = self.inner(*args, **named)
        self.calls.append(Call(args, named, output))
        return output


class _NotedRotary(_Noted):
    """A rotary embedding on the CPU among parts that are on the meta device."""

    def forward(self, *args: Any, **named: Any) -> Any:
        args = tuple(map(_here, args))
        found = self.inner(*args, **{name: _here(value) for name, value in named.items()})
        return tuple(each.to("meta", torch.bfloat16) for each in found)


class _NotedCache(Cache):
    """Gives back more slots than it was given, as a cache does that holds a text already."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.calls: list[tuple[Any, ...]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((key_states, value_states, layer_idx))
        return tuple(_meta(*each.shape[:2], SLOTS, each.shape[3]) for each in (key_states, value_states))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return SLOTS - TOKENS


def _meta(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device="meta")


def _ids() -> Tensor:
    return torch.zeros(1, TOKENS, dtype=torch.long, device="meta")


def _here(value: Any) -> Any:
    return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) else value


def first_of(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output
