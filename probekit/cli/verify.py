"""`probekit verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probekit.cli import options
from probekit.cli.terminal import notice, out, print_json


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `trace`, `study` or `export` wrote: RUN, STUDY or DIR.")
    ],
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check again that a run, a study or an exported choice is as it was written: files, checksums, schema, weights."""
    from probekit.verification.verify import verify as verify_folder

    found = verify_folder(folder)
    if as_json:
        print_json(found.to_json())
    else:
        for finding in found:
            out.print(str(finding), markup=False, soft_wrap=True)
        for each in found.weights:
            if each.state == "not reachable":
                notice(f"the weights of {each.model} could not be checked: {each.why}.", quiet=quiet)
        if found.whole:
            same = [each.model for each in found.weights if each.state == "same"]
            of = f"; the weights of {', '.join(dict.fromkeys(same))} are those that it was made with" if same else ""
            notice(f"{folder} is as it was written: {found.files} files have their checksums{of}.", quiet=quiet)
    if not found.whole:
        raise typer.Exit(1)
