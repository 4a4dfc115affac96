"""Do smoothed costs foretell another calibration better than the measured ones?

    python analyses/smooth_costs.py [MODEL] -o docs/results/decoding/smooth-costs

Several calibrations of one model, one after the other. Each is smoothed: not at all; isotonically (verification takes
no less with more rows); by a plane in layers x rows. Its rounds, in autoregressive steps, are held against the mean of
all other calibrations as they were measured. Beside the error stand how often verification gets cheaper with one row
more, and the pair that each calibration would choose on the bundled prompts, with what it loses by the others' costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.optimize import isotonic_regression

from probekit.choice.choose import choose
from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.models.loaded import load
from probekit.prediction.predict import predict
from probekit.tracing.tracer import trace


def isotonic(costs: Costs) -> Costs:
    verify = {}
    for exit_layer in costs.early_s:
        rows = sorted(count for of, count in costs.verify_s if of == exit_layer)
        smooth = isotonic_regression([costs.verify_s[exit_layer, count] for count in rows]).x
        verify |= {(exit_layer, count): float(each) for count, each in zip(rows, smooth, strict=True)}
    return replace(costs, verify_s=verify)


def plane(costs: Costs) -> Costs:
    """Verification: a + b layers + c rows + d layers rows; early passes and heads: a line in the number of layers."""

    def fitted(columns: list[np.ndarray], seconds: list[float]) -> np.ndarray:
        design = np.stack([np.ones(len(seconds)), *columns], axis=1)
        return design @ np.linalg.lstsq(design, np.array(seconds), rcond=None)[0]

    keys, exits = list(costs.verify_s), list(costs.early_s)
    layers, rows = (np.array(each, float) for each in zip(*[(costs.depth - of, n) for of, n in keys], strict=True))
    verify = fitted([layers, rows, layers * rows], list(costs.verify_s.values()))
    early = fitted([np.array(exits, float)], list(costs.early_s.values()))
    return replace(
        costs, verify_s=dict(zip(keys, np.maximum(verify, 1e-9).tolist(), strict=True)),
        early_s=dict(zip(exits, np.maximum(early, 1e-9).tolist(), strict=True)),
    )  # fmt: skip


WAYS: dict[str, Callable[[Costs], Costs]] = {"measured": lambda costs: costs, "isotonic": isotonic, "plane": plane}


def surface(costs: Costs, longest: int) -> np.ndarray:
    """(exits, lengths): seconds of a round, in autoregressive steps."""
    seconds = [[costs.round_seconds(exit_layer, k) for k in range(1, longest + 1)] for exit_layer in costs.early_s]
    return np.array(seconds) / costs.autoregressive_s


def main(
    model: Annotated[str, typer.Argument()] = "tales-layerskip",
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("build/analyses/smooth-costs"),
    calibrations: Annotated[int, typer.Option("--calibrations", min=3)] = 6,
    longest: int = 8,
) -> None:
    """Do smoothed costs foretell another calibration better than the measured ones?"""
    loaded = load(model)
    prediction = predict(trace(loaded, max_new_tokens=64, statistics="agreement", top_prompts=0))
    found = [measure_costs(loaded, draft_lengths=[longest]) for _ in range(calibrations)]
    raw = np.array([surface(costs, longest) for costs in found])
    cheaper = [
        np.mean([costs.verify_s[of, n + 1] < costs.verify_s[of, n] for of, n in costs.verify_s if n <= longest])
        for costs in found
    ]
    speedups = []  # of every cell by every calibration as measured: {cell: speedup}
    choices = [choose(prediction, costs) for costs in found]
    for choice in choices:
        speedups.append({each.cell: each.speedup for each in choice.ranking})
    rows = []
    for name, smooth in WAYS.items():
        errors, losses, pairs = [], [], []
        for place, costs in enumerate(found):
            others = [other for other in range(calibrations) if other != place]
            errors.append(np.abs(surface(smooth(costs), longest) / raw[others].mean(axis=0) - 1))
            pair = choose(prediction, smooth(costs)).ranking[0].cell
            mean = {cell: float(np.mean([speedups[other][cell] for other in others])) for cell in speedups[0]}
            losses.append(1 - mean[pair] / max(mean.values()))
            pairs.append(list(pair))
        rows.append({
            "way": name, "error_median": float(np.median(errors)), "error_95": float(np.quantile(errors, 0.95)),
            "pairs": pairs, "loss_mean": float(np.mean(losses)), "loss_most": float(np.max(losses)),
        })  # fmt: skip
    told = [
        all(
            tuple(other.ranking[0].cell) in {each.cell for each in (choice.ranking[0], *choice.alike)}
            for other in choices
        )
        for choice in choices
    ]
    record = {
        "schema": "probekit/smooth-costs/1",
        "settings": {"model": Path(model).name, "calibrations": calibrations, "longest": longest,
                     "device": found[0].device, "dtype": found[0].dtype, "context": found[0].context},
        "versions": {package: version(package) for package in ("probekit", "torch", "transformers", "numpy", "scipy")},
        "blocks": [costs.block_count for costs in found],
        "verification_cheaper_with_a_row_more": [float(each) for each in cheaper],
        "autoregressive_s": [costs.autoregressive_s for costs in found],
        "choices_among_the_alike_of_every_other": float(np.mean(told)),
        "alike": [len(choice.alike) for choice in choices],
        "intervals": [list(choice.ranking[0].interval or ()) for choice in choices],
        "ways": rows,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    typer.run(main)
