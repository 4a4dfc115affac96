"""The names of drafters, and what may draft for a model. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probekit.errors import InputError
from probekit.settings import whole_number

if TYPE_CHECKING:
    from probekit.models.loaded import Loaded

SELF = "self"
"""What tables and JSON call the drafter of an exit layer: the model itself."""

EXIT, MODEL = "exit", "model"
NGRAM, SUFFIX, IMPORTED = "ngram", "suffix", "imported"
TREE = "tree"
NO_PASSES = (NGRAM, SUFFIX, IMPORTED)
"""Kinds whose drafts take no pass of a model that is at hand: a round costs its verification by the whole model."""


@dataclass(frozen=True)
class DrafterKey:
    """The name of a drafter: hashable, equal for equal ways of drafting.

    Parameters
    ----------
    kind: "exit" (the model's first layers draft), "model" (a draft model does), or a word of your own.
    exit_layer: E, of an exit; 0 otherwise.
    model: the name of what drafts, as tables show it; "self" for an exit.
    rows: of the head that an exit drafts with; None: all. exit_heads: the name (fingerprint) of the exit heads that it
        drafts through; None: none.
    """

    kind: str
    exit_layer: int = 0
    model: str = SELF
    rows: int | None = None
    exit_heads: str | None = None

    @classmethod
    def exit(cls, exit_layer: int, *, rows: int | None = None, exit_heads: str | None = None) -> DrafterKey:
        return cls(EXIT, exit_layer, rows=rows, exit_heads=exit_heads)

    @classmethod
    def draft_model(cls, name: str) -> DrafterKey:
        return cls(MODEL, model=name)

    @property
    def is_exit(self) -> bool:
        return self.kind == EXIT

    @property
    def method(self) -> str:
        """What decoding with it is called."""
        return "self-speculative" if self.kind in (EXIT, TREE) else "speculative"

    @property
    def label(self) -> str:
        """As tables show it."""
        if self.kind == TREE:
            return f"layer {self.exit_layer}, {self.model}"
        return f"layer {self.exit_layer}" if self.is_exit else self.model

    @property
    def exit_or_null(self) -> int | None:
        """The exit layer as JSON and tables hold it, a tree's, too: null for every other drafter."""
        return self.exit_layer if self.kind in (EXIT, TREE) else None

    def names(self, given: DrafterKey | int | None) -> bool:
        """Whether `given` means this one: a key, an exit layer, or None for the draft model, as JSON writes it."""
        if isinstance(given, DrafterKey):
            return given == self
        return self.kind in (EXIT, MODEL) and given == self.exit_or_null


class NamedByKey:
    """What a row of a table that has a `key` calls its drafter."""

    key: DrafterKey

    @property
    def exit_layer(self) -> int | None:
        """E, as tables and JSON hold it: null for every other drafter."""
        return self.key.exit_or_null

    @property
    def drafter(self) -> str:
        """The name of what drafts; `self` for an exit layer."""
        return self.key.model

    @property
    def label(self) -> str:
        return self.key.label


def check_exits(exit_layers: Iterable[int] | None, depth: int) -> list[int]:
    """Exit layers of a model of L layers as whole numbers, each once; all of them by default. Or InputError."""
    exits = list(range(1, depth)) if exit_layers is None else list(dict.fromkeys(exit_layers))
    for exit_layer in exits:
        whole = isinstance(exit_layer, (int, np.integer)) and not isinstance(exit_layer, bool)
        if not whole or not 1 <= exit_layer < depth:
            there = f"exits 1..{depth - 1}" if depth > 1 else "one layer, and so no exit"
            raise InputError(f"exit layer {exit_layer!r} is out of range: this model has {there}.")
    return [int(exit_layer) for exit_layer in exits]


def check_draft_model(loaded: Loaded, drafter: Loaded) -> Loaded:
    """Return `drafter`, or raise InputError if its tokens are not those of `loaded`."""
    problem = f"the draft model {drafter.name} cannot draft for {loaded.name}: "
    advice = "Take a draft model of the same family, with the same tokenizer."
    if loaded.tokenizer is None or drafter.tokenizer is None:
        sizes = loaded.anatomy.vocabulary, drafter.anatomy.vocabulary
        if (loaded.tokenizer is None) != (drafter.tokenizer is None) or sizes[0] != sizes[1]:
            raise InputError(f"{problem}vocabularies of {sizes[1]} and {sizes[0]} tokens, no two tokenizers.", advice)
    elif different := _different_token(loaded.tokenizer.get_vocab(), drafter.tokenizer.get_vocab()):
        sizes = len(loaded.tokenizer), len(drafter.tokenizer)
        raise InputError(f"{problem}its tokenizer has other tokens ({sizes[1]}, not {sizes[0]}): {different}.", advice)
    if loaded.device != drafter.device:
        raise InputError(f"{problem}it is on {drafter.device}, not on {loaded.device}.", "Load both on one device.")
    return drafter


def _different_token(mine: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """The first id that means something else in two vocabularies; empty where all that both have mean the same."""
    here, there = ({token: text for text, token in each.items()} for each in (mine, theirs))
    for token in sorted(here.keys() & there.keys()):
        if here[token] != there[token]:
            return f"token {token} is {here[token]!r} for the one and {there[token]!r} for the other"
    few, many = sorted((here, there), key=len)
    return "" if len(few) * 2 > len(many) else "most tokens of the larger one are missing"


def check_draft_length(draft_length: int) -> int:
    """Return K, or raise InputError."""
    return whole_number("the draft length must be", draft_length)
