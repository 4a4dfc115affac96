"""`probekit probe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from probekit.cli import options
from probekit.cli.terminal import notice, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from probekit.probing.probe_curve import ProbeCurve


def probe(
    run: options.Run,
    label: Annotated[
        str,
        typer.Option(
            "--label",
            metavar="NAME|FILE",
            help="accepted, agrees, entropy, token-class, looped, position; or a file: prompt, position, a column.",
        ),
    ] = "accepted",
    layers: Annotated[str | None, typer.Option("--layers", help="As 3,6 or 1-11. [default: all kept]")] = None,
    estimator: Annotated[str, typer.Option("--estimator", help="logistic, mlp or ridge.")] = "logistic",
    folds: Annotated[int, typer.Option("--folds", help="That prompts are dealt into.")] = 4,
    shuffles: Annotated[int, typer.Option("--shuffles", help="Of labels, for the control.")] = 4,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What the residual stream knows of a label, layer by layer, beside a control and baselines."""
    from probekit.probing.probe import probe as probe_trace
    from probekit.traces.trace import Trace

    chosen = options.integers(layers, "--layers")
    trace = Trace.open(run)
    with progress_bars(quiet or as_json) as bars:
        curve = probe_trace(
            trace, label, chosen, estimator=estimator, folds=folds, shuffles=shuffles, seed=seed, progress=bars
        )
    if as_json:
        print_json(curve.to_json())
        return
    best = curve.best
    if best is not None:
        notice(
            f"{curve.label} is read best off layer {best.layer}: {curve.scored} {best.score.value:.3f}.", quiet=quiet
        )
    _show(curve)


def _show(curve: ProbeCurve) -> None:
    def shown(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    print_table(
        f"{curve.label} in {curve.model}: {curve.scored} of {curve.estimator} probes, on prompts not fitted on",
        ["layer", "probe", "95 %", "shuffled labels", "lens only", "position only", "with lens", "Brier", "ECE",
         "rows"],
        [
            [each.layer, each.score.known, each.score.interval, each.control.known, each.confidence.known,
             each.position.known, each.together.known, shown(each.brier), shown(each.ece), each.positions]
            for each in curve.layers
        ],
        "lens only: a probe of the lens's probability, entropy and margin at the layer. with lens: of the residual and "
        "these. Folds are of whole prompts; regularisation is chosen within the training part.",
    )  # fmt: skip
