"""Where a model keeps its embedding, layers, final norm and head, and whether the head is tied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probekit.errors import InputError
from probekit.html_tables import facts_html
from probekit.models import families
from probekit.models.discovery import family_of, locate, text_config
from probekit.models.families import FAMILIES
from probekit.models.family import Family
from probekit.models.states import (
    count_bytes,
    count_numbers,
    device_of,
    has_plain_weight,
    is_split,
    only_placed,
    unwrapped,
)

NO_LIMIT = 2**31 - 1  # tokens: the context of a model whose positions have no end


class Sizes(NamedTuple):
    """What a model measured when it was read: the number of layers, and the shapes of embedding and head."""

    layers: int
    embedding: tuple[int, ...]
    head: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a causal decoder, found once and named.

    `depth` is L, the number of decoder layers. Residual sites are 0..L: site 0 is the embedding output,
    site l the residual stream after l layers, site L the last, before the final norm. Exits are 1..L-1.

    `rotary` is None where the family is not known. `tied` says that head and embedding are one tensor. `sizes` is of
    the moment of reading; None for an anatomy that is not to be held against its model.
    """

    model: Any
    decoder: nn.Module
    embedding: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    rotary: Any
    tied: bool
    family: Family
    sizes: Sizes | None = None
    batch_invariant: bool = False

    def __repr__(self) -> str:
        shape = f"{self.depth} layers x {self.width}, vocabulary {self.vocabulary}"
        return f"Anatomy({self.family.model_type}: {shape}, {'tied' if self.tied else 'untied'})"

    def _repr_html_(self) -> str:
        names = ("depth", "width", "vocabulary", "embeddings", "context", "sites", "exits", "dtype", "device")
        return facts_html("probekit anatomy", {"family": self.family.model_type} | {n: getattr(self, n) for n in names})

    @property
    def config(self) -> Any:
        """The configuration of the model's text decoder; None for an anatomy without a model: only a lens uses it."""
        return text_config(self.model)

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
        """Longest sequence, in tokens, that the positions of this model reach.

        Where rotary embeddings change with the length of the text (longrope), the longest at which they are those of
        every shorter one: beyond it, a token read again is not the token that was read.
        """
        config = self.config
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions"))
        longest = next((int(most) for most in named if most), NO_LIMIT)
        return min([longest, *(at for kind, at in _rotary_kinds(config) if kind == "longrope" and at)])

    @property
    def key_value_heads(self) -> int:
        """Heads that keys and values have: those of the queries, where the configuration says nothing else."""
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    @property
    def split_over(self) -> int:
        """Processes over which each layer is split (tensor parallelism): each has so large a share of the heads."""
        weights: list[Any] = [weight for weight in self.layers[0].parameters() if is_split(weight)]
        return max((weight.device_mesh.size() for weight in weights), default=1)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def key_value_width(self) -> int | None:
        """Numbers of one key (or value) of one token in one layer; None for a family that is not known."""
        return self.key_value_heads * self.head_dim if self.family.decodes else None

    @property
    def changes_logits(self) -> bool:
        """Whether the model's logits are anything but the products with the head's rows."""
        return not self.plain_head or self.family.changes_logits(self.config)

    @property
    def plain_head(self) -> bool:
        """Whether the head is a linear map without a bias, of ordinary weights, whose products can be taken apart."""
        return self._head_at_hand and self.head.bias is None

    @property
    def _head_at_hand(self) -> bool:
        """Whether the head is a linear map whose weight can be read in its place, beside what the residuals are in."""
        if type(self.head) is not nn.Linear:
            return False
        placed = only_placed(self.head) and not self.head._forward_hooks and not self.head._forward_pre_hooks
        weight = self.head._parameters.get("weight")
        here = type(weight) is nn.Parameter and weight.device == self.device and weight.is_floating_point()
        return has_plain_weight(self.head) or (placed and here)

    @property
    def head_rows(self) -> Tensor:
        """The head's weights, (vocabulary, width). InputError where they are no ordinary numbers, or not all of it."""
        if not self._head_at_hand:
            raise InputError(
                f"the head of this model ({type(self.head).__name__}) is no plain linear map: it has no rows to read.",
                "Take the model without adapters on its head, and not quantised.",
            )
        return self.head.weight

    @property
    def embeddings(self) -> str:
        """How embedding and head stand to each other: "tied", "untied", or "untied, but equal in value"."""
        if self.tied:
            return "tied"
        if not (has_plain_weight(self.embedding) and has_plain_weight(self.head)):
            return "untied"
        one, other = self.embedding.weight, self.head.weight
        equal = one.shape == other.shape and one.device == other.device and torch.equal(one, other)
        return "untied, but equal in value" if equal else "untied"

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
    """Find the parts of a causal language model, also inside what peft or torch.compile made of it.

    What has been found already (an Anatomy, a Loaded) is given back. A family that is not known has a `family` that
    does not decode: its parts were found by transformers' accessors.

    Raises InputError, which names the family, where the model has no such parts.

    Examples
    --------
    >>> import probekit
    >>> parts = probekit.anatomy(probekit.load("tales-tied", device="cpu").model)
    >>> parts.depth, parts.width, parts.vocabulary, parts.tied
    (12, 128, 4096, True)
    """
    known = model if isinstance(model, Anatomy) else getattr(model, "anatomy", None)
    if isinstance(known, Anatomy):
        return known
    model = unwrapped(model)
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    decoder: Any
    embedding: Any
    layers: Any
    norm: Any
    if family is None:
        found = locate(model)
        if isinstance(found, str):
            raise _unread(model, found)
        decoder, embedding, layers, norm, head = found
        family, rotary = family_of(model), None
    else:
        names = family.names
        decoder, head = unwrapped(getattr(model, names.decoder, None)), getattr(model, names.head, None)
        inner = (names.embedding, names.layers, names.norm, names.rotary)
        embedding, layers, norm, rotary = (getattr(decoder, name, None) for name in inner)
        if any(part is None for part in (embedding, layers, norm, rotary, head)):
            raise _unread(model, f"its parts are not those of its family ({', '.join(names)})")
    depth = getattr(text_config(model), "num_hidden_layers", len(layers))
    if not 1 <= len(layers) <= depth:
        raise InputError(
            f"this {family.model_type!r} model holds {len(layers)} layers, of which its configuration runs {depth}.",
            "Set config.num_hidden_layers to the layers that are there.",
        )
    return Anatomy(
        model=model, decoder=decoder, embedding=embedding, layers=layers, norm=norm, head=head, rotary=rotary,
        tied=_one_tensor(embedding.weight, getattr(head, "weight", None)), family=family,
        sizes=_sizes(layers, embedding, head),
    )  # fmt: skip


