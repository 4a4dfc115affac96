"""`probekit compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.terminal import out, print_json, print_table


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that `probekit trace` wrote.")],
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Tied, untied and early-exit-trained models side by side, on the same prompts."""
    from probekit.traces.trace import Trace
    from probekit.tying.compare import compare_traces

    comparison = compare_traces([Trace.open(run) for run in runs])
    if as_json:
        print_json(comparison.to_json())
        return
    for verdict in comparison.verdicts():
        out.print(Text(verdict))
    for table in comparison.tables():
        print_table(table.title, table.columns, table.rows, table.footnote)
