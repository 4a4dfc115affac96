"""`probekit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probekit.cli import options
from probekit.cli.terminal import out, print_json


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `probekit study` wrote.")],
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the HTML report of a study: one self-contained file."""
    from probekit.presentation.report import write_report

    page = write_report(folder)
    if as_json:
        print_json({"schema": "probekit/report/1", "report": str(page), "bytes": page.stat().st_size})
    else:
        out.print(str(page), markup=False)
