"""Self-speculative decoding: the model's first layers draft, the rest verify, and both share one cache."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from probekit.decoding.engine import Engine, Method, Session
from probekit.decoding.policies import FixedLength, Policy
from probekit.errors import InputError
from probekit.models.anatomy import Anatomy
from probekit.models.loading import Loaded
from probekit.models.products import product


class SelfSpeculative(Method):
    """Draft with layers 0..E-1, the final norm and the head; verify with layers E..L-1 on the drafts' own residuals.

    One round with k drafts costs k + 1 passes of the early layers, k heads, and one pass of the late layers with the
    head over k + 1 rows. (The extra early pass gives the last draft's residual.)

    Parameters
    ----------
    exit_layer: E, 1..L-1. draft_length: K >= 1, the most drafts of a round.
    policy: when to stop drafting earlier; by default never.
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
        draft_vocabulary: Tensor | None = None,
    ) -> None:
        super().__init__(loaded)
        self.exit_layer: int = loaded.anatomy.check_exit(exit_layer)
        self.draft_length = check_draft_length(draft_length)
        self.policy = policy or FixedLength()
        self.head = DraftHead(loaded.anatomy, exit_head, draft_vocabulary)

    def _run(self, session: Session) -> None:
        engine = self._engine(session.plan)
        prompt = session.prompt_tokens()
        session.begin([engine], engine.full(prompt, engine.places([0], prompt.shape[1])))
        head = self.head.through(engine)
        while session.rows:
            residuals: list[Tensor] = []

            def early(tokens: Tensor, place: int, residuals: list[Tensor] = residuals) -> Tensor:
                places = engine.places([position + place for position in session.positions], 1)
                residuals.append(engine.early(tokens, places, self.exit_layer))
                return residuals[-1]

            drafts = session.draft(self.draft_length, self.policy, lambda *at: head(early(*at)), head.ids)
            early(drafts.written[:, -1:], drafts.tokens.shape[1])
            session.tick("draft")
            places = engine.places(session.positions, len(residuals))
            states = engine.late(torch.cat(residuals, dim=1), places, self.exit_layer)
            session.verify(drafts, engine.logits(states))


class DraftHead:
    """Residual at the exit -> logits to draft from: the model's norm and head, or only some rows of the head.

    ids: (F,) the token of each logit; None when all are there.
    """

    def __init__(
        self, parts: Anatomy, exit_head: Callable[[Tensor], Tensor] | None = None, ids: Tensor | None = None
    ) -> None:
        self._norm = parts.norm
        self._head: Callable[[Tensor], Tensor] = parts.head
        self._exit_head = exit_head
        # by id, so that equal logits fall to the lowest one, as with the whole head
        self.ids = None if ids is None else check_draft_vocabulary(ids, parts.vocabulary).sort().values.to(parts.device)
        if self.ids is not None:
            rows = parts.head.weight[self.ids]  # copied once: gathered rows would cost as much as the whole head
            bias = None if parts.head.bias is None else parts.head.bias[self.ids]
            self._head = product(rows, bias)

    def behind(self, exit_head: Callable[[Tensor], Tensor] | None) -> DraftHead:
        """The same with another exit head."""
        made = copy(self)
        made._exit_head = exit_head
        return made

    def through(self, engine: Engine) -> DraftHead:
        """The same by the engine's norm and head, which are quicker to call."""
        made = copy(self)
        made._norm = engine.parts.norm
        if self.ids is None:
            made._head = engine.logits
        return made

    def __call__(self, residual: Tensor) -> Tensor:
        """residual: (rows, 1, width). Returns (rows, vocabulary or F)."""
        if self._exit_head is not None:
            residual = self._exit_head(residual)
        return self._head(self._norm(residual))[:, -1]


def check_draft_length(draft_length: int) -> int:
    """Return `draft_length`, or raise InputError."""
    if isinstance(draft_length, bool) or not isinstance(draft_length, int) or draft_length < 1:
        raise InputError(f"the draft length must be a whole number of at least 1, not {draft_length!r}.")
    return draft_length


def check_draft_vocabulary(ids: Tensor, vocabulary: int) -> Tensor:
    """Return the token ids of a draft vocabulary, (F,) int64, or raise InputError."""
    given = torch.as_tensor(ids)
    if given.dim() != 1 or not given.numel() or given.is_floating_point() or given.is_complex():
        raise InputError(f"a draft vocabulary is a list of token ids, not {tuple(given.shape)} of {given.dtype}.")
    given = given.long()
    if given.unique().numel() != given.numel() or not 0 <= int(given.min()) <= int(given.max()) < vocabulary:
        raise InputError(f"a draft vocabulary must be distinct token ids within 0..{vocabulary - 1}.")
    return given
