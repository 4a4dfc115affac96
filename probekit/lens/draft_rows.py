"""How many rows a draft head may keep before a layer no longer says the model's token: one number answers every size.

A draft head keeps the rows of the first F tokens of a fixed order. Such a layer drafts the model's own token m if and
only if m is among them and none of them beats m there. So with r(v) the rank of a token in the order, and f the
smallest rank of a token that beats m at the layer,

    the draft agrees  <=>  r(m) < F <= f.

A token beats m when its logit is larger, or equal with a lower id, as in argmax. The same rank for the tokens that beat
m by the noise, and for those that do not stay below m by the noise, says at which sizes a near-tie decides.

Rows of the head are tried in that order, a few first, then more: most layers are beaten by a frequent token, and only
the layers that agree with the model need the whole product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.lens.lens import Lens, head_logits
from probekit.lens.noise import Noise
from probekit.lens.reductions import block_maxima, rounded_argmax, topk_lowest_id
from probekit.models.anatomy import Anatomy

FIRST_BLOCK = 256  # rows of the head that are tried first; each next block has four times as many
CHUNK_TOKENS = 128  # tokens read at once, all of their layers
BLOCK_BYTES = {"cpu": 32 * 2**20, "else": 2**28}  # of logits in one product


class _Tolerance(NamedTuple):
    """The noise, and its part that depends on the rows' sites: (rows,)."""

    noise: Noise
    base: Tensor


class DraftRows:
    """The sizes of a draft head at which each layer agrees.

    Parameters
    ----------
    order: (vocabulary,), every token id once, the first to keep first.
    rounded_dtype: the decoder's dtype where it is smaller than float32.
    heads: {exit layer: map} put before the norm, as in Lens.
    """

    def __init__(
        self,
        parts: Anatomy,
        order: Tensor,
        rounded_dtype: torch.dtype | None = None,
        heads: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        if not torch.equal(order.sort().values.cpu(), torch.arange(parts.vocabulary)):
            raise InputError(f"the order of a draft head names each token of 0..{parts.vocabulary - 1} once.")
        if parts.changes_logits:
            raise InputError(
                f"draft heads with fewer rows are not known for this {parts.family.model_type} model, whose logits are "
                f"not products with the rows of its head alone ({type(parts.head).__name__}).",
                "Leave the draft vocabulary out.",
            )
        self.parts = parts
        self.order = order.to(parts.device)
        self._rounded = rounded_dtype
        self._lens = Lens(parts, heads=heads)

    @torch.no_grad()
    def read(self, residuals: Tensor, noise: float | Noise = 0.0) -> dict[str, Tensor]:
        """The most rows that a draft head may have before a layer no longer says m, the model's own token.

        residuals: (layers + 1, rows, width), the sites 0..L of each row. noise: of the logits, by row.

        Returns {name: (layers + 1, rows) int32}. `agrees_up_to` is f above. Up to `surely_up_to` no kept token comes
        within the noise of m, beyond `perhaps_up_to` one beats it by the noise: surely <= agrees <= perhaps. All of the
        vocabulary where nothing beats m, and at the last layer. With a rounded dtype there is `agrees_up_to_rounded`:
        f of logits rounded to it, whose m is the argmax of the model's rounded ones.
        """
        names = ["agrees_up_to", "surely_up_to", "perhaps_up_to", *(["agrees_up_to_rounded"] if self._rounded else [])]
        shape, depth = residuals.shape[:2], self.parts.depth
        noise = Noise.of(noise)
        base = torch.tensor(noise.at(depth)[:depth], device=residuals.device)
        found = {name: residuals.new_full(shape, self.parts.vocabulary, dtype=torch.int32) for name in names}
        for start in range(0, shape[1], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            targets = self._targets(residuals[depth, rows])
            states = torch.cat([self._lens.states(residuals[layer, rows], layer) for layer in range(depth)])
            among = _Tolerance(noise, base.repeat_interleave(len(states) // depth))
            best = self._search(states.float(), [target.repeat(depth) for target in targets], among)
            for name, places in zip(names, best, strict=True):
                found[name][:depth, rows] = places.view(depth, -1).int()
        return found

    def _targets(self, last: Tensor) -> list[Tensor]:
        """The model's own tokens, (tokens,), and those of its rounded logits where they are asked for."""
        logits = head_logits(self.parts, self._lens.states(last, self.parts.depth))
        maxima = block_maxima(logits)
        own = topk_lowest_id(logits, maxima, 1)[1][:, 0]
        return [own] if self._rounded is None else [own, rounded_argmax(logits, maxima, self._rounded)]

    def _search(self, states: Tensor, targets: list[Tensor], among: _Tolerance) -> Tensor:
        """The smallest place in the order that beats each target. (comparisons, rows); the vocabulary's size if none.

        states: (rows, width) float32, what the head reads. targets: (rows,) each.
        """
        vocabulary, budget = len(self.order), BLOCK_BYTES.get(states.device.type, BLOCK_BYTES["else"])
        comparisons = 2 + len(targets)
        best = self.order.new_full((comparisons, len(states)), vocabulary)
        waiting = torch.arange(len(states), device=states.device)
        start, size = 0, FIRST_BLOCK
        while start < vocabulary and len(waiting):
            size = min(size, max(1, budget // (4 * len(waiting))))
            places = slice(start, start + size)
            those = _Tolerance(among.noise, among.base[waiting])
            first = self._first(states[waiting], [target[waiting] for target in targets], places, those)
            best[:, waiting] = torch.minimum(best[:, waiting], first)
            waiting = waiting[(best[:, waiting] == vocabulary).any(0)]
            start, size = start + size, 4 * size
        return best

    def _first(self, states: Tensor, targets: list[Tensor], places: slice, among: _Tolerance) -> Tensor:
        """The same among the tokens at some places of the order."""
        ids, weight = self.order[places], self.parts.head.weight
        at = torch.arange(places.start, places.start + len(ids), device=ids.device)
        logits = states @ weight[ids].float().T
        found = []

        def note(beats: Tensor) -> None:
            found.append(torch.where(beats, at, len(self.order)).amin(-1))

        for target, dtype in zip(targets, (torch.float32, self._rounded), strict=False):
            own = (states * weight[target].float()).sum(-1, keepdim=True)
            ahead = logits.to(dtype).float() - own.to(dtype).float()
            ahead.masked_fill_(ids == target[:, None], -torch.inf)
            beats = (ahead > 0) | ((ahead == 0) & (ids < target[:, None]))
            note(beats)
            if dtype == torch.float32:
                tolerance = among.noise.around(among.base[:, None], own)
                note(beats | (ahead > -tolerance))
                note(beats & (ahead >= tolerance))
        return torch.stack(found)
