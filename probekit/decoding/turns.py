"""Rounds whose drafter and length a policy chooses, from what verification has shown of each row's text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from probekit.decoding.batch import DecodeBatch
from probekit.decoding.engine import Engine
from probekit.decoding.sequence import SequenceState
from probekit.drafting.proposers import BoundDrafter, DraftHead, ExitLayerDrafts, Proposer
from probekit.drafting.round_policies import NOBODY, Chooser, RoundPolicy, Verified
from probekit.errors import InputError


def run_rounds(
    batch: DecodeBatch,
    engine: Engine,
    proposers: Sequence[Proposer],
    turns: Sequence[BoundDrafter],
    policy: RoundPolicy,
    draft_length: int,
) -> None:
    """Decode the rows of a batch to their ends. proposers: of each drafter, and last of nobody."""
    keys = [each.key for each in turns]
    heads = _heads(turns, policy.watched(keys), engine)
    choosers: dict[int, Chooser] = {row.index: policy.begin(row.index, keys, draft_length) for row in batch.rows}
    while batch.rows:
        way = _choose(batch.rows, choosers, several=len(turns) > 1)
        engine.watch([exit_layer for exit_layer, _ in heads])
        tree = proposers[way].propose(draft_length, policy)
        batch.lap("draft")
        logits = engine.logits(proposers[way].verify(tree))
        own = _own_drafts(engine, heads, tree.written)
        rows, before = list(batch.rows), [len(row.tokens) for row in batch.rows]
        engine.watch(())
        paths = batch.verify(tree, logits)
        for place, (row, start) in enumerate(zip(rows, before, strict=True)):
            if row.ended is None:
                emitted = row.tokens[start:]
                agrees = own[:, place, paths[place][: len(emitted)]] == np.array(emitted)
                choosers[row.index].observe(
                    Verified(row.ways[-1], row.drafted[-1], row.accepted[-1], len(emitted), agrees)
                )


def _choose(rows: Sequence[SequenceState], choosers: dict[int, Chooser], *, several: bool) -> int:
    """Let each row's chooser choose; the proposer's place. One drafter alone drafts for rows that want none, too."""
    way = 0
    for row in rows:
        choice = choosers[row.index].choose()
        row.most = choice.length if choice.way != NOBODY else 0
        row.ways.append(choice.way)
        way = choice.way if several or len(rows) == 1 else 0
    return way


def _heads(turns: Sequence[BoundDrafter], watched: Sequence[int], engine: Engine) -> list[tuple[int, DraftHead]]:
    """(exit layer, head) of the drafters whose own drafts a policy wants to see."""
    found = []
    for place in watched:
        drafts = turns[place]
        if not isinstance(drafts, ExitLayerDrafts):
            raise InputError(f"only the drafts of exit layers can be watched, not those of {drafts.key.label}.")
        found.append((drafts.exit_layer, drafts.head.with_engine(engine)))
    return found


def _own_drafts(engine: Engine, heads: Sequence[tuple[int, DraftHead]], written: Tensor) -> np.ndarray:
    """What each watched exit would draft after each token of written, (rows, tokens): (watched, rows, tokens)."""
    if not heads:
        return np.zeros((0, *written.shape), dtype=np.int64)
    found: list[Tensor] = []
    for exit_layer, head in heads:
        residuals = torch.cat(engine.watched[exit_layer], dim=1)
        drafts = head.all_rows(residuals).argmax(-1)
        found.append(drafts if head.ids is None else head.ids[drafts])
    return torch.stack(found).cpu().numpy()
