"""`probekit models`."""

from __future__ import annotations

from probekit.cli import options
from probekit.cli.terminal import print_json, print_table


def models(
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The bundled models and where they come from."""
    from probekit.models.shipped import bundled_models

    rows = [model.to_json() for model in bundled_models()]
    if as_json:
        print_json({"schema": "probekit/models/1", "models": rows})
        return
    print_table(
        "bundled models",
        ["name", "layers", "tied", "parameters", "trained on"],
        [[row[key] for key in ("name", "layers", "tied", "parameters", "trained_on")] for row in rows],
    )