def check_unchanged(parts: Anatomy) -> Anatomy:
    """Return `parts`, or raise InputError where its model is no longer the one that was read.

    Layers, embedding, norm and head are compared with the model's own, their sizes and the tying with those of then.
    """
    if parts.sizes is None:
        return parts
    now = anatomy(parts.model)
    for name in ("decoder", "embedding", "layers", "norm", "head", "rotary"):
        if getattr(now, name) is not getattr(parts, name):
            raise _changed(parts, f"its {name} is another module")
    for name, was, size in zip(Sizes._fields, parts.sizes, now.sizes or (), strict=True):
        if was != size:
            raise _changed(parts, f"its {name} measured {_size(was)} and now {_size(size)}")
    if now.tied != parts.tied:
        raise _changed(parts, f"its embeddings were {'' if parts.tied else 'un'}tied and are {now.embeddings} now")
    return parts


def _rotary_kinds(config: Any) -> list[tuple[str, int | None]]:
    """(type, original_max_position_embeddings) of each rotary embedding that a configuration describes."""
    given = getattr(config, "rope_parameters", None) or {}
    each = [given] if "rope_type" in given else [one for one in given.values() if isinstance(one, dict)]
    return [(one.get("rope_type", "default"), one.get("original_max_position_embeddings")) for one in each]


def _sizes(layers: nn.ModuleList, embedding: nn.Embedding, head: Any) -> Sizes:
    weight = getattr(head, "weight", None)  # of a quantised head a function; a module of the user's may have none
    named = (getattr(head, "out_features", 0), getattr(head, "in_features", 0))
    shape = weight.shape if isinstance(weight, torch.Tensor) else named
    return Sizes(len(layers), tuple(embedding.weight.shape), tuple(shape))


def _size(size: Any) -> str:
    return " x ".join(map(str, size)) if isinstance(size, tuple) else str(size)


def _one_tensor(one: Any, other: Any) -> bool:
    """Whether two weights are the same numbers in memory, by one parameter or by two on one storage."""
    if one is other:
        return True
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.shape != other.shape:
        return False
    if is_split(one) or is_split(other):
        return False
    return one.device.type != "meta" and one.stride() == other.stride() and one.data_ptr() == other.data_ptr()


def _changed(parts: Anatomy, how: str) -> InputError:
    return InputError(
        f"this {parts.family.model_type!r} model has changed since it was read: {how}.",
        "Load it again, or wrap it as it is now (probekit.wrap).",
    )


def _unread(model: Any, why: str) -> InputError:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return InputError(
        f"this is a {model_type!r} model ({type(model).__name__}): {why}.",
        f"probekit decodes causal language models of {families.names()}; it traces, and reads the lens of, other "
        "decoders whose layers write on one residual stream.",
    )
