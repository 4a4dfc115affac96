"""Which rows of the head a draft keeps: an order of the tokens, the most frequent first. Nothing here needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.errors import InputError


@dataclass(frozen=True)
class DraftVocabulary:
    """An order of the tokens; a draft head of F rows keeps the first F.

    Parameters
    ----------
    source: where the order comes from.
    ids: distinct token ids, the first to keep first; the tokens that are not among them follow by id.
    """

    source: str
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids) or min(self.ids, default=0) < 0:
            raise InputError("a draft vocabulary is an order of distinct token ids, each 0 or more.")

    @classmethod
    def counted(cls, texts: Iterable[Sequence[int] | np.ndarray], source: str) -> DraftVocabulary:
        """The tokens of some texts by falling frequency; equally frequent ones by id."""
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.asarray, texts)]).astype(np.int64)
        ids, counts = np.unique(tokens, return_counts=True)
        return cls(source, tuple(ids[np.argsort(-counts, kind="stable")].tolist()))

    def order(self, vocabulary: int) -> np.ndarray:
        """(vocabulary,) int64: every token once."""
        given = np.array(self.ids, dtype=np.int64)
        others = np.ones(vocabulary, dtype=bool)
        others[given] = False
        return np.concatenate([given, np.flatnonzero(others)])

    def fit(self, vocabulary: int) -> DraftVocabulary:
        """Itself, or InputError where it names tokens that a vocabulary of this size has not."""
        if max(self.ids, default=0) >= vocabulary:
            raise InputError(
                f"the draft vocabulary ({self.source}) names token {max(self.ids)}; this model has tokens "
                f"0..{vocabulary - 1}.",
                "Take one that was counted on a model with the same tokenizer.",
            )
        return self

    @property
    def fingerprint(self) -> str:
        """Names the order in a few letters."""
        return f"{len(self.ids)} tokens, {hashlib.sha256(repr(self.ids).encode()).hexdigest()[:12]}"

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DraftVocabulary:
        return cls(document["source"], tuple(document["ids"]))


def check_draft_rows(rows: int, vocabulary: int) -> int:
    """Return F, or raise InputError."""
    if isinstance(rows, bool) or not isinstance(rows, (int, np.integer)) or not 1 <= rows <= vocabulary:
        raise InputError(
            f"a draft head of {rows!r} rows is out of range: expected 1..{vocabulary}, the model's tokens."
        )
    return int(rows)
