"""Speculative decoding: a cheaper reader drafts a few tokens, the model verifies them in one pass."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probekit.decoding.batch import DecodeBatch
from probekit.decoding.decoder import Decoder
from probekit.decoding.engine import Engine
from probekit.drafting.policies import FixedLength, Policy
from probekit.errors import InputError
from probekit.models.anatomy import Anatomy
from probekit.models.linear_kernels import product
from probekit.models.loaded import Loaded


class SelfSpeculative(Decoder):
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

    def _run(self, session: DecodeBatch) -> None:
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


class Speculative(Decoder):
    """Draft with another model, verify with one pass of the whole model over k + 1 rows.

    One round with k drafts costs k steps of the drafter and one pass of the model. The drafter's first step of a
    round reads two tokens: it has not seen the last draft of the round before if that was accepted.

    Parameters
    ----------
    drafter: a model with the same tokenizer. draft_length: K >= 1, the most drafts of a round.
    policy: when to stop drafting earlier; by default never.
    """

    name = "speculative"

    def __init__(self, loaded: Loaded, drafter: Loaded, draft_length: int, *, policy: Policy | None = None) -> None:
        super().__init__(loaded)
        self.drafter = check_drafter(loaded, drafter)
        self.draft_length = check_draft_length(draft_length)
        self.policy = policy or FixedLength()

    def _models(self) -> list[Loaded]:
        return [self.loaded, self.drafter]

    def _setting(self) -> dict[str, Any]:
        return super()._setting() | {"drafter": self.drafter.name}

    def _run(self, session: DecodeBatch) -> None:
        engine, helper = self._engine(session.plan), self._engine(session.plan, self.drafter)
        prompt = session.prompt_tokens()
        helper.full(self._readable(prompt), helper.places([0], prompt.shape[1]))
        session.begin([engine, helper], engine.full(prompt, engine.places([0], prompt.shape[1])))
        while session.rows:

            def step(tokens: Tensor, place: int) -> Tensor:
                before = 1 if place == 0 else 0
                if before:
                    tokens = torch.cat([session.previous, tokens], dim=1)
                places = helper.places([position + place - before for position in session.positions], 1 + before)
                return self._same_vocabulary(helper.logits(helper.full(self._readable(tokens), places)[:, -1]))

            drafts = session.draft(self.draft_length, self.policy, step)
            session.tick("draft")
            places = engine.places(session.positions, drafts.written.shape[1])
            session.verify(drafts, engine.logits(engine.full(drafts.written, places)))

    def _readable(self, tokens: Tensor) -> Tensor:
        """Tokens that only the model's padded embedding has are read as the drafter's last: a guess less, no error."""
        if self.drafter.anatomy.vocabulary >= self.loaded.anatomy.vocabulary:
            return tokens
        return tokens.clamp(max=self.drafter.anatomy.vocabulary - 1)

    def _same_vocabulary(self, logits: Tensor) -> Tensor:
        """The drafter's logits, cut or filled up to the model's vocabulary: heads are padded to different sizes."""
        missing = self.loaded.anatomy.vocabulary - logits.shape[-1]
        return functional.pad(logits, (0, missing), value=float("-inf"))


def check_drafter(loaded: Loaded, drafter: Loaded) -> Loaded:
    """Return `drafter`, or raise InputError if its tokens are not those of `loaded`."""
    problem = f"the draft model {drafter.name} cannot draft for {loaded.name}: "
    advice = "Take a draft model of the same family, with the same tokenizer."
    if loaded.tokenizer is None or drafter.tokenizer is None:
        sizes = loaded.anatomy.vocabulary, drafter.anatomy.vocabulary
        if (loaded.tokenizer is None) != (drafter.tokenizer is None) or sizes[0] != sizes[1]:
            raise InputError(f"{problem}vocabularies of {sizes[1]} and {sizes[0]} tokens, no two tokenizers.", advice)
    elif loaded.tokenizer.get_vocab() != drafter.tokenizer.get_vocab():
        sizes = len(loaded.tokenizer), len(drafter.tokenizer)
        raise InputError(f"{problem}its tokenizer has other tokens ({sizes[1]}, not {sizes[0]}).", advice)
    if loaded.device != drafter.device:
        raise InputError(f"{problem}it is on {drafter.device}, not on {loaded.device}.", "Load both on one device.")
    return drafter
