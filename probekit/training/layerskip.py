"""The LayerSkip training recipe (Elhoushi et al., arXiv 2404.16710) on any Llama, written with hooks.

Two pieces: layer dropout that grows with depth, and an early-exit loss through the model's own final norm and
head, with a curriculum that visits the exits in turn. Both leave the model's code and configuration alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.models.anatomy import Anatomy, anatomy


@dataclass(frozen=True)
class LayerSkip:
    """Settings of the recipe.

    Parameters
    ----------
    dropout: p_max, the dropout rate of the last layer; layer l of L drops with
        p_max * (exp(l ln 2 / (L - 1)) - 1), which is 0 for the first (paper, section 4.1).
    exit_scale: weight of all early-exit losses together, against 1 for the last layer's.
    exits_per_step: how many exits are trained in one step; they rotate, so that every exit has its turn
        (the paper's rotational curriculum).
    start: share of the training before which only the last layer is trained.
    per_sample: drop layers sample by sample, as in the paper; otherwise for the whole batch, which saves
        the dropped layers' work.
    seed: of the generator that draws the dropped layers, apart from every other random number.
    """

    dropout: float = 0.1
    exit_scale: float = 1.0
    exits_per_step: int = 1
    start: float = 0.0
    per_sample: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise InputError(f"layer dropout must lie in [0, 1), not {self.dropout}.")
        if self.exit_scale < 0 or self.exits_per_step < 1 or not 0 <= self.start <= 1:
            raise InputError("exit_scale must be >= 0, exits_per_step >= 1 and start in [0, 1].", f"Given: {self}.")

    def dropout_rates(self, depth: int) -> list[float]:
        """Dropout rate of each layer 0..depth-1."""
        if depth == 1:
            return [0.0]
        return [self.dropout * (math.exp(layer * math.log(2) / (depth - 1)) - 1) for layer in range(depth)]

    def exits_at(self, step: int, depth: int) -> list[int]:
        """The exits 1..depth-1 that are trained at `step`, in rotation with a stride that mixes depths."""
        count = depth - 1
        if count < 1:
            return []
        stride = next(s for s in range(max(2, round(count * 0.382)), 2 * count + 3) if math.gcd(s, count) == 1)
        first = step * self.exits_per_step
        turns = range(first, first + min(self.exits_per_step, count))
        return sorted({1 + (turn * stride) % count for turn in turns})


class LayerSkipLoss:
    """The loss of one training step under the recipe.

    `loss = LayerSkipLoss(model, recipe, steps); loss(step, input_ids, targets).backward()`

    With `recipe=None` it is the plain next-token loss: the same code path for the models that are compared.
    `generator` is the state that a checkpoint must keep besides the model's and the optimiser's.
    """

    def __init__(self, model: Any, recipe: LayerSkip | None, steps: int) -> None:
        self.anatomy: Anatomy = anatomy(model)
        self.recipe = recipe
        self.steps = steps
        self.generator = torch.Generator().manual_seed(recipe.seed if recipe else 0)

    def __call__(self, step: int, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats. input_ids, targets: (batch, positions), int64."""
        parts = self.anatomy
        exits: list[int] = []
        edit, scale = Edit(parts), 0.0
        if self.recipe is not None:
            edit, scale = self._dropout(self.recipe, input_ids.shape[0], input_ids.device), self.recipe.exit_scale
            if step >= self.recipe.start * self.steps:
                exits = self.recipe.exits_at(step, parts.depth)
        with edit, Capture(parts, [*exits, parts.depth]) as capture:
            parts.decoder(input_ids=input_ids, use_cache=False)
        loss = exit_loss(parts, capture[parts.depth], targets)
        for exit_layer in exits:
            loss = loss + scale / len(exits) * exit_loss(parts, capture[exit_layer], targets)
        return loss

    def _dropout(self, recipe: LayerSkip, batch: int, device: torch.device) -> Edit:
        rates = torch.tensor(recipe.dropout_rates(self.anatomy.depth))
        if not recipe.per_sample:
            drawn = torch.rand(len(rates), generator=self.generator) < rates
            return Edit(self.anatomy, skip=drawn.nonzero().flatten().tolist())
        keep = (torch.rand(len(rates), batch, generator=self.generator) >= rates[:, None]).to(device)
        return Edit(self.anatomy, replace={layer: _keep_samples(keep[layer]) for layer in range(len(rates))})


def exit_loss(parts: Anatomy, residual: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss, nats, of head(norm(residual)). residual: (batch, positions, width)."""
    logits = parts.head(parts.norm(residual))
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _keep_samples(keep: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda before, after: torch.where(keep[:, None, None], after, before)
