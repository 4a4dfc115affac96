"""Residuals as a batch-invariant decoder has them: read by its own engine, in blocks, bit for bit the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from probekit.decoding.batch_invariant import InvariantEngine
from probekit.errors import SelfCheckError
from probekit.lens.noise import Noise
from probekit.models.loaded import Loaded
from probekit.tracing.backend import Reading

NOISE_TOKENS = 64  # of a text, read whole and step by step


class BlockBackend:
    """Reads text after text. A text that comes in segments goes on in the cache of the segment before."""

    def __init__(self, loaded: Loaded) -> None:
        self._parts = loaded.anatomy
        self._engine: InvariantEngine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine = None

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Any], rows: Tensor) -> Reading:
        residuals, logits = [], []
        for ids, positions, text in zip(inputs["input_ids"], inputs["position_ids"], rows, strict=True):
            own = ids[text]
            engine = self._opened(int(positions[text][0]), len(own))
            read = read_text(engine, own, int(positions[text][0]))
            residuals.append(read)
            logits.append(engine.logits(engine.parts.norm(read[-1, -1:])))
        return Reading(torch.cat(residuals, dim=1), torch.cat(logits))

    def _opened(self, start: int, tokens: int) -> InvariantEngine:
        """An engine with room for these tokens, which holds the text up to `start`."""
        before, engine = self._engine, InvariantEngine(self._parts, 1, start + tokens)
        if start and before is not None:
            for here, there in ((engine.cache.keys, before.cache.keys), (engine.cache.values, before.cache.values)):
                here[..., :start, :] = there[..., :start, :]
        self._engine = engine
        return engine


def read_text(engine: InvariantEngine, ids: Tensor, start: int) -> Tensor:
    """The residuals of one text's tokens, (tokens,), the first of them at position `start`: (L+1, tokens, width)."""
    parts = engine.parts
    embedded = parts.family.embed(parts, ids[None])
    engine.watch(range(1, parts.depth + 1))
    try:
        engine.late(embedded, engine.places([start], len(ids)), 0)
        sites = [torch.cat(engine.watched[site], dim=1) for site in range(1, parts.depth + 1)]
    finally:
        engine.watch(())
    return torch.cat([embedded, *sites])


@torch.inference_mode()
def invariant_noise(loaded: Loaded, ids: Sequence[int]) -> Noise:
    """How far residuals of a text read whole lie from those of single steps: 0, or SelfCheckError.

    ids: of which the first NOISE_TOKENS are read.
    """
    text = torch.tensor(list(ids)[:NOISE_TOKENS], device=loaded.device)
    whole, steps = (InvariantEngine(loaded.anatomy, 1, len(text)) for _ in range(2))
    among = read_text(whole, text, 0)
    alone = torch.cat([read_text(steps, text[at : at + 1], at) for at in range(len(text))], dim=1)
    if not torch.equal(among, alone):
        raise SelfCheckError(
            f"{loaded.name} is not batch-invariant here: residuals of a token alone lie up to "
            f"{float((among - alone).abs().max()):.2g} from those of the same token among others.",
            "Trace it without batch-invariance.",
        )
    return Noise()
