"""Where a decoder's run leaves the prediction, and whether a near-tie explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from probekit.decoding.results import Decoded
from probekit.drafting.drafters import ExitLayer, Outlook, TextDrafter, allowed_by, outlook, sizes_of
from probekit.drafting.policies import FIXED, FixedLength, Policy
from probekit.drafting.round_policies import RoundPolicy
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.models.loaded import Loaded
from probekit.prediction.replay import replay
from probekit.prediction.table import Cell
from probekit.traces.trace import Trace


@dataclass(frozen=True)
class Difference:
    """A place where the decoder left the prediction.

    what: "tokens", "rounds" or "drafts". output: the output index that decided. kind: "near-tie", or "unexplained",
    which is a bug. predicted, measured: the token; or the accepted (drafted) tokens of the round. margin: logits
    between the two most probable tokens there, the smaller of the model's and the exit layer's; None where the trace
    does not know it.
    """

    prompt: int
    what: str
    output: int
    kind: str
    predicted: int | None
    measured: int | None
    margin: float | None = None


def with_margin(difference: Difference, trace: Trace, cell: Cell) -> Difference:
    """The same with the margin that the trace has of that place, where it has none of its own."""
    if difference.margin is not None:
        return difference
    try:
        margins = trace.values(difference.prompt, "margin")[:, difference.output]
    except (InputError, IndexError):  # of agreement only; or behind the end of the text
        return difference
    sites = [-1, *([cell.drafts.exit_layer] if isinstance(cell.drafts, ExitLayer) and cell.drafts.rows is None else [])]
    return replace(difference, margin=float(margins[sites].min()))


class PredictedText(NamedTuple):
    """What the trace says of one prompt: y, and of a round that starts at each output index, (N,), its leading drafts
    that are the model's own; near-ties of the drafter and of the model.

    allowed: (N,) the most drafts of such a round, where the drafter or a policy has a say. remembers: whether that
    depends on the rounds before it, so that it is known only where a predicted round starts. sizes: of a tree, tokens
    of a round of 0, 1, .. levels.
    """

    prompt: int
    tokens: list[int]
    runs: np.ndarray
    drafter_ties: np.ndarray
    model_ties: np.ndarray
    allowed: np.ndarray | None = None
    remembers: bool = False
    sizes: np.ndarray | None = None

    @classmethod
    def of(cls, trace: Trace, prompt: int, cell: Cell, policy: Policy = FIXED) -> PredictedText:
        tokens, allowed = trace.outputs(prompt).tolist(), None
        if isinstance(policy, RoundPolicy):
            allowed = np.full(len(tokens), cell.draft_length, dtype=np.int32)
            [rounds] = replay(trace.select([prompt]), Way((cell.drafts,), cell.draft_length, policy)).rounds
            allowed[rounds.start] = rounds.length
        elif not isinstance(policy, FixedLength):
            allowed = allowed_by(policy, cell.drafts, trace, prompt, cell.draft_length)
        seen = outlook(cell.drafts, trace, prompt, cell.draft_length)
        if isinstance(cell.drafts, TextDrafter):
            allowed = seen.drafted if allowed is None else np.minimum(allowed, seen.drafted)
        return cls(
            prompt,
            tokens,
            seen.run,
            cell.drafts.near_ties(trace, prompt),
            trace.near_ties(prompt)[-1],
            allowed,
            isinstance(policy, RoundPolicy),
            sizes_of(cell.drafts, cell.draft_length) if hasattr(cell.drafts, "shape") else None,
        )

    @property
    def outlook(self) -> Outlook:
        """With no bound on its drafts where there is none."""
        unbounded = np.full(len(self.tokens), np.iinfo(np.int32).max, dtype=np.int32)
        return Outlook(self.runs, unbounded if self.allowed is None else self.allowed)

    def most_drafts(self, start: int, draft_length: int, budget: int) -> int:
        """Drafts of a round that starts at an output index."""
        most = min(draft_length, budget - start - 1)
        return most if self.allowed is None else min(most, int(self.allowed[start]))


def differences_from(
    trace: Trace, prompt: int, cell: Cell, run: Decoded, draft_rows: int | None = None
) -> list[Difference]:
    """Where a decoder's run of one prompt of a greedy trace leaves the prediction of a cell.

    draft_rows: F, where the run drafted among the first F tokens of the trace's draft vocabulary only.
    """
    if draft_rows is not None and isinstance(cell.drafts, ExitLayer):
        cell = replace(cell, drafts=replace(cell.drafts, rows=draft_rows))
    text = PredictedText.of(trace, prompt, cell)
    return differences_of(text, cell.draft_length, trace.manifest.settings.max_new_tokens, run)


def differences_of(
    text: PredictedText, draft_length: int, budget: int, run: Decoded, *, exact: bool = True
) -> list[Difference]:
    """Where a decoder's run leaves the trace: the first token that differs, and every round before it that does.

    After a round that differs, the next ones are judged from where the decoder really is. exact: whether the number of
    drafts is predicted, too.
    """
    y, N = text.tokens, len(text.tokens)
    left = first_difference(y, run.tokens)
    found = []
    if left is not None:
        tie = left < N and bool(text.model_ties[left])
        found.append(_difference(text.prompt, "tokens", left, tie, token_at(y, left), token_at(run.tokens, left)))
    i, end = 1, N if left is None else left
    for drafted, accepted in zip(run.drafted, run.accepted, strict=True):
        if i >= end or (found and text.remembers):
            break
        k = text.most_drafts(i, draft_length, budget)
        foreseen = k if text.sizes is None else int(text.sizes[k])
        if exact and drafted != foreseen:
            found.append(_difference(text.prompt, "drafts", i, False, foreseen, drafted))
        expected = min(int(text.runs[i]), drafted if text.sizes is None else k, N - i)
        decided = i + min(accepted, expected)
        if accepted != expected and decided < end:
            tie = bool(text.drafter_ties[decided] or text.model_ties[decided])
            found.append(_difference(text.prompt, "rounds", decided, tie, expected, accepted))
        i += accepted + 1
    return found


def apart(
    loaded: Loaded, trace: Trace, text: PredictedText, tokens: Sequence[int], reference: Sequence[int]
) -> list[Difference]:
    """Where a cell and autoregressive decoding part, unless the trace has named that place already."""
    place = first_difference(tokens, reference)
    if place is None or place == first_difference(text.tokens, tokens):
        return []
    before, margin = list(tokens[:place]), None  # the trace's own, where it knows that place
    if before == text.tokens[:place] and place < len(text.tokens):
        tie = bool(text.model_ties[place])
    else:  # both had left the trace together
        margin, tie = _model_margin(loaded, [*trace.prompt_ids(text.prompt).tolist(), *before], trace)
    left = _difference(text.prompt, "tokens", place, tie, token_at(reference, place), token_at(tokens, place))
    return [replace(left, margin=margin)]


def _model_margin(loaded: Loaded, ids: Sequence[int], trace: Trace) -> tuple[float, bool]:
    """Difference of the model's two top logits after these tokens, which the trace has not, and whether it is a tie."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([list(ids)], device=loaded.device)).logits[0, -1].float()
    first, second = logits.topk(2).values
    noise = trace.manifest.measured.tolerance
    margin = first - second
    return float(margin), bool(margin < noise.around(first.new_tensor(noise.by_site[-1]), first))


def _difference(
    prompt: int, what: str, output: int, tie: bool, predicted: int | None, measured: int | None
) -> Difference:
    return Difference(prompt, what, output, "near-tie" if tie else "unexplained", predicted, measured)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first index at which two lists differ; where one ends, if it is the other's beginning."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return None if len(left) == len(right) else min(len(left), len(right))


def token_at(tokens: Sequence[int], place: int) -> int | None:
    return tokens[place] if place < len(tokens) else None
