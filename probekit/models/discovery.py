"""The parts of a model whose family is not known, by transformers' own accessors: enough to trace it and read its lens.

What is found here is a guess; `probekit.lens.discovered` holds it against the model before a lens believes it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from probekit.models.family import Family

NO_NORM = nn.Identity()  # of a model whose head reads the residual stream itself


class Located(NamedTuple):
    """The parts of a causal decoder."""

    decoder: nn.Module
    embedding: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    head: Any


def text_config(model: Any) -> Any:
    """The configuration of a model's text decoder; None where there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def locate(model: Any) -> Located | str:
    """The parts of `model`, or why it has none that the lens could read, as the end of a sentence."""
    config = text_config(model)
    if not hasattr(model, "get_output_embeddings") or config is None:
        return "it is no language model of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, not a causal decoder"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state from token to token (a state-space, recurrent or linear-attention model)"
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor) or head.weight.dim() != 2:
        return "it has no language model's head"
    if not isinstance(embedding, nn.Embedding):
        return "its input embedding is no table"
    decoder: Any = model.get_decoder()
    if decoder is None or decoder is model:
        decoder = model.base_model
    depth = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, part) for name, part in decoder.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth
    ]
    if not lists:
        return f"it holds no list of {depth} decoder layers"
    path, layers = min(lists, key=lambda each: each[0].count("."))
    width = head.weight.shape[1]
    if embedding.embedding_dim != width:
        return f"its embedding is {embedding.embedding_dim} wide and its head {width}"
    return Located(decoder, embedding, layers, _final_norm(decoder, path, width), head)


def _final_norm(decoder: nn.Module, layers: str, width: int) -> nn.Module:
    """The first norm after the layers where they stand, else the last outside them; NO_NORM where there is none."""
    home = decoder.get_submodule(layers.rpartition(".")[0])
    beside = list(home.named_children())
    after = [name for name, _ in beside].index(layers.rpartition(".")[2]) + 1
    behind = [part for _, part in beside[after:] if _is_norm(part, width)]
    if behind:
        return behind[0]
    outside = [
        part
        for name, part in decoder.named_modules()
        if not f"{name}.".startswith(f"{layers}.") and _is_norm(part, width)
    ]
    return outside[-1] if outside else NO_NORM


def _is_norm(part: nn.Module, width: int) -> bool:
    if "norm" not in type(part).__name__.lower():
        return False
    weight = getattr(part, "weight", None)
    return weight is None or tuple(weight.shape) == (width,)


def family_of(model: Any) -> Family:
    """What an unknown family does to its logits, by the names that transformers' configurations use for it."""
    return Family(
        model.config.model_type,
        logit_factor=lambda config: getattr(config, "logit_scale", None),
        logit_divisor=lambda config: getattr(config, "logits_scaling", None),
        logit_cap=lambda config: getattr(config, "final_logit_softcapping", None),
        branches=None,
        decodes=False,
    )
