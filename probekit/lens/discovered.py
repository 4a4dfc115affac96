"""A model whose parts were found by accessors only is held against itself before a lens believes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from probekit.errors import SelfCheckError
from probekit.hooks.edit import Edit
from probekit.hooks.sites import open_hooks
from probekit.models.anatomy import Anatomy
from probekit.models.family import CACHE

TOKENS, AHEAD = 12, 4  # that are read; the last of them, which must not change what comes before
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}

_checked: WeakKeyDictionary[object, str] = WeakKeyDictionary()


def check_discovered(parts: Anatomy) -> None:
    """Ask of a model of an unknown family, once, what a lens and a tracer take for granted.

    Its layers run once each, in order, each on what the one before it wrote; head(norm(h[L])), with the scale and the
    cap that its configuration names, is its logits; a token sees no later one; a cache changes nothing.

    Raises SelfCheckError with what does not hold. Nothing is asked of a model in training mode, or with hooks open.
    """
    if parts.family.decodes or parts.model.training or open_hooks(parts.model):
        return
    places = [id(part) for part in (parts.embedding, parts.layers, parts.norm, parts.head)]
    state = f"{places} {parts.sizes} {parts.dtype} {parts.device} {parts.config.to_dict()}"
    if _checked.get(parts.model) == state:
        return
    try:
        what = next(_faults(parts), "")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:  # of transformers' forward
        what = f"its own forward fails ({(str(error).splitlines() or [type(error).__name__])[0]})"
    if what:
        raise SelfCheckError(
            f"this {parts.family.model_type!r} model cannot be read layer by layer: {what}.",
            "Its family is not known to probekit: docs/how-to/extend.md says how to describe one.",
        )
    _checked[parts.model] = state


@torch.inference_mode()
def _faults(parts: Anatomy) -> Iterator[str]:
    """What does not hold; each is asked only where those before it hold."""
    model, count = parts.model, min(TOKENS, parts.context)
    ids = (torch.arange(count, device=parts.device)[None] * 7919 + 13) % min(
        parts.vocabulary, len(parts.embedding.weight)
    )
    seen: list[tuple[int, Tensor, Tensor]] = []

    def note(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        def keep(before: Tensor, after: Tensor) -> Tensor:
            seen.append((layer, before, after))
            return after

        return keep

    with Edit(parts, replace={layer: note(layer) for layer in range(parts.depth)}):
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
    if [layer for layer, _, _ in seen] != list(range(parts.depth)):
        yield "its layers are not called once each, in order"
        return
    if any(tuple(after.shape) != (1, count, parts.width) for _, _, after in seen):
        yield f"its layers do not write (batch, positions, {parts.width})"
        return
    for (layer, _, written), (_, read, _) in pairwise(seen):
        if not torch.equal(written, read):
            yield f"layer {layer + 1} does not read what layer {layer} wrote"
            return
    found = parts.family.logits(parts, parts.head(parts.norm(seen[-1][2])))
    if found.shape != logits.shape or not _close(found, logits):
        yield f"its logits are not what its head ({type(parts.head).__name__}) makes of {type(parts.norm).__name__}"
        return
    if count > AHEAD:
        first = count - AHEAD
        if not _close(model(input_ids=ids[:, :first], use_cache=False, return_dict=True).logits, logits[:, :first]):
            yield "what it says of a token depends on later ones"
            return
        cache = DynamicCache(config=parts.config)
        model(input_ids=ids[:, :first], use_cache=True, **{CACHE: cache})
        rest = model(input_ids=ids[:, first:], use_cache=True, **{CACHE: cache}, return_dict=True).logits
        if not _close(rest, logits[:, first:]):
            yield "with a cache it says something else than without"


def _close(one: Tensor, other: Tensor) -> bool:
    allowed = TOLERANCE[other.dtype] * other.float().abs().amax(-1).clamp(min=1.0)
    return bool(((one.float() - other.float()).abs().amax(-1) <= allowed).all())
