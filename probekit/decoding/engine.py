"""Parts of a model on a cache of their own, and the frame that every decoding method fills in.

The steps of a round, for whoever wants to time them at a context of `c` tokens (no prefill is needed: the cache is
zeros, and zeros cost what numbers cost):

    engine = Engine(anatomy, rows=1, length=c + 16)
    places = engine.places([c], 1)                      # one token, standing at position c
    residual = engine.early(tokens, places, E)          # layers 0..E-1; tokens: (rows, 1)
    engine.logits(anatomy.norm(residual)).argmax(-1)    # norm and head: the rest of a draft step
    engine.late(residuals, engine.places([c], n), E)    # layers E..L-1 and norm; residuals: (rows, n, width)
    engine.full(tokens, places)                         # every layer and norm: an autoregressive step

Run them under `torch.inference_mode()`, as decoding does. Unmodified layers are called one by one, so hooks on them
fire; a hook on the whole model would never fire, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probekit.decoding.caches import PassPositions, PositionCache
from probekit.drafting.trees import TreeShape
from probekit.errors import InputError
from probekit.hooks.fast_forward import fast_forward, fast_head
from probekit.hooks.sites import is_hooked, is_intercepted, run_layers
from probekit.hooks.stop_resume import Resume, Stop
from probekit.models import families
from probekit.models.anatomy import Anatomy, check_unchanged
from probekit.models.cuda_kernels import chosen_kernels
from probekit.models.family import LayerKind
from probekit.moved import look_up

BUCKET = 64  # slots: a pass sees a multiple of it, so that few recordings and few shapes serve every length


def bucket(slots: int) -> int:
    """The least multiple of BUCKET that holds so many slots."""
    return -(-slots // BUCKET) * BUCKET


class Engine:
    """The layers of a model over a cache of `rows` sequences, at most `length` tokens each.

    `early`, `late` and `full` take tokens or residuals of (rows, tokens[, width]) and their
    PassPositions; the two parts of one pass share them. Early passes through Stop, late and full ones through Resume.
    On a CUDA device passes see whole buckets of slots, and the slots behind a token are masked.
    """

    def __init__(self, parts: Anatomy, rows: int, length: int) -> None:
        _check_runnable(parts)
        on_cuda = parts.device.type == "cuda"
        self._in_buckets = on_cuda
        self._kernels = partial(chosen_kernels, parts.device) if on_cuda else nullcontext
        length = bucket(length) if on_cuda else length
        self.parts, self._head = fast_forward(parts), fast_head(parts)
        self._without_hooks = [module for module in (*parts.layers, parts.norm, parts.head) if not is_hooked(module)]
        self.cache = PositionCache(parts, rows, length)
        self._always_mask = parts.model.config._attn_implementation != "sdpa"
        self._positions = torch.arange(length, device=parts.device)[None]
        self._changes_logits = parts.family.changes_logits(parts.model.config)
        self._kinds = tuple(parts.family.kinds(parts.model.config))
        like = torch.empty(0, dtype=parts.dtype, device=parts.device)
        # Rows that draft beyond the context are never counted; and there, rotary embeddings may be others for all.
        within = self._positions.clamp(max=parts.context - 1)
        self._rotary = {
            kind: parts.family.rotary(parts.rotary, like, within, kind) for kind in dict.fromkeys(self._kinds)
        }
        self.watched: dict[int, list[Tensor]] = {}  # exit layer -> the residuals there of every pass, as asked for
        self._trees: dict[TreeShape, tuple[Tensor, ...]] = {}  # depths; who is neither a node's ancestor nor itself
        self._stops: dict[int, Stop] = {}
        self._resumes: dict[int, Resume] = {}

    def places(self, starts: Sequence[int], tokens: int) -> PassPositions:
        """Each row's next `tokens` tokens, the first of them at position starts[row]."""
        first, last = min(starts), max(starts)
        visible = last + tokens
        if first == last:
            positions = self._positions[:, first:visible]
            rotary = {kind: (cos[:, first:visible], sin[:, first:visible]) for kind, (cos, sin) in self._rotary.items()}
            needs_mask = tokens > 1 and (first > 0 or self._always_mask)
        else:
            positions = torch.tensor(starts, device=self.parts.device)[:, None] + self._positions[:, :tokens]
            rotary = {kind: (cos[0][positions], sin[0][positions]) for kind, (cos, sin) in self._rotary.items()}
            needs_mask = True
        if self._in_buckets and (needs_mask or tokens == 1):
            visible, needs_mask = bucket(visible), True
        return self._pass_positions(positions, visible, rotary, needs_mask)

    def tree_places(self, starts: Sequence[int], shape: TreeShape, nodes: range) -> PassPositions:
        """Nodes of a tree whose root is each row's last token, at position starts[row]; node j is written at slot
        starts[row] + j, and sees the text up to the root, its ancestors and itself."""
        tree = self._trees.get(shape)
        if tree is None:
            tree = self._trees[shape] = tuple(
                torch.as_tensor(each, device=self.parts.device) for each in (shape.depths, ~shape.ancestors)
            )
        depths, strangers = tree
        first, last = nodes[0], nodes[-1] + 1
        start = torch.tensor(starts, device=self.parts.device)[:, None]
        positions = start + depths[first:last]
        slots = start + self._positions[:, first:last]
        visible = max(starts) + last
        if min(starts) == max(starts):  # the text is seen, and then comes the tree
            hidden = strangers.new_zeros(len(starts), last - first, visible)
            hidden[..., visible - last :] = strangers[first:last, :last]
        else:
            node = self._positions[:, :visible] - start  # (rows, visible): 0 is the root, below it the text
            within = node.clamp(0, last - 1)
            hidden = (node > 0)[:, None] & (strangers[first:last][:, within].transpose(0, 1) | (node >= last)[:, None])
        if self._in_buckets:
            hidden = functional.pad(hidden, (0, bucket(visible) - visible), value=True)
            visible = bucket(visible)
        kinds = {}
        for kind, (cos, sin) in self._rotary.items():
            own = hidden
            if kind.window is not None:
                node = self._positions[:, :visible] - start
                stands = torch.where(node <= 0, node, depths[node.clamp(0, len(depths) - 1)]) + start
                own = hidden | (stands[:, None] <= positions[..., None] - kind.window)
            mask = own[:, None].to(self.parts.dtype).mul_(torch.finfo(self.parts.dtype).min)
            kinds[kind] = self._layer_inputs(mask, positions, (cos[0][positions], sin[0][positions]))
        return PassPositions(self.cache.slots(slots), visible, kinds, self._kinds)

    def _pass_positions(
        self,
        positions: Tensor,
        visible: int,
        rotary: Mapping[LayerKind, tuple[Tensor, Tensor]],
        needs_mask: bool,
    ) -> PassPositions:
        family, kinds = self.parts.family, {}
        for kind, embeddings in rotary.items():
            masked = needs_mask or (kind.window is not None and visible > kind.window)
            mask = family.mask(kind, positions, visible, self.parts.dtype) if masked else None
            kinds[kind] = self._layer_inputs(mask, positions, embeddings)
        return PassPositions(self.cache.slots(positions), visible, kinds, self._kinds)

    def _layer_inputs(self, mask: Tensor | None, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": rotary,
            self.parts.family.names.cache: self.cache,
            "use_cache": True,
        }

    def early(self, tokens: Tensor, places: PassPositions, exit_layer: int) -> Tensor:
        """Layers 0..exit_layer-1 on (rows, tokens): the residual there, (rows, tokens, width)."""
        stop = self._stops.get(exit_layer)
        if stop is None:
            stop = self._stops[exit_layer] = Stop(self.parts, exit_layer)
        self.cache.places = places
        embedded = self.parts.family.embed(self.parts, tokens)
        with self._kernels():
            if self.watched:
                return self._in_steps(embedded, places, 0, exit_layer)
            return stop.direct(embedded, places.each)

    def late(self, residual: Tensor, places: PassPositions, exit_layer: int) -> Tensor:
        """Layers exit_layer..L-1 and the final norm on (rows, tokens, width); the same shape."""
        resume = self._resumes.get(exit_layer)
        if resume is None:
            resume = self._resumes[exit_layer] = Resume(self.parts, exit_layer)
        self.cache.places = places
        with self._kernels():
            if self.watched:
                return self.parts.norm(self._in_steps(residual, places, exit_layer, self.parts.depth))
            return resume.direct(residual, places.each)

    def watch(self, exit_layers: Sequence[int]) -> None:
        """Keep the residuals of the passes to come at these exits, in `watched`; those of before are dropped."""
        self.watched = {exit_layer: [] for exit_layer in exit_layers}

    def _in_steps(self, residual: Tensor, places: PassPositions, first: int, last: int) -> Tensor:
        """Layers first..last-1, from one watched exit to the next."""
        at = first
        for site in [*sorted(site for site in self.watched if first < site < last), last]:
            residual = run_layers(self.parts.layers[at:site], residual, places.each[at:site])
            if site in self.watched:
                self.watched[site].append(residual)
            at = site
        return residual

    def full(self, tokens: Tensor, places: Any) -> Tensor:
        """Every layer and the final norm on (rows, tokens): (rows, tokens, width)."""
        return self.late(self.parts.family.embed(self.parts, tokens), places, 0)

    def logits(self, normed: Tensor) -> Tensor:
        """The model's head. normed: (..., width). Returns (..., vocabulary)."""
        with self._kernels():
            products = self._head(normed)
        return self.parts.family.logits(self.parts, products) if self._changes_logits else products

    def by_row(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A function of states, (..., width), as this engine calls it: here as it is."""
        return function

    def refuse_new_hooks(self) -> None:
        """Raise InputError for a hook that came to a layer after this engine was made: it would never fire."""
        if any(map(is_hooked, self._without_hooks)):
            raise InputError(
                "a hook, or a replaced forward, came to a layer while the model decodes: it would not fire.",
                "Open a Capture (or another hook) before decoding starts.",
            )


def _check_runnable(parts: Anatomy) -> None:
    """Raise InputError for a model whose layers cannot be called one by one with the same result."""
    check_unchanged(parts)
    families.check_decodes(parts.family, "this")
    for name, module in (("model", parts.model), ("model.model", parts.decoder), ("rotary_emb", parts.rotary)):
        if is_intercepted(module):
            raise InputError(
                f"there is a hook, or a replaced forward, on `{name}` ({type(module).__name__}): decoding calls the "
                "layers one by one, so it would never fire.",
                "Hook the layers instead, as probekit.Capture does.",
            )
    implementation = parts.model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise InputError(
            f"attention {implementation!r} cannot be used for decoding; expected 'sdpa' or 'eager'.",
            "Load the model with attn_implementation='sdpa'.",
        )


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
