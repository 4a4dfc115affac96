"""Where a model keeps its embedding, layers, final norm and head, and whether the head is tied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probekit.errors import InputError
from probekit.models import families
from probekit.models.families import FAMILIES
from probekit.models.family import Family
from probekit.models.states import count_bytes, count_numbers, device_of, has_plain_weight, unwrapped


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
        return int(getattr(self.embedding, "embedding_dim", None) or self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(getattr(self.head, "out_features", None) or self.config.vocab_size)

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
        """Whether the head is a linear map without a bias, of ordinary weights, whose products can be taken apart."""
        return type(self.head) is nn.Linear and has_plain_weight(self.head) and self.head.bias is None

    @property
    def head_rows(self) -> Tensor:
        """The head's weights, (vocabulary, width). InputError where they are no ordinary numbers, or not all of it."""
        if type(self.head) is not nn.Linear or not has_plain_weight(self.head):
            raise InputError(
                f"the head of this model ({type(self.head).__name__}) is no plain linear map: it has no rows to read.",
                "Take the model without adapters on its head, and not quantised.",
            )
        return self.head.weight

    @property
    def sites(self) -> range:
        return range(self.depth + 1)

    @property
    def exits(self) -> range:
        return range(1, self.depth)

    @property
    def device(self) -> torch.device:
        """Where the model takes tokens."""
        return device_of(self.embedding)

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream: the norms' where the embedding is not stored in numbers of that kind."""
        weight = self.embedding.weight
        return weight.dtype if weight.is_floating_point() else next(self.norm.parameters()).dtype

    @property
    def parameters(self) -> int:
        """Number of distinct weights: a tied head counts once."""
        return count_numbers(self.model)

    @property
    def bytes(self) -> int:
        """As the weights are stored, scales and zero points of quantised ones with them."""
        return count_bytes(self.model)

    @property
    def stored_bytes(self) -> tuple[int, int] | None:
        """Bytes of one layer's weights (on average), and of the head's; None where all are numbers of the dtype."""
        if self.bytes == self.parameters * torch.empty((), dtype=self.dtype).element_size():
            return None
        return count_bytes(self.layers) // self.depth, count_bytes(self.head)

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
    """Find the parts of a causal language model of a known family, also inside what peft or torch.compile made of it.

    What has been found already (an Anatomy, a Loaded) is given back. Raises InputError for another family, which is
    named.
    """
    known = model if isinstance(model, Anatomy) else getattr(model, "anatomy", None)
    if isinstance(known, Anatomy):
        return known
    model = unwrapped(model)
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    decoder = unwrapped(getattr(model, "model", None))
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
        tied=getattr(model.lm_head, "weight", None) is decoder.embed_tokens.weight,
        family=family,
    )
