"""How drafters draft in a decoder. A drafter is bound to a model once; for each batch it opens as a proposer.

A proposer drafts for all rows of a batch (`decoding.batch.DecodeBatch`) and gives the states that verify its drafts.
What it computes while drafting it may use again when it verifies: an exit layer's residuals are half of that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from probekit.drafting.keys import DrafterKey, check_draft_model
from probekit.drafting.lookup import TextIndex
from probekit.drafting.policies import Policy, ResidualPolicy
from probekit.drafting.trees import DraftTree
from probekit.errors import InputError
from probekit.models.anatomy import Anatomy
from probekit.models.linear_kernels import product
from probekit.models.loaded import Loaded
from probekit.models.states import has_plain_weight


class Proposer(Protocol):
    """The drafts of one batch, round by round."""

    def prefill(self, prompt: Tensor) -> Tensor:
        """prompt: (rows, tokens). Returns the model's states after the norm, (rows, tokens, width)."""
        ...

    def propose(self, draft_length: int, policy: Policy) -> DraftTree:
        """Draft at most `draft_length` tokens for each row."""
        ...

    def verify(self, tree: DraftTree) -> Tensor:
        """The model's states after the norm on the written tokens, (rows, 1 + k, width)."""
        ...


class BoundDrafter(Protocol):
    """A drafter that is ready to draft for one model. helpers: the other models that run."""

    key: DrafterKey
    helpers: Sequence[Loaded]

    def open(self, batch: Any, engine: Any, *helpers: Any) -> Proposer:
        """For a running batch: the model's engine, and one for each helper (`decoding.engine.Engine`)."""
        ...


# Exit layers.


