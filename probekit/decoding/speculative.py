"""Speculative decoding: a drafter proposes a few tokens, the model verifies them in one pass.

The whole story of a round stands in `Speculative._run`; how a drafter proposes, in `probekit.drafting.proposers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from probekit.decoding.batch import DecodeBatch
from probekit.decoding.decoder import Decoder
from probekit.drafting.drafters import Drafter, DraftModel, ExitLayer
from probekit.drafting.keys import check_draft_length
from probekit.drafting.policies import FixedLength, Policy
from probekit.models.loaded import Loaded


class Speculative(Decoder):
    """Draft with any drafter, verify with the model: the tokens are the model's own, whoever drafts.

    Parameters
    ----------
    drafter: a Drafter, equipped; or a model with the same tokenizer, that drafts.
    draft_length: K >= 1, the most drafts of a round.
    policy: when to stop drafting earlier; by default never.
    """

    name = "speculative"

    def __init__(
        self, loaded: Loaded, drafter: Drafter | Loaded, draft_length: int, *, policy: Policy | None = None
    ) -> None:
        super().__init__(loaded)
        if isinstance(drafter, Loaded):
            drafter = DraftModel(drafter.name, drafter)
        self.drafts = drafter.on(loaded)
        self.draft_length = check_draft_length(draft_length)
        self.policy = policy or FixedLength()

    def _run(self, batch: DecodeBatch) -> None:
        engine = self._engine(batch.plan)
        helpers = [self._engine(batch.plan, helper) for helper in self.drafts.helpers]
        proposer = self.drafts.open(batch, engine, *helpers)
        batch.begin([engine, *helpers], proposer.prefill(batch.prompt_tokens()))
        while batch.rows:
            tree = proposer.propose(self.draft_length, self.policy)
            batch.lap("draft")
            batch.verify(tree, engine.logits(proposer.verify(tree)))

    def _models(self) -> list[Loaded]:
        return [self.loaded, *self.drafts.helpers]

    def _setting(self) -> dict[str, Any]:
        key = self.drafts.key
        setting = super()._setting() | {"method": key.method, "exit_layer": key.exit_or_null}
        return setting if key.is_exit else setting | {"drafter": key.model}


class SelfSpeculative(Speculative):
    """The same with an exit layer of the model as the drafter.

    Parameters
    ----------
    exit_layer: E, 1..L-1.
    exit_head: a map of the residual, (..., width), put before norm and head when drafting.
    draft_vocabulary: (F,) token ids; drafts choose among these only, with F rows of the head. Verification uses the
        whole head, so the tokens stay the model's own.
    """

    name = "self-speculative"

    def __init__(
        self,
        loaded: Loaded,
        exit_layer: int,
        draft_length: int,
        *,
        policy: Policy | None = None,
        exit_head: Callable[[Tensor], Tensor] | None = None,
        draft_vocabulary: Tensor | Sequence[int] | None = None,
    ) -> None:
        rows = None if draft_vocabulary is None else len(draft_vocabulary)
        drafter = ExitLayer(exit_layer, rows=rows, draft_ids=draft_vocabulary, exit_head=exit_head)
        super().__init__(loaded, drafter, draft_length, policy=policy)
        self.exit_layer: int = exit_layer
