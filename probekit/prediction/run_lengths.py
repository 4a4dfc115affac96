"""How long agreement lasts, against the geometric law that independent agreements would follow.

A run starts at the beginning of a text and after each disagreement, and a disagreement ends it. The run that the end
of a text cuts off is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from probekit.drafting.keys import check_exits
from probekit.prediction.intervals import Estimate, draws, spread

if TYPE_CHECKING:
    from probekit.traces.trace import Trace


@dataclass(frozen=True, eq=False)
class RunLengths:
    """Runs of agreement of one exit layer, over all texts. N is the longest text's length.

    Parameters
    ----------
    exit_layer: E.
    counts_of_prompt: (prompts, N) runs of 0, 1, ... N - 1 agreements in each text.
    agreed_of_prompt: (prompts,) output positions that agree.
    tokens_of_prompt: (prompts,) output positions.
    """

    exit_layer: int
    counts_of_prompt: np.ndarray
    agreed_of_prompt: np.ndarray
    tokens_of_prompt: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """(N,) runs of each length in all texts."""
        return self.counts_of_prompt.sum(axis=0)

    @property
    def chance(self) -> float:
        """Share of the output positions that agree: the law's parameter a."""
        return int(self.agreed_of_prompt.sum()) / int(self.tokens_of_prompt.sum())

    @cached_property
    def geometric(self) -> np.ndarray:
        """(N,) runs of each length that are expected when every position agrees with chance a by itself."""
        return self._expected(np.ones((1, len(self.tokens_of_prompt))))[0]

    def variance_ratio(self) -> Estimate:
        """Variance of the run lengths / that of the geometric law, with its bootstrap interval over prompts.

        1: as independent agreements have; above 1: longer runs and longer gaps. NaN without a run.
        """
        prompts = len(self.tokens_of_prompt)
        value = float(self._variance_ratios(np.ones((1, prompts)))[0])
        low, high = spread(self._variance_ratios(draws(prompts)), prompts) if prompts > 1 else (np.nan, np.nan)
        return Estimate(value, float(low), float(high))

    def to_pandas(self) -> pd.DataFrame:
        """Columns exit_layer, run, count, geometric."""
        run = np.arange(len(self.counts))
        columns = {"exit_layer": self.exit_layer, "run": run, "count": self.counts, "geometric": self.geometric}
        return pd.DataFrame(columns)

    def _expected(self, times: np.ndarray) -> np.ndarray:
        """(draws, N): the law's runs in texts that are drawn `times`, (draws, prompts), with the chance of each draw.

        A text of n > r tokens is expected to hold a^r (1 - a) (1 + (n - 1 - r) (1 - a)) runs of r agreements: one may
        start at its beginning and after each disagreement, and the disagreement that ends it must lie in the text.
        """
        r = np.arange(self.counts_of_prompt.shape[1])
        a = ((times @ self.agreed_of_prompt) / (times @ self.tokens_of_prompt))[:, None]
        from_beginning = a**r * (1 - a)
        expected = np.zeros((len(times), len(r)))
        for tokens, drawn in zip(self.tokens_of_prompt, times.T, strict=True):
            starts = tokens - 1 - r  # positions after the first at which a run of r can start
            of_text = np.where(starts >= 0, from_beginning * (1 + starts * (1 - a)), 0.0)
            expected += drawn[:, None] * of_text
        return expected

    def _variance_ratios(self, times: np.ndarray) -> np.ndarray:
        """(draws,): NaN where no run is left."""
        r = np.arange(self.counts_of_prompt.shape[1])
        observed, expected = _variance(times @ self.counts_of_prompt, r), _variance(self._expected(times), r)
        return np.where(expected > 0, observed / np.where(expected > 0, expected, 1.0), np.nan)


def run_lengths(trace: Trace, exit_layers: Iterable[int] | None = None) -> list[RunLengths]:
    """Run lengths of agreement over the generated tokens, for each exit layer."""
    exits = check_exits(exit_layers, trace.depth)
    texts = [trace.agreement(prompt) for prompt in trace.prompts]
    tokens = np.array([text.shape[1] for text in texts])
    longest = int(tokens.max())
    return [
        RunLengths(
            exit_layer,
            np.stack([np.bincount(completed_runs(text[exit_layer]), minlength=longest) for text in texts]),
            np.array([text[exit_layer].sum() for text in texts]),
            tokens,
        )
        for exit_layer in exits
    ]


def completed_runs(agrees: np.ndarray) -> np.ndarray:
    """Lengths of the runs of agreement that a disagreement ended, 0 included: (disagreements,)."""
    ends = np.flatnonzero(~np.asarray(agrees, dtype=bool))
    return np.diff(ends, prepend=-1) - 1


def _variance(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(draws,): variance of values, (n,), that are weighted, (draws, n); NaN without weight."""
    total = weights.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = weights @ values / total
        return weights @ values**2 / total - mean**2
