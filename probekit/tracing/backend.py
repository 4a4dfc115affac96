"""Where the residuals come from: one pass over a batch of texts. The first way is probekit's own hooks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from probekit.hooks.capture import Capture
from probekit.models.loaded import Loaded


@dataclass(frozen=True, eq=False)
class Reading:
    """What one forward pass gave. It holds until the same backend reads again, which may write over the residuals.

    residuals: (L+1, rows, width), the residual stream at sites 0..L; rows in the order of the mask that chose them.
    logits: (batch, vocabulary), the model's own logits at the last place of each text.
    """

    residuals: Tensor
    logits: Tensor


class Backend(AbstractContextManager, Protocol):
    """Runs a model on a batch and reads every residual."""

    def read(self, inputs: Mapping[str, Any], rows: Tensor) -> Reading:
        """One forward pass.

        inputs: what the model's forward takes, `input_ids` (batch, places) among them.
        rows: (batch, places), bool: the places to keep, which leaves out padding.
        """
        ...


def taken(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a model's forward takes: some count positions themselves, and refuse to be told."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name != "position_ids" or name in known}


class HooksBackend:
    """Probekit's own hooks: each residual is copied into place while the model runs, and nothing else is kept.

    The place is the same for all passes: new memory for each would cost ten times as much as the copies.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._anatomy = loaded.anatomy
        self._place = torch.empty(0, dtype=loaded.anatomy.dtype, device=loaded.anatomy.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._place = self._place.new_empty(0)

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Any], rows: Tensor) -> Reading:
        parts = self._anatomy
        wanted = rows.flatten().nonzero()[:, 0]
        shape = (parts.depth + 1, len(wanted), parts.width)
        if self._place.numel() < math.prod(shape):
            self._place = torch.empty(math.prod(shape), dtype=parts.dtype, device=parts.device)
        residuals = self._place[: math.prod(shape)].view(shape)

        def keep(site: int, residual: Tensor) -> None:
            here = residual.to(residuals.device)  # of a model that is spread over devices
            torch.index_select(here.flatten(0, 1), 0, wanted, out=residuals[site])

        with Capture(parts, reduce=keep):
            logits = parts.model(**taken(parts.model, inputs), logits_to_keep=1, return_dict=True).logits
        return Reading(residuals, logits[:, -1])
