"""Where a model keeps its embedding, layers, final norm and head, and whether the head is tied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probekit.errors import InputError
from probekit.models import families
from probekit.models.families import FAMILIES
from probekit.models.family import Family


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a causal decoder, found once and named.

    `depth` is L, the number of decoder layers. Residual sites are 0..L: site 0 is the embedding output,
    site l the residual stream after l layers, site L the last, before the final norm. Exits are 1..L-1.
    """

    model: Any
    decoder: nn.Module
    embedding: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    rotary: nn.Module
    tied: bool
    family: Family

    @property
    def config(self) -> Any:
        """The model's configuration; None for an anatomy without a model, which only the lens can use."""
        return getattr(self.model, "config", None)

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        return self.embedding.embedding_dim

    @property
    def vocabulary(self) -> int:
        return self.head.out_features

    @property
    def context(self) -> int:
        """Longest sequence, in tokens, that the positions of this model reach."""
        return int(self.model.config.max_position_embeddings)

    @property
    def key_value_width(self) -> int | None:
        """Numbers of one key (or value) of one token in one layer; None where the configuration does not say."""
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width

    @property
    def changes_logits(self) -> bool:
        """Whether the model's logits are anything but the products with the head's rows."""
        return not self.plain_head or self.family.changes_logits(self.config)

    @property
    def plain_head(self) -> bool:
        """Whether the head is a linear map without a bias, whose products can be taken apart."""
        plain = type(self.head) is nn.Linear and not hasattr(self.head, "parametrizations")
        return plain and self.head.bias is None

    @property
    def sites(self) -> range:
        return range(self.depth + 1)

    @property
    def exits(self) -> range:
        return range(1, self.depth)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def parameters(self) -> int:
        """Number of distinct weights: a tied head counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def check_site(self, site: int) -> int:
        """Return `site`, or raise InputError with the sites that exist."""
        if isinstance(site, bool) or not isinstance(site, int) or site not in self.sites:
            raise InputError(f"residual site {site!r} does not exist: this model has sites 0..{self.depth}.")
        return site

    def check_exit(self, exit_layer: int) -> int:
        """Return `exit_layer`, or raise InputError with the exits that exist."""
        if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or exit_layer not in self.exits:
            there = f"exits 1..{self.depth - 1}" if self.depth > 1 else "one layer, and so no exit"
            raise InputError(f"exit layer {exit_layer!r} is out of range: this model has {there}.")
        return exit_layer


def anatomy(model: Any) -> Anatomy:
    """Find the parts of a causal language model of a known family.

    Raises InputError for another family, which is named.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    decoder = getattr(model, "model", None)
    family = FAMILIES.get(model_type)
    if family is None or decoder is None or not hasattr(model, "lm_head"):
        raise InputError(
            f"this is a {model_type!r} model ({type(model).__name__}); probekit reads causal language models of "
            f"{families.names()}.",
            "Other families are not supported yet.",
        )
    return Anatomy(
        model=model,
        decoder=decoder,
        embedding=decoder.embed_tokens,
        layers=decoder.layers,
        norm=decoder.norm,
        head=model.lm_head,
        rotary=decoder.rotary_emb,
        tied=model.lm_head.weight is decoder.embed_tokens.weight,
        family=family,
    )
