"""Two-model speculative decoding: a smaller model with the same tokenizer drafts, the model verifies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probekit.decoding.engine import Method, Session
from probekit.decoding.policies import FixedLength, Policy
from probekit.decoding.self_speculative import check_draft_length
from probekit.errors import InputError
from probekit.models.loading import Loaded


class Speculative(Method):
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

    def _run(self, session: Session) -> None:
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
