"""How an exit drafts a tree in a decoder, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probekit.drafting.keys import DrafterKey
from probekit.drafting.policies import Policy
from probekit.drafting.proposers import ExitLayerDrafts
from probekit.drafting.trees import DraftTree, TreeShape
from probekit.errors import InputError
from probekit.lens.reductions import block_maxima, topk_lowest_id
from probekit.models.loaded import Loaded


class ExitTreeDrafts:
    """An exit of a model and the shape of its trees. drafts_tokens: the most nodes of a round."""

    helpers: Sequence[Loaded] = ()

    def __init__(self, key: DrafterKey, exit_drafts: ExitLayerDrafts, shape: TreeShape) -> None:
        self.key = key
        self.exit_drafts = exit_drafts
        self.shape = shape
        self.drafts_tokens = len(shape.paths)

    def open(self, batch: Any, engine: Any, *helpers: Any) -> ExitTreeProposer:
        if not batch.plan.sampling.greedy:
            raise InputError("a tree is verified greedily only.", "Decode greedily, or draft a chain.")
        return ExitTreeProposer(batch, engine, self.exit_drafts, self.shape)


class ExitTreeProposer:
    """Draft level by level with layers 0..E-1, norm and head; verify with layers E..L-1 on all nodes' own residuals.

    A round of d levels costs d + 1 passes of the early layers, over the nodes of each level, a head for each level but
    the last, over those with children, and one pass of the late layers with the head over all nodes.
    """

    def __init__(self, batch: Any, engine: Any, drafts: ExitLayerDrafts, shape: TreeShape) -> None:
        self.batch = batch
        self.engine = engine
        self.exit_layer = drafts.exit_layer
        self._head = drafts.head.with_engine(engine)
        self.shape = shape
        self.residuals: list[Tensor] = []  # of each level, (rows, nodes, width)
        self.inner: list[int] = []  # nodes with children of each level but the last

    def prefill(self, prompt: Tensor) -> Tensor:
        return self.engine.full(prompt, self.engine.places([0], prompt.shape[1]))

    def propose(self, draft_length: int, policy: Policy) -> DraftTree:
        if policy.needs_confidence:
            raise InputError("a tree is drafted whole: no policy stops it.", "Draft with a fixed length.")
        shape, batch = self.shape, self.batch
        levels = [min(shape.depth, row.limit(draft_length)) for row in batch.rows]
        tokens, self.residuals, self.inner = batch.last, [], []
        first, last = 0, 1  # the nodes of a level
        for level in range(max(levels) + 1):
            nodes = range(first, last)
            residual = self.early(tokens[:, first:last], nodes)
            if level == max(levels):
                break
            wanted = [place for place, node in enumerate(nodes) if shape.children[node]]
            widths = [len(shape.children[nodes[place]]) for place in wanted]
            best = self.best(residual[:, wanted], max(widths))
            self.inner.append(len(wanted))
            tokens = torch.cat([tokens, *(best[:, at, :width] for at, width in enumerate(widths))], dim=1)
            first, last = last, tokens.shape[1]
        return DraftTree(
            tokens, shape.parents[: last - 1], None, [int(shape.sizes[level]) for level in levels], branches=True
        )

    def verify(self, tree: DraftTree) -> Tensor:
        residuals = torch.cat(self.residuals, dim=1)
        return self.engine.late(residuals, self._places(range(residuals.shape[1])), self.exit_layer)

    def early(self, tokens: Tensor, nodes: range) -> Tensor:
        """Layers 0..E-1 over these nodes. tokens: (rows, nodes)."""
        self.residuals.append(self.engine.early(tokens, self._places(nodes), self.exit_layer))
        return self.residuals[-1]

    def _places(self, nodes: range) -> Any:
        return self.engine.tree_places(self.batch.positions, self.shape, nodes)

    def best(self, residual: Tensor, most: int) -> Tensor:
        """(rows, nodes, most) the best tokens, equal logits by the lowest id, as a trace ranks them."""
        logits = self._head.all_rows(residual)
        values, ids = logits.topk(min(most + 1, logits.shape[-1]), dim=-1)
        if bool((values[..., :-1] > values[..., 1:]).all()):
            return ids[..., :most]
        logits = logits.contiguous()
        return topk_lowest_id(logits, block_maxima(logits), most)[1]
