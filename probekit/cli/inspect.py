"""`probekit inspect`."""

from __future__ import annotations

from probekit.cli import options
from probekit.cli.terminal import notice, print_json, print_table, show


def inspect(
    model: options.Model,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The anatomy of a model: layers, widths, tied or not, parameters, bytes, sites."""
    from probekit.lens.discovered import check_discovered
    from probekit.models.loaded import describe, load

    loaded = load(model, adapter=adapter, device=device, dtype=dtype)
    check_discovered(loaded.anatomy)
    description = describe(loaded)
    if loaded.remark:
        notice(loaded.remark, quiet=quiet)
    if as_json:
        print_json(description)
        return
    print_table(
        f"{description['name']}",
        ["what", "value"],
        [
            [key.replace("_", " "), show(value) or "-"]
            for key, value in description.items()
            if key not in ("schema", "name")
        ],
    )