class ExitLayerDrafts:
    """An exit layer of a model, with the head that it drafts with."""

    helpers: Sequence[Loaded] = ()

    def __init__(
        self,
        loaded: Loaded,
        key: DrafterKey,
        draft_ids: Sequence[int] | Tensor | None = None,
        exit_head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        parts = loaded.anatomy
        self.key = key
        self.exit_layer: int = parts.check_exit(key.exit_layer)
        if key.rows is not None and draft_ids is None:
            raise InputError(f"the {key.rows} tokens that {key.label} drafts among are not known.")
        ids = None if draft_ids is None else torch.as_tensor(draft_ids)
        self.head = DraftHead(parts, exit_head, ids)

    def open(self, batch: Any, engine: Any, *helpers: Any) -> ExitLayerProposer:
        return ExitLayerProposer(batch, engine, self)


class ExitLayerProposer:
    """Draft with layers 0..E-1, the final norm and the head; verify with layers E..L-1 on the drafts' own residuals.

    One round with k drafts costs k + 1 passes of the early layers, k heads, and one pass of the late layers with the
    head over k + 1 rows. (The extra early pass gives the last draft's residual.)
    """

    def __init__(self, batch: Any, engine: Any, drafts: ExitLayerDrafts) -> None:
        self.batch = batch
        self.engine = engine
        self.exit_layer = drafts.exit_layer
        self.head = drafts.head.with_engine(engine)
        self.residuals: list[Tensor] = []  # of this round, (rows, 1, width) each

    def prefill(self, prompt: Tensor) -> Tensor:
        return self.engine.full(prompt, self.engine.places([0], prompt.shape[1]))

    def propose(self, draft_length: int, policy: Policy) -> DraftTree:
        self.residuals = []
        figure = partial(self.figure, policy) if isinstance(policy, ResidualPolicy) else None
        tree = self.batch.draft(draft_length, policy, lambda *at: self.head(self.early(*at)), self.head.ids, figure)
        self.early(tree.written[:, -1:], len(tree.parents))
        return tree

    def verify(self, tree: DraftTree) -> Tensor:
        places = self.engine.places(self.batch.positions, tree.written.shape[1])
        return self.engine.late(torch.cat(self.residuals, dim=1), places, self.exit_layer)

    def figure(self, policy: ResidualPolicy) -> Tensor:
        """What a policy makes of the residual of each row's last draft, (rows,)."""
        return policy.of_residuals(self.residuals[-1][:, -1])

    def early(self, tokens: Tensor, place: int) -> Tensor:
        """tokens: (rows, 1), `place` tokens after each row's last one."""
        places = self.engine.places([position + place for position in self.batch.positions], 1)
        self.residuals.append(self.engine.early(tokens, places, self.exit_layer))
        return self.residuals[-1]


class DraftHead:
    """Residual at the exit -> logits to draft from: the model's norm and head, or only some rows of the head.

    ids: (F,) the token of each logit; None when all are there.
    """

    def __init__(
        self, parts: Anatomy, exit_head: Callable[[Tensor], Tensor] | None = None, ids: Tensor | None = None
    ) -> None:
        self._norm = parts.norm
        self._best: Callable[[Tensor], Tensor] | None = None
        self._head: Callable[[Tensor], Tensor] = lambda normed: parts.family.logits(parts, parts.head(normed))
        self._exit_head = exit_head
        # by id, so that equal logits fall to the lowest one, as with the whole head
        self.ids = None if ids is None else check_draft_vocabulary(ids, parts.vocabulary).sort().values.to(parts.device)
        if self.ids is not None:
            self._head = self._some_rows(parts, self.ids)

    @staticmethod
    def _some_rows(parts: Anatomy, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """The logits of these tokens. A head of any other kind than a linear map is computed whole."""
        if type(parts.head) is not nn.Linear or not has_plain_weight(parts.head):
            return lambda normed: parts.family.logits(parts, parts.head(normed))[..., ids]
        rows = parts.head.weight[ids]  # copied once: gathered rows would cost as much as the whole head
        products = product(rows, None if parts.head.bias is None else parts.head.bias[ids])
        return lambda normed: parts.family.logits(parts, products(normed))

    @property
    def is_models_own(self) -> bool:
        """Whether drafts come from the model's norm and whole head, and nothing else."""
        return self._exit_head is None and self.ids is None

    def with_exit_head(self, exit_head: Callable[[Tensor], Tensor] | None) -> DraftHead:
        """The same with another exit head."""
        made = copy(self)
        made._exit_head = exit_head
        return made

    def with_engine(self, engine: Any) -> DraftHead:
        """The same by the engine's norm and head, which are quicker to call."""
        made = copy(self)
        made._norm = engine.parts.norm
        made._exit_head = self._exit_head and engine.by_row(self._exit_head)
        made._head = engine.logits if self.ids is None else engine.by_row(self._head)
        if self.ids is None:
            made._best = getattr(engine, "best", None)
        return made

    def best(self, residual: Tensor) -> Tensor:
        """The argmax of the logits, a place among `ids` where there are some. (rows, 1, width) -> (rows,)."""
        if self._best is None:
            return self(residual).argmax(-1)
        return self._best(self._normed(residual))[:, -1]

    def __call__(self, residual: Tensor) -> Tensor:
        """residual: (rows, 1, width). Returns (rows, vocabulary or F)."""
        return self.all_rows(residual)[:, -1]

    def all_rows(self, residual: Tensor) -> Tensor:
        """residual: (..., width). Returns (..., vocabulary or F)."""
        return self._head(self._normed(residual))

    def _normed(self, residual: Tensor) -> Tensor:
        if self._exit_head is not None:
            residual = self._exit_head(residual)
        return self._norm(residual)


def check_draft_vocabulary(ids: Tensor, vocabulary: int) -> Tensor:
    """Return the token ids of a draft vocabulary, (F,) int64, or raise InputError."""
    given = torch.as_tensor(ids)
    if given.dim() != 1 or not given.numel() or given.is_floating_point() or given.is_complex():
        raise InputError(f"a draft vocabulary is a list of token ids, not {tuple(given.shape)} of {given.dtype}.")
    given = given.long()
    if given.unique().numel() != given.numel() or not 0 <= int(given.min()) <= int(given.max()) < vocabulary:
        raise InputError(f"a draft vocabulary must be distinct token ids within 0..{vocabulary - 1}.")
    return given


# Draft models.


class DraftModelDrafts:
    """A draft model beside the model."""

    def __init__(self, loaded: Loaded, key: DrafterKey, helper: Loaded) -> None:
        self.key = key
        self.vocabulary = loaded.anatomy.vocabulary
        self.helpers: Sequence[Loaded] = (check_draft_model(loaded, helper),)

    def open(self, batch: Any, engine: Any, *helpers: Any) -> DraftModelProposer:
        return DraftModelProposer(batch, engine, helpers[0], self.vocabulary)


class DraftModelProposer:
    """Draft with another model, verify with one pass of the whole model over k + 1 rows.

    One round with k drafts costs k steps of the draft model and one pass of the model. The draft model's first step of
    a round reads two tokens: it has not seen the last draft of the round before if that was accepted.
    """

    def __init__(self, batch: Any, engine: Any, helper: Any, vocabulary: int) -> None:
        self.batch = batch
        self.engine = engine
        self.helper = helper
        self.vocabulary = vocabulary

    def prefill(self, prompt: Tensor) -> Tensor:
        self.helper.full(self._readable(prompt), self.helper.places([0], prompt.shape[1]))
        return self.engine.full(prompt, self.engine.places([0], prompt.shape[1]))

    def propose(self, draft_length: int, policy: Policy) -> DraftTree:
        return self.batch.draft(draft_length, policy, self.step)

    def verify(self, tree: DraftTree) -> Tensor:
        return self.engine.full(tree.written, self.engine.places(self.batch.positions, tree.written.shape[1]))

    def step(self, tokens: Tensor, place: int) -> Tensor:
        before = 1 if place == 0 else 0
        if before:
            tokens = torch.cat([self.batch.previous, tokens], dim=1)
        places = self.helper.places([position + place - before for position in self.batch.positions], 1 + before)
        return self._same_vocabulary(self.helper.logits(self.helper.full(self._readable(tokens), places)[:, -1]))

    def _readable(self, tokens: Tensor) -> Tensor:
        """Tokens that only the model's padded embedding has are read as the helper's last: a guess less, no error."""
        most = self.helper.parts.vocabulary
        return tokens if most >= self.vocabulary else tokens.clamp(max=most - 1)

    def _same_vocabulary(self, logits: Tensor) -> Tensor:
        """The helper's logits, cut or filled up to the model's vocabulary: heads are padded to different sizes."""
        return functional.pad(logits, (0, self.vocabulary - logits.shape[-1]), value=float("-inf"))


# Nobody, and drafters that copy from the text.


class NobodyDrafts:
    """No drafts at all: a round is a step of autoregressive decoding."""

    def __init__(self, batch: Any, engine: Any) -> None:
        self.batch = batch
        self.engine = engine

    def prefill(self, prompt: Tensor) -> Tensor:
        return self.engine.full(prompt, self.engine.places([0], prompt.shape[1]))

    def propose(self, draft_length: int, policy: Policy) -> DraftTree:
        return DraftTree.chain(self.batch.last, None, [0] * len(self.batch.rows))

    def verify(self, tree: DraftTree) -> Tensor:
        return self.engine.full(tree.written, self.engine.places(self.batch.positions, 1))


class LookupDrafts:
    """A drafter whose drafts follow from the text: `make` gives each row an index of its own."""

    helpers: Sequence[Loaded] = ()

    def __init__(self, key: DrafterKey, make: Callable[[], TextIndex]) -> None:
        self.key = key
        self._make = make

    def open(self, batch: Any, engine: Any, *helpers: Any) -> TextProposer:
        indices: dict[int, tuple[TextIndex, int]] = {}  # of each prompt: its index, and how much of the output it read

        def drafts(row: Any, most: int) -> list[int]:
            index, read = indices.get(row.index) or (self._make(), 0)
            index.read(row.tokens[read:] if read else [*row.prompt_ids, *row.tokens])
            indices[row.index] = index, len(row.tokens)
            return index.drafts(most)

        return TextProposer(batch, engine, drafts)


class KnownDrafts:
    """A drafter whose drafts were written down along a known text: (prompt, output index, most) -> tokens."""

    helpers: Sequence[Loaded] = ()

    def __init__(self, key: DrafterKey, drafts: Callable[[int, int, int], list[int]]) -> None:
        self.key = key
        self._drafts = drafts

    def open(self, batch: Any, engine: Any, *helpers: Any) -> TextProposer:
        if not batch.plan.sampling.greedy:
            raise InputError(
                f"{self.key.model} is known along greedy texts only, and sampling writes others.", "Decode greedily."
            )
        return TextProposer(batch, engine, lambda row, most: self._drafts(row.index, len(row.tokens), most))


class TextProposer:
    """Draft what a function of a row's text says, verify with one pass of the whole model over k + 1 rows.

    drafts: (sequence state, most) -> at most so many tokens.
    """

    def __init__(self, batch: Any, engine: Any, drafts: Callable[[Any, int], list[int]]) -> None:
        self.batch = batch
        self.engine = engine
        self.drafts = drafts

    def prefill(self, prompt: Tensor) -> Tensor:
        return self.engine.full(prompt, self.engine.places([0], prompt.shape[1]))

    def propose(self, draft_length: int, policy: Policy) -> DraftTree:
        if policy.needs_confidence:
            raise InputError(
                "drafts that are copied from the text come without a confidence, which this policy asks for.",
                "Draft with a fixed length.",
            )
        return self.batch.drafted([self.drafts(row, row.limit(draft_length)) for row in self.batch.rows], policy)

    def verify(self, tree: DraftTree) -> Tensor:
        return self.engine.full(tree.written, self.engine.places(self.batch.positions, tree.written.shape[1]))
