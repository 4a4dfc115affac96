"""Decoding in rounds that the device runs alone: the tokens and rounds of the methods they stand for.

The host sends a round before it has read the one before, so an ending is found one round late, and what that round did
is not read. On any device the rounds run as they stand; they are the work that a graph can record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.batch import DecodeBatch, DecodePlan
from probekit.decoding.decoder import Decoder
from probekit.decoding.device_round import DeviceEngine, DeviceState, Round
from probekit.decoding.engine import bucket
from probekit.decoding.sequence import SequenceState
from probekit.decoding.speculative import SelfSpeculative
from probekit.drafting.proposers import ExitLayerDrafts
from probekit.models.loaded import Loaded


class _InRounds(Decoder):
    """A method whose rounds the device runs alone, after a prefill like any other."""

    def _run(self, batch: DecodeBatch) -> None:
        engine = DeviceEngine(self.loaded.anatomy, len(batch.rows), self._length(batch.plan))
        prompt = batch.prompt_tokens()
        batch.begin([engine], engine.full(prompt, engine.places([0], prompt.shape[1])))
        if not batch.rows:
            return
        state = DeviceState.of(batch, self.draft_length)
        drafts = self.drafts if isinstance(self, SelfSpeculative) else None
        head = drafts.head if isinstance(drafts, ExitLayerDrafts) else None
        rounds: dict[int, Round] = {}
        sent = read = 0
        while going := [row for row in batch.rows if row.ended is None]:
            visible = self._visible(going, sent - read)
            if visible not in rounds:
                rounds[visible] = Round(engine, state, batch.sampler, visible, self.exit_layer, head)
            rounds[visible]()
            sent += 1
            if sent > read + 1:
                self._account(batch.rows, state.log[read])
                read += 1
        batch.lap("verify")
        batch.retire_finished()

    def _visible(self, rows: Sequence[SequenceState], unread: int) -> int:
        """The slots that the next round must see, wherever the rounds that were not read yet have led."""
        most = unread * (self.draft_length + 1)
        furthest = max(min(row.position + most, row.position + row.budget - len(row.tokens)) for row in rows)
        return bucket(furthest + self.draft_length + 1)

    def _account(self, rows: Sequence[SequenceState], host_copy: Tensor) -> None:
        """host_copy: (rows, K + 2), a round's entry in the log."""
        for row, (run, token, *drafts) in zip(rows, host_copy.tolist(), strict=True):
            if row.ended is None:
                row.round(drafts, row.limit(self.draft_length), run, token)

    def _length(self, plan: DecodePlan) -> int:
        return bucket(super()._length(plan))


class DeviceAutoregressive(_InRounds, Autoregressive):
    """`Autoregressive`: a round is a step."""


class DeviceSelfSpeculative(_InRounds, SelfSpeculative):
    """`SelfSpeculative` with a fixed draft length.

    Parameters
    ----------
    exit_layer, draft_length, exit_head, draft_vocabulary: as there.
    """

    def __init__(
        self,
        loaded: Loaded,
        exit_layer: int,
        draft_length: int,
        *,
        exit_head: Callable[[Tensor], Tensor] | None = None,
        draft_vocabulary: Tensor | None = None,
    ) -> None:
        super().__init__(loaded, exit_layer, draft_length, exit_head=exit_head, draft_vocabulary=draft_vocabulary)
