"""What one round drafts: a tree of tokens below each row's last one. A chain is the simplest tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class DraftTree(NamedTuple):
    """The drafts of one round, k nodes in each row; all rows have the same shape.

    written: (rows, 1 + k), each row's last token, the root, and its drafts.
    parents: (k,) the place in `written` of what each draft follows; 0 is the root.
    probabilities: (rows, k, vocabulary) what the drafts were drawn from; None when greedy, or without a draft.
    limits: how many of the k count in each row.
    """

    written: Tensor
    parents: tuple[int, ...]
    probabilities: Tensor | None
    limits: list[int]

    @classmethod
    def chain(cls, written: Tensor, probabilities: Tensor | None, limits: list[int]) -> DraftTree:
        """Each draft follows the one before it."""
        return cls(written, tuple(range(written.shape[1] - 1)), probabilities, limits)

    @property
    def tokens(self) -> Tensor:
        """(rows, k)."""
        return self.written[:, 1:]

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))
