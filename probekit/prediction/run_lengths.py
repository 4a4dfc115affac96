"""How long agreement lasts, against the geometric law that independent acceptances would follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from probekit.drafting.keys import check_exits

if TYPE_CHECKING:
    from probekit.traces.trace import Trace


@dataclass(frozen=True, eq=False)
class RunLengths:
    """How long agreement lasts, against the geometric law that independent acceptances would follow.

    Parameters
    ----------
    exit_layer: E.
    chance: share of the output positions that agree: the law's parameter a.
    counts: (longest + 1,) runs of 0, 1, 2, ... agreements that a disagreement ended; a run starts at the beginning
        of a text and after each disagreement. What the end of a text cut off is not counted.
    geometric: (longest + 1,) how many are expected when every position agrees with chance a by itself, in texts of
        these lengths: a^r (1 - a) (1 + (N - 1 - r) (1 - a)) in a text of N > r tokens.
    """

    exit_layer: int
    chance: float
    counts: np.ndarray
    geometric: np.ndarray

    def to_pandas(self) -> pd.DataFrame:
        """Columns exit_layer, run, count, geometric."""
        run = np.arange(len(self.counts))
        columns = {"exit_layer": self.exit_layer, "run": run, "count": self.counts, "geometric": self.geometric}
        return pd.DataFrame(columns)


def run_lengths(trace: Trace, exit_layers: Iterable[int] | None = None) -> list[RunLengths]:
    """Run lengths of agreement over the generated tokens, for each exit layer."""
    exits = check_exits(exit_layers, trace.depth)
    texts = [trace.agreement(prompt) for prompt in trace.prompts]
    tokens = np.array([text.shape[1] for text in texts])
    longest = int(tokens.max()) - 1
    r = np.arange(longest + 1)
    found = []
    for exit_layer in exits:
        runs: list[np.ndarray] = []
        agreed = 0
        for text in texts:
            breaks = np.flatnonzero(~text[exit_layer])
            runs.append(np.diff(breaks, prepend=-1) - 1)
            agreed += int(text[exit_layer].sum())
        a = agreed / int(tokens.sum())
        places = tokens[:, None] - 1 - r  # starts that a run of r and its end leave room for, but for the first
        expected = np.where(places >= 0, a**r * (1 - a) * (1 + places * (1 - a)), 0.0).sum(axis=0)
        counts = np.bincount(np.concatenate(runs), minlength=longest + 1)
        found.append(RunLengths(exit_layer, a, counts, expected))
    return found
