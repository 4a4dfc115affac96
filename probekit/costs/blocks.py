"""The blocks of a calibration, and what costs they make, all together or drawn again. Needs no torch.

A block is one sweep over all steps, in an order of its own, autoregressive steps among them: a machine that slows down
slows all steps of a block. Kept of each is the median of every step, so that costs can be made again from blocks that
are drawn with replacement: how much a speedup owes to the moment in which it was calibrated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from probekit.costs.profile import Costs, DraftModelCosts
from probekit.costs.trees import assemble_trees

QUANTILES = (0.2, 0.5, 0.8)
MOST_DRAFTS = 4  # of a timed round: further ones take as long as the last of these


def assemble(
    times: Mapping[str, Sequence[float]],
    exits: Sequence[int],
    rows: Sequence[int],
    costs: Costs,
    draft_model: str | None = None,
) -> Costs:
    """Fill in every exit and width of `costs` from the medians of those that were timed."""
    median = {step: float(np.median(each)) for step, each in times.items()}
    quantiles = {step: np.quantile(each, QUANTILES).tolist() for step, each in sorted(times.items())}
    return replace(_of_medians(median, exits, rows, costs, draft_model), quantiles=quantiles)


def _of_medians(
    median: Mapping[str, float], exits: Sequence[int], rows: Sequence[int], costs: Costs, draft_model: str | None
) -> Costs:
    every, widths = range(1, costs.depth), range(1, rows[-1] + 1)
    early = np.array([median[f"early {exit_layer}"] for exit_layer in exits])
    verify = np.array([[median[f"verify {exit_layer} {count}"] for count in rows] for exit_layer in exits])
    by_exit = np.stack([np.interp(every, exits, column) for column in verify.T], axis=1)  # (exits, timed widths)
    by_width = np.stack([np.interp(widths, rows, row) for row in by_exit])  # (exits, widths)
    verify_s = {
        (exit_layer, count): float(by_width[exit_layer - 1, count - 1]) for exit_layer in every for count in widths
    }
    drafted = min(rows[-1] - 1, MOST_DRAFTS)
    # "booking" is what the accounting of a round is called in the quantiles that profiles keep
    accounting = max(0.0, (median[f"booking {drafted}"] - median["booking 0"]) / drafted)
    heads = np.array([median[f"head {exit_layer}"] for exit_layer in exits]) + accounting
    colder = np.array([median[f"early first {exit_layer}"] for exit_layer in exits]) - early
    colder = np.maximum(colder + median["head first"] + accounting - heads, 0.0)
    errors = [_distance_from_line(exits, column) for column in (early, *verify.T)]
    helper = None
    if draft_model is not None:
        whole = np.interp(widths, rows, [median[f"verify all {count}"] for count in rows]).tolist()
        first = median["drafter first"]
        verify_all = dict(zip(widths, whole, strict=True))
        helper = DraftModelCosts(draft_model, median.get("drafter step", first), first, verify_all)
    return replace(
        costs,
        autoregressive_s=median["autoregressive"],
        early_s=dict(zip(every, np.interp(every, exits, early).tolist(), strict=True)),
        head_s=float(np.median(heads)),
        heads_s=dict(zip(every, np.interp(every, exits, heads).tolist(), strict=True)),
        verify_s=verify_s,
        overhead_s=median["booking 0"],
        cold_s=dict(zip(every, np.interp(every, exits, colder).tolist(), strict=True)),
        draft_model=helper,
        trees=assemble_trees(median, costs.depth, verify_s),
        fit_error=max(errors) if len(exits) > 2 else None,
    )


def _distance_from_line(exits: Sequence[int], seconds: np.ndarray) -> float:
    """Largest relative distance of the points between the ends from the line through the ends."""
    line = np.interp(exits, [exits[0], exits[-1]], [seconds[0], seconds[-1]])
    return float(np.max(np.abs(line - seconds) / seconds))


def redrawn(costs: Costs, resamples: int, seed: int = 0) -> Iterator[Costs]:
    """Costs made again from as many blocks, drawn with replacement; nothing where there are fewer than two."""
    count = costs.block_count
    if count < 2:
        return
    verified = [step.split() for step in costs.blocks if step.startswith("verify ")]
    exits = sorted({int(of) for _, of, _ in verified if of != "all"})
    rows = sorted({int(width) for _, _, width in verified})
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    medians = {step: np.median(np.array(each[:count])[drawn], axis=1).tolist() for step, each in costs.blocks.items()}
    for again in range(resamples):
        median = {step: each[again] for step, each in medians.items()}
        yield _of_medians(median, exits, rows, costs, costs.drafter)
