"""What exit layers draft with beside norm and head, learned from a model's own text: what two benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probekit.decoding.speculative import SelfSpeculative
from probekit.lens.exit_heads import ExitHead, fit_heads
from probekit.models.loaded import Loaded
from probekit.traces.draft_vocabulary import DraftVocabulary
from probekit.tracing.prompts import Prompt
from probekit.tracing.self_generated import as_batches, self_generated_texts


@dataclass(frozen=True, eq=False)
class Drafting:
    """What exit layers draft with beside the model's own norm and head.

    ids: the tokens whose rows of the head they keep; None: all. heads: {exit: head}; None: none.
    """

    ids: list[int] | None = None
    heads: dict[int, ExitHead] | None = None

    @classmethod
    def learned(
        cls, loaded: Loaded, prompts: Sequence[Prompt], budget: int, draft_rows: int | None, heads: bool
    ) -> Drafting:
        """From what the model writes after some prompts and their beginnings."""
        texts = list(self_generated_texts(loaded, prompts, budget))
        order = DraftVocabulary.counted((tokens for _, tokens in texts), "own text").order(loaded.anatomy.vocabulary)
        return cls(
            None if draft_rows is None else order[:draft_rows].tolist(),
            fit_heads(loaded.anatomy, as_batches(texts)) if heads else None,
        )

    @property
    def rows(self) -> int | None:
        return None if self.ids is None else len(self.ids)

    def decoder(self, loaded: Loaded, exit_layer: int, length: int) -> SelfSpeculative:
        ids = None if self.ids is None else torch.tensor(self.ids)
        head = (self.heads or {}).get(exit_layer)
        return SelfSpeculative(loaded, exit_layer, length, exit_head=head, draft_vocabulary=ids)
