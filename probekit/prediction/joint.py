"""Rounds of a batch: what the decoder does when several texts share its passes. Needs no torch.

Every row of a batch drafts and accepts for itself, as if it were alone; only the passes are shared. So the batch's r-th
round is the r-th round of every row that is still going on: as wide as those rows, and as long as the one among them
that drafts most. A row whose text has ended leaves, and nobody takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from probekit.drafting.keys import DrafterKey
from probekit.errors import InputError
from probekit.prediction.table import Prediction


class JointRounds(NamedTuple):
    """The rounds of batches, in order: (..., rounds) integers each.

    rows: that go on; 0 beyond a batch's last round. drafted: by the row that drafts most; 0 there.
    """

    rows: np.ndarray
    drafted: np.ndarray


def joint_rounds(drafted: np.ndarray, batches: np.ndarray) -> JointRounds:
    """The rounds of batches.

    drafted: (prompts, rounds) drafts of each prompt's rounds, as `own_rounds` makes it. batches: (..., rows) prompts of
    each batch, by their places in `drafted`. Returns (..., rounds).
    """
    taken = drafted[batches]
    return JointRounds((taken >= 0).sum(axis=-2), np.maximum(taken, 0).max(axis=-2))


def own_rounds(drafted: Iterable[Sequence[int]]) -> np.ndarray:
    """(prompts, rounds) int32 from the drafts of each prompt's rounds: -1 where a prompt has no more rounds."""
    lists = [np.asarray(each, dtype=np.int32) for each in drafted]
    table = np.full((len(lists), max(map(len, lists), default=0)), -1, dtype=np.int32)
    for row, each in zip(table, lists, strict=True):
        row[: len(each)] = each
    return table


def rounds_of_prompts(prediction: Prediction, drafter: DrafterKey, draft_length: int) -> np.ndarray:
    """The same of one cell of a prediction that `check_batch` took."""
    found = {
        each.prompt: each.drafted
        for each in prediction.rounds or ()
        if each.key == drafter and each.draft_length == draft_length
    }
    return own_rounds(found[prompt] for prompt in prediction.prompts)


def check_batch(prediction: Prediction, rows: int) -> None:
    """Raise InputError for a prediction that says nothing of a batch of so many rows."""
    in_order(len(prediction.prompts), rows)
    if prediction.text != "greedy":
        raise InputError(
            f"the rounds of {prediction.text} text are expected ones, and a batch shares real ones.",
            "Trace greedily, or ask for one row.",
        )
    if prediction.first_round != "prefill":
        raise InputError("a batch is priced of the decoder here, whose rounds begin after the prefill.")
    if prediction.rounds is None:
        raise InputError("the rounds of a batch follow from every prompt's own.", "Predict with `with_rounds=True`.")


def in_order(prompts: int, rows: int) -> np.ndarray:
    """(batches, rows): prompts 0, 1, .. in batches of so many; the last one is filled up from the beginning."""
    if not 1 <= rows <= prompts:
        raise InputError(
            f"a batch of {rows} rows needs as many prompts; there are {prompts}.", "Trace more, or ask for fewer rows."
        )
    return np.arange(-(-prompts // rows) * rows).reshape(-1, rows) % prompts
