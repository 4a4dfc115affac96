"""Speculative decoding: a drafter proposes a few tokens, the model verifies them in one pass.

The whole story of a round stands in `Speculative._run`; how a drafter proposes, in `probekit.drafting.proposers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from probekit.decoding.batch import DecodeBatch, DecodePlan
from probekit.decoding.decoder import Decoder
from probekit.decoding.results import Decoded
from probekit.decoding.turns import run_rounds
from probekit.drafting.drafters import Drafter, DraftModel, ExitLayer
from probekit.drafting.keys import check_draft_length
from probekit.drafting.policies import FixedLength, Policy
from probekit.drafting.proposers import BoundDrafter, NobodyDrafts, Proposer
from probekit.drafting.round_policies import RoundPolicy
from probekit.drafting.ways import check_turns
from probekit.models.loaded import Loaded
from probekit.settings import Sampling

_PLAN: dict[str, Any] = {"sampling": Sampling(), "stop": (), "on_accept": None}


class Speculative(Decoder):
    """Draft with any drafter, verify with the model: the tokens are the model's own, whoever drafts.

    Parameters
    ----------
    drafter: a Drafter, equipped; or one that is bound to this model already; or a model with the same tokenizer, that
        drafts; or several drafters that take turns, as the policy says at the start of each round. Those decode one
        prompt at a time.
    draft_length: K >= 1, the most drafts of a round.
    policy: when to stop drafting earlier; by default never.
    """

    name = "speculative"

    def __init__(
        self,
        loaded: Loaded,
        drafter: Drafter | BoundDrafter | Loaded | Sequence[Drafter | BoundDrafter],
        draft_length: int,
        *,
        policy: Policy | None = None,
    ) -> None:
        super().__init__(loaded)
        if isinstance(drafter, Loaded):
            drafter = DraftModel(drafter.name, drafter)
        drafters: list[Drafter | BoundDrafter] = list(drafter) if isinstance(drafter, Sequence) else [drafter]
        self.policy = policy or FixedLength()
        check_turns([each.key for each in drafters], self.policy)
        self.turns: list[BoundDrafter] = [
            cast(Drafter, each).on(loaded) if hasattr(each, "on") else cast(BoundDrafter, each) for each in drafters
        ]
        self.draft_length = check_draft_length(draft_length)

    def _length(self, plan: DecodePlan) -> int:
        """A tree is written node by node behind the text."""
        nodes = max(getattr(each, "drafts_tokens", 0) for each in self.turns)
        return super()._length(plan) + max(0, nodes - self.draft_length)

    @property
    def drafts(self) -> BoundDrafter:
        """The drafter; the first of several."""
        return self.turns[0]

    def decode(
        self, prompts: Sequence[Sequence[int]], *, indices: Sequence[int] | None = None, **given: Any
    ) -> list[Decoded]:
        if len(self.turns) == 1 or len(prompts) < 2:
            return super().decode(prompts, indices=indices, **given)
        self._plan(prompts, **_PLAN | given, indices=indices)  # checks all prompts before the first is decoded
        named = range(len(prompts)) if indices is None else indices
        done = (super(Speculative, self).decode([ids], indices=[index], **given)
                for ids, index in zip(prompts, named, strict=True))  # fmt: skip
        return [decoded for each in done for decoded in each]

    def _run(self, batch: DecodeBatch) -> None:
        engine = self._engine(batch.plan)
        helpers = [self._engine(batch.plan, helper) for helper in self.drafts.helpers]
        proposers: list[Proposer] = [each.open(batch, engine, *helpers) for each in self.turns]
        batch.begin([engine, *helpers], proposers[0].prefill(batch.prompt_tokens()))
        if isinstance(self.policy, RoundPolicy):
            run_rounds(batch, engine, [*proposers, NobodyDrafts(batch, engine)], self.turns, self.policy,
                       self.draft_length)  # fmt: skip
            return
        while batch.rows:
            tree = proposers[0].propose(self.draft_length, self.policy)
            batch.lap("draft")
            batch.verify(tree, engine.logits(proposers[0].verify(tree)))

    def _models(self) -> list[Loaded]:
        return [self.loaded, *self.drafts.helpers]

    def _setting(self) -> dict[str, Any]:
        key = self.drafts.key
        setting = super()._setting() | {"method": key.method, "exit_layer": key.exit_or_null}
        if len(self.turns) > 1:
            return setting | {"method": self.name, "exit_layer": None, "drafter": f"{len(self.turns)} in turn"}
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
