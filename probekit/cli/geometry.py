"""`probekit geometry`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from probekit.cli import options
from probekit.cli.terminal import print_json, print_table, progress_bars

if TYPE_CHECKING:
    from probekit.probing.stream_geometry import StreamGeometry


def geometry(
    run: options.Run,
    rows: Annotated[int, typer.Option("--rows", help="Positions that CKA and principal angles are of.")] = 1024,
    directions: Annotated[int, typer.Option("--directions", help="Of each layer's principal subspace.")] = 16,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The residual stream by layer: its length, who wrote it, how near it is to its end, and acceptance beside it."""
    from probekit.probing.stream_geometry import stream_geometry
    from probekit.traces.trace import Trace
    from probekit.tracing.traced_models import model_of

    trace = Trace.open(run)
    loaded = model_of(trace.manifest.model, trace.manifest.settings, device, dtype)
    with progress_bars(quiet or as_json) as bars:
        found = stream_geometry(loaded, trace, rows=rows, directions=directions, progress=bars)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)


HEADS = {
    "norm": "length", "embedding": "embedding", "attention": "attention", "mlp": "MLP", "step": "step",
    "cosine": "cos before", "final_cosine": "cos last", "cka": "CKA last", "overlap": "overlap",
    "agreement": "agreement",
}  # fmt: skip


def _show(found: StreamGeometry) -> None:
    wide = found.to_pandas()
    names = [name for name in HEADS if name in wide]
    print_table(
        f"the residual stream of {found.model}, over {found.positions} positions",
        ["layer", *(HEADS[name] for name in names)],
        [[int(row["layer"]), *(_shown(row[name]) for name in names)] for _, row in wide.iterrows()],
        "embedding, attention, MLP: their shares of the stream, which add up to 1. step: |change| / length. cos, CKA, "
        "overlap: with the layer before, and with the last. agreement: greedy acceptance, if drafted there.",
    )
    print_table(
        "rank correlation with agreement, over the exits",
        ["quantity", "of values", "of steps"],
        [
            [HEADS[row["quantity"]], _shown(row["correlation"]), _shown(row["of_steps"])]
            for _, row in found.with_acceptance().iterrows()
        ],
        "of steps: of what both change from one exit to the next, so that it is not enough that both rise with depth.",
    )


def _shown(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
