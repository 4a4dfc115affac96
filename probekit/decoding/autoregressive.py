"""One token a pass: the model alone, and its truncation at an exit layer."""

from __future__ import annotations

from torch import Tensor

from probekit.decoding.batch import DecodeBatch
from probekit.decoding.caches import PassPositions
from probekit.decoding.decoder import Decoder
from probekit.decoding.engine import Engine
from probekit.drafting.trees import DraftTree
from probekit.models.loaded import Loaded


class Autoregressive(Decoder):
    """The model's own decoding: what every lossless method must reproduce, and what speedups are measured against."""

    name = "autoregressive"

    def _run(self, batch: DecodeBatch) -> None:
        engine = self._engine(batch.plan)
        prompt = batch.prompt_tokens()
        batch.begin([engine], self._pass(engine, prompt, engine.places([0], prompt.shape[1])))
        while batch.rows:
            states = self._pass(engine, batch.last, engine.places(batch.positions, 1))
            batch.verify(DraftTree.chain(batch.last, None, [0] * len(batch.rows)), engine.logits(states))

    def _pass(self, engine: Engine, tokens: Tensor, places: PassPositions) -> Tensor:
        """Hidden states that the head reads, (rows, tokens, width)."""
        return engine.full(tokens, places)


class EarlyExit(Autoregressive):
    """Layers 0..E-1, the final norm and the head, without verification: fast, and lossy.

    Prompt and continuation both run through the early layers only.
    """

    name = "early-exit"
    lossless = False

    def __init__(self, loaded: Loaded, exit_layer: int) -> None:
        super().__init__(loaded)
        self.exit_layer: int = loaded.anatomy.check_exit(exit_layer)

    def _pass(self, engine: Engine, tokens: Tensor, places: PassPositions) -> Tensor:
        return engine.parts.norm(engine.early(tokens, places, self.exit_layer))
