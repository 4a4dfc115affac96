"""What a tracer asks of a model before it believes itself: the last row, and the noise of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import DynamicCache

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.lens.lens import Lens, check_model_row
from probekit.lens.noise import Noise
from probekit.models.anatomy import Anatomy
from probekit.models.family import CACHE
from probekit.models.loaded import Loaded
from probekit.tracing.backend import Reading

NOISE_TOKENS = 256  # of a text, to measure the noise
NOISE_ROWS = 16  # of them, the rows that are computed alone
NOISE_LOGITS = 8  # of a row, the largest ones
NOISE_SAFETY = 2


@torch.inference_mode()
def self_check(parts: Anatomy, reading: Reading) -> None:
    """The lens at layer L must reproduce the model's own logits, and every residual must be finite.

    reading: of one text, whose last row gave `reading.logits`.
    Raises InputError for weights that give NaN or infinite numbers (naming the layer), and SelfCheckError where the
    last row is not the model's.
    """
    for site, residual in enumerate(reading.residuals):
        if not residual.isfinite().all():
            raise InputError(
                f"the model gives numbers that are not finite (NaN) from layer {site} on.",
                "Its weights are damaged, or too large for this dtype: try --dtype float32.",
            )
    own = reading.logits.float()
    seen = Lens(parts)(reading.residuals[-1, -len(own) :], parts.depth)
    if not own.isfinite().all():
        raise InputError(f"the model gives logits that are not finite (NaN) at layer {parts.depth}, in norm or head.")
    check_model_row(parts, seen, own, noise=0.0)


@torch.inference_mode()
def row_noise(
    loaded: Loaded,
    ids: Sequence[int],
    sites: Iterable[int],
    heads: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
) -> Noise:
    """How far two logits of a row may move against one another, between the row alone and the same row among others.

    The last rows of a text (of its beginning, where it is long) are computed among all of its rows, and again one by
    one with a cache, as a decoder does. An argmax is decided among the largest logits: of each row's largest ones, the
    largest change of a difference of two, times a safety factor, at every site; no less than at the sites below it.
    Where the dtype is smaller than float32 a decoder rounds its logits, too. heads: {exit layer: map} put before the
    norm, as in Lens.
    """
    parts = loaded.anatomy
    text = torch.tensor([list(ids)[:NOISE_TOKENS]], device=parts.device)
    alone = min(NOISE_ROWS, text.shape[1])
    sites = list(sites)
    with Capture(parts, sites) as among:
        parts.decoder(input_ids=text, use_cache=False)
    cache = DynamicCache(config=parts.model.config)
    if alone < text.shape[1]:
        parts.decoder(input_ids=text[:, :-alone], use_cache=True, **{CACHE: cache})
    with Capture(parts, sites) as single:
        for column in text[:, -alone:].split(1, dim=1):
            parts.decoder(input_ids=column, use_cache=True, **{CACHE: cache})
    lens, found = Lens(parts, heads=heads), []
    for site in sites:
        together = lens(among[site][0, -2 * alone :], site)[-alone:]
        apart = torch.cat([lens(step[site][0], site) for step in single.passes])
        leaders = together.topk(min(NOISE_LOGITS, together.shape[-1])).indices
        moved = (together - apart).gather(-1, leaders)
        found.append(NOISE_SAFETY * float((moved.amax(-1) - moved.amin(-1)).max()))
    rounding = 0.0 if parts.dtype == torch.float32 else torch.finfo(parts.dtype).eps
    return Noise(tuple(accumulate(found, max)), rounding)
