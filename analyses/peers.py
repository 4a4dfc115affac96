"""The same job by other libraries, each in its own idiom, on its own copy of the model: the benchmarks' other side.

A peer runs a model, gives the residual stream that its lens reads, and turns a residual into logits. All of them
compute in the model's dtype and hold one layer's logits of the whole batch at a time, as their documentation shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from probekit.models.loaded import Loaded


class Peer(Protocol):
    """Another library, holding a model of its own."""

    def forward(self, ids: Tensor) -> Any:
        """One pass of the model as this library runs it, with the logits of the last place. ids: (texts, places)."""

    def states(self, ids: Tensor) -> list[Tensor]:
        """What `logits` reads, for layers 0..L: (texts, places, width) each."""

    def logits(self, state: Tensor, layer: int) -> Tensor:
        """(..., width) -> (..., vocabulary): final norm and head."""

    def argmax(self, ids: Tensor) -> Tensor:
        """The lens with nothing but its argmax: (layers + 1, texts, places)."""

    def generate(self, ids: Tensor, tokens: int) -> Tensor:
        """The greedy text with so many new tokens, none of which ends it: (texts, places + tokens)."""


class Transformers:
    """`output_hidden_states`, then the final norm and the head; the last hidden state is already normed."""

    def __init__(self, loaded: Loaded) -> None:
        self.model = copy.deepcopy(loaded.model)
        self.depth = loaded.depth

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids, use_cache=False, logits_to_keep=1)

    def states(self, ids: Tensor) -> list[Tensor]:
        return list(self.model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states)

    def logits(self, state: Tensor, layer: int) -> Tensor:
        return self.model.lm_head(state if layer == self.depth else self.model.model.norm(state))

    def argmax(self, ids: Tensor) -> Tensor:
        return torch.stack([self.logits(state, layer).argmax(-1) for layer, state in enumerate(self.states(ids))])

    def generate(self, ids: Tensor, tokens: int) -> Tensor:
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


class Nnsight:
    """A trace that reads each layer's output; the lens is computed inside of it, so that no residual is kept."""

    def __init__(self, loaded: Loaded) -> None:
        import nnsight

        self.save = nnsight.save
        self.model = nnsight.NNsight(copy.deepcopy(loaded.model))
        self.depth = loaded.depth

    def forward(self, ids: Tensor) -> Any:
        model, save = self.model, self.save
        with model.trace(ids, use_cache=False, logits_to_keep=1):
            last = save(model.lm_head.output)
        return last

    def states(self, ids: Tensor) -> list[Tensor]:
        model, save = self.model, self.save
        layers = model.model.layers
        with model.trace(ids, use_cache=False, logits_to_keep=1):
            read = save([layers[0].input, *(layer.output for layer in layers)])
        return read

    def logits(self, state: Tensor, layer: int) -> Tensor:
        return self.model._module.lm_head(self.model._module.model.norm(state))

    def argmax(self, ids: Tensor) -> Tensor:
        model, save = self.model, self.save
        layers, norm, head = model.model.layers, model.model.norm, model.lm_head
        with model.trace(ids, use_cache=False, logits_to_keep=1):
            found = save([head(norm(layers[0].input)).argmax(-1)])
            for layer in layers:
                found.append(head(norm(layer.output)).argmax(-1))
        return torch.stack(found)

    def generate(self, ids: Tensor, tokens: int) -> Tensor:
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return self.model._module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


class TransformerLens:
    """A bridge around the model: `run_with_cache` for the residuals, `accumulated_resid`, `ln_final` and `unembed`."""

    def __init__(self, loaded: Loaded) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(
            loaded.model.config._name_or_path or loaded.name,
            hf_model=copy.deepcopy(loaded.model),
            tokenizer=copy.deepcopy(loaded.tokenizer),
            device=loaded.device,
            dtype=loaded.dtype,
        )
        self.depth = loaded.depth
        self.names = [f"blocks.{layer}.hook_resid_pre" for layer in range(self.depth)]
        self.names.append(f"blocks.{self.depth - 1}.hook_resid_post")

    def forward(self, ids: Tensor) -> Any:
        return self.bridge(ids)

    def states(self, ids: Tensor) -> list[Tensor]:
        _, cache = self.bridge.run_with_cache(ids, names_filter=self.names)
        return list(cache.accumulated_resid())

    def logits(self, state: Tensor, layer: int) -> Tensor:
        return self.bridge.unembed(self.bridge.ln_final(state))

    def argmax(self, ids: Tensor) -> Tensor:
        return torch.stack([self.logits(state, layer).argmax(-1) for layer, state in enumerate(self.states(ids))])

    def generate(self, ids: Tensor, tokens: int) -> Tensor:
        return self.bridge.generate(ids, max_new_tokens=tokens, do_sample=False, stop_at_eos=False, verbose=False)


PEERS: dict[str, Callable[[Loaded], Peer]] = {
    "transformers": Transformers,
    "nnsight": Nnsight,
    "TransformerLens": TransformerLens,
}


def installed() -> list[str]:
    """The peers that are here; TransformerLens comes with `pip install 'probekit[bench]'`."""
    from importlib.util import find_spec

    return [name for name in PEERS if name != "TransformerLens" or find_spec("transformer_lens")]
