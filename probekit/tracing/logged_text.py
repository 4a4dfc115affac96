"""Text out of another system's log, held against the model that is loaded here: would it have written these tokens?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.lens.lens import Lens
from probekit.models.anatomy import Anatomy

MOST_UNLIKE = 0.05  # share of a batch's tokens above which the text is taken to be another model's
_CHUNK_BYTES = 64 * 2**20


def gaps(
    parts: Anatomy,
    residuals: Tensor,
    text_ids: Tensor,
    warp: Callable[[Tensor], Tensor] | None,
    rounded: torch.dtype | None,
) -> Tensor:
    """How far below the model's own token each token of the text lies, in logits: (rows,), float32.

    Of greedy text, 0 where the token is the argmax. Of sampled text (with a warp), 0 for every token that these
    settings could have drawn. residuals: (rows, width), at site L. text_ids: (rows,), each row's next token. rounded:
    the dtype in which the logits are compared, where it is smaller than float32.
    """
    lens, step, found = Lens(parts), max(1, _CHUNK_BYTES // (8 * parts.vocabulary)), []
    for start in range(0, len(text_ids), step):
        here = slice(start, start + step)
        logits = lens(residuals[here], parts.depth).float()
        if rounded is not None:
            logits = logits.to(rounded).float()
        own = text_ids[here, None]
        below = logits.max(dim=-1).values - logits.gather(-1, own)[:, 0]
        if warp is not None:
            below = below.where(warp(logits).gather(-1, own)[:, 0].isneginf(), 0.0)
        found.append(below)
    return torch.cat(found) if found else torch.zeros(0)


def account(batch: int, below: Tensor, name: str, texts: str) -> Mapping[str, Any]:
    """What a batch's gaps come to: {"batch", "tokens", "unlike", "largest_gap"}.

    Raises InputError where more than MOST_UNLIKE of the tokens are not what the model writes.
    """
    tokens, unlike = len(below), int((below > 0).sum())
    if unlike > MOST_UNLIKE * tokens:
        raise InputError(
            f"{unlike} of {tokens} tokens of {texts} are not what {name} writes here at these settings.",
            "Give the model, the adapter and the sampling settings that the log was written with; or score it as text "
            "that is not the model's own (--given).",
        )
    largest = float(below.max()) if unlike else 0.0
    return {"batch": batch, "tokens": tokens, "unlike": unlike, "largest_gap": largest}
