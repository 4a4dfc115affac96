"""Decoding in rounds that the device runs alone: the tokens and rounds of the methods they stand for.

On a CUDA device rounds are recorded once and replayed (`decoding.recordings`; not yet run on a GPU); on any other they
run as they stand. The host sends round r + 1 when it has read round r - 1, so that the device never waits for it; an
ending is found one round late, and what that round did is not read. Nothing is sent that the budget cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.batch import DecodeBatch, DecodePlan
from probekit.decoding.decoder import Decoder
from probekit.decoding.device_round import Round
from probekit.decoding.engine import bucket
from probekit.decoding.recordings import Recordings, forget, kept, recordings
from probekit.decoding.sequence import SequenceState
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.drafting.policies import FixedLength
from probekit.drafting.proposers import DraftHead, ExitLayerDrafts
from probekit.errors import InputError
from probekit.models.loaded import Loaded

ENGINES = ("host", "cuda")
"""Who runs the rounds: the host, step by step; or the device alone, whole rounds recorded into CUDA graphs."""
UNDER_WAY = 2  # rounds that were sent and not read, at most


class _InRounds(Decoder):
    """A method whose rounds the device runs alone, after a prefill like any other."""

    def _run(self, batch: DecodeBatch) -> None:
        held = recordings(self.loaded, len(batch.rows), self._length(batch.plan))
        with held.graphs.running():
            prompt = batch.prompt_tokens()
            batch.begin([held.engine], held.engine.full(prompt, held.engine.places([0], prompt.shape[1])))
            if not batch.rows:
                return
            self._rounds(batch, held)
            batch.lap("verify")
            batch.retire_finished()

    def _rounds(self, batch: DecodeBatch, held: Recordings) -> None:
        sampling = batch.plan.sampling
        state = held.state(len(batch.rows), self.draft_length, not sampling.greedy)
        state.fill(batch)
        head = self._draft_head()
        # The seed is not in the recording: it is in the rows' streams.
        kind: tuple[Hashable, ...] = (
            len(batch.rows), self.exit_layer, self.draft_length, replace(sampling, seed=0), self._drafts_with(head),
        )  # fmt: skip
        sent = read = 0
        while going := [row for row in batch.rows if row.ended is None]:
            unread = sent - read
            if unread < UNDER_WAY and any(len(row.tokens) + unread < row.budget for row in going):
                visible = self._visible(going, unread)

                def make(visible: int = visible) -> Round:
                    return Round(held.engine, state, batch.sampler, visible, self.exit_layer, head)

                held.send((visible, *kind), make, sent)
                sent += 1
                if sent - read < UNDER_WAY:
                    continue
            held.wait(read)
            self._account(batch.rows, state.entry(read))
            read += 1

    def _draft_head(self) -> DraftHead | None:
        drafts = self.turns[0] if isinstance(self, Speculative) else None
        return drafts.head if isinstance(drafts, ExitLayerDrafts) else None

    @staticmethod
    def _drafts_with(head: DraftHead | None) -> Hashable:
        """What rounds with this head have in common: None for the model's own; a recording keeps any other alive."""
        return None if head is None or head.is_models_own else head

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

    def _check_memory(self, plan: DecodePlan) -> None:
        if kept(self.loaded, len(plan.prompts), self._length(plan)) is None:
            forget(self.loaded)  # before the free memory is asked for
            super()._check_memory(plan)


class DeviceAutoregressive(_InRounds, Autoregressive):
    """`Autoregressive`: a round is a step."""


class DeviceSpeculative(_InRounds, Speculative):
    """`Speculative` with an exit layer and a fixed draft length; the parameters are the same.

    Raises InputError for other drafters and policies, which decide on the host.
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.exit_layer: int = _check_recordable(self).exit_layer


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
        draft_vocabulary: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__(loaded, exit_layer, draft_length, exit_head=exit_head, draft_vocabulary=draft_vocabulary)


def _check_recordable(method: Speculative) -> ExitLayerDrafts:
    drafts = method.turns[0]
    if len(method.turns) > 1 or not isinstance(drafts, ExitLayerDrafts) or type(method.policy) is not FixedLength:
        what = "several drafters" if len(method.turns) > 1 else drafts.key.label
        raise InputError(
            f"engine 'cuda' records rounds of one exit layer with a fixed draft length, not of {what} with the policy "
            f"{method.policy}.",
            "Use engine 'host'.",
        )
    return drafts


def check_engine_name(engine: str) -> str:
    """Return an engine's name, or raise InputError."""
    if engine not in ENGINES:
        raise InputError(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}.")
    return engine


def on_engine(method: Decoder, engine: str) -> Decoder:
    """The same decoding by another engine: `method` itself for "host".

    Raises InputError for an engine that is not there, and for rounds that cannot be recorded.
    """
    if check_engine_name(engine) == "host" or isinstance(method, _InRounds):
        return method
    if method.loaded.anatomy.batch_invariant:
        raise InputError("engine 'cuda' does not decode batch-invariantly.", "Use engine 'host'.")
    if type(method) is Autoregressive:
        return DeviceAutoregressive(method.loaded)
    if not isinstance(method, Speculative):
        raise InputError(f"engine 'cuda' does not decode by {method.name}.", "Use engine 'host'.")
    return DeviceSpeculative(method.loaded, method.turns, method.draft_length, policy=method.policy)
