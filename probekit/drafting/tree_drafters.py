"""An exit that drafts a tree: its best tokens after each of its best tokens. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probekit.drafting.drafters import ExitLayer, Outlook
from probekit.drafting.keys import TREE, DrafterKey
from probekit.drafting.trees import TreeShape, no_invariant_trees
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.drafting.proposers import BoundDrafter
    from probekit.models.loaded import Loaded
    from probekit.traces.trace import Trace


@dataclass(frozen=True, eq=False)
class TreeDrafts:
    """An exit whose drafts are a tree of its best tokens, verified in one pass with a tree mask. Greedy text only.

    While the model's own token is among a node's children the round goes on below it: the rank of that token at the
    exit, which a trace holds for every position, decides every round. Exact but for near-ties of the ranks, and where a
    decoder rounds logits to 16 bits: a trace holds ranks of unrounded ones.
    """

    exit: ExitLayer
    shape: TreeShape

    def __post_init__(self) -> None:
        if self.exit.rows is not None:
            raise InputError("a tree drafts with the whole head: ranks among fewer rows are not in a trace.")

    @property
    def key(self) -> DrafterKey:
        return DrafterKey(TREE, self.exit.exit_layer, f"tree:{self.shape}", exit_heads=self.exit.exit_heads)

    def outlook(self, trace: Trace, prompt: int, longest: int) -> Outlook:
        """Both count levels."""
        if trace.manifest.settings.text != "greedy":
            raise InputError("trees are predicted along greedy text, and decoded greedily.", "Trace greedily.")
        depth = min(longest, self.shape.depth)
        run = self.shape.runs(trace.values(prompt, "rank")[self.exit.exit_layer], depth)
        return Outlook(run, np.full(len(run), depth, dtype=np.int32))

    def signal(self, trace: Trace, prompt: int) -> np.ndarray:
        """(N,) bool: the model's token is among the first level's drafts."""
        return self.outlook(trace, prompt, 1).run > 0

    def near_ties(self, trace: Trace, prompt: int) -> np.ndarray:
        """(N,) bool: of the exit's two best tokens; ties of further ranks are not in a trace."""
        return self.exit.near_ties(trace, prompt)

    def overlap(self, trace: Trace, prompt: int) -> np.ndarray:
        raise InputError("a tree is drafted along greedy text only.")

    def confidence(self, trace: Trace, prompt: int, of: str = "probability") -> np.ndarray:
        raise InputError("a tree is drafted whole: no policy stops it.", "Draft with a fixed length.")

    def on(self, loaded: Loaded) -> BoundDrafter:
        from probekit.drafting.proposers import ExitLayerDrafts
        from probekit.drafting.tree_proposer import ExitTreeDrafts

        if loaded.anatomy.batch_invariant:
            raise no_invariant_trees()
        bound = self.exit.on(loaded)
        if not isinstance(bound, ExitLayerDrafts):
            raise InputError(f"{self.key.label} cannot draft: its exit is none of this model.")
        return ExitTreeDrafts(self.key, bound, self.shape)
