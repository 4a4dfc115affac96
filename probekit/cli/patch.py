"""`probekit patch`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.terminal import notice, out, print_json
from probekit.errors import InputError
from probekit.presentation.tokens import clipped, columns

if TYPE_CHECKING:
    from probekit.probing.patching import Patching


def patch(
    model: options.Model,
    clean: Annotated[str, typer.Argument(metavar="CLEAN", help="The text whose answer is wanted.")],
    corrupted: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CORRUPTED]", help="A text of as many tokens; several for --how mean, resample."),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option("--sites", help="As residual,mlp or embedding,attention:3,7. [default: residual,attention,mlp]"),
    ] = None,
    positions: Annotated[str | None, typer.Option("--positions", help="As 0,2 or 1-5. [default: all]")] = None,
    how: Annotated[str, typer.Option("--how", help="patch, zero, mean, resample, or gradient: estimate.")] = "patch",
    answer: Annotated[str | None, typer.Option("--answer", help="A token. [default: the clean run's]")] = None,
    against: Annotated[str | None, typer.Option("--against", help="Its rival. [default: the corrupted run's]")] = None,
    exit_layers: options.ExitLayers = None,
    seed: options.Seed = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write the maps as a self-contained page.")] = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Change one value of the stream at a time, and see what the model says: layer by position."""
    from probekit.files import check_file_target
    from probekit.models.loaded import load
    from probekit.probing.attribution_patching import attribution_patch
    from probekit.probing.patching import patch as patch_model

    if html is not None:
        check_file_target(html, "--html")
    if (answer is None) != (against is None):
        raise InputError("--answer and --against belong together: two tokens whose logits are compared.")
    answers = None if answer is None else (answer, against)
    where = options.integers(positions, "--positions")
    named = None if sites is None else [_site(piece.strip()) for piece in sites.split(",")]
    loaded = load(model, adapter=adapter, device=device, dtype=dtype)
    others: Any = corrupted or None
    if how == "gradient":
        if others is None or len(others) != 1:
            raise InputError("'gradient' needs one corrupted text.")
        found = attribution_patch(loaded, clean, others[0], named, where, answers=answers)
    else:
        exits = options.integers(exit_layers, "--exit-layers")
        found = patch_model(
            loaded, clean, others, named, where, how=how, answers=answers, exits=exits, seed=seed  # type: ignore[arg-type]
        )  # fmt: skip
    if html is not None:
        _write_page(found, html)
        notice(f"wrote {html}", quiet=quiet)
    if as_json:
        print_json({"schema": "probekit/patch/1", **found.to_json()})
    else:
        _print(found)


def _site(name: str) -> str | int:
    return int(name) if name.isascii() and name.isdecimal() else name


def _write_page(found: Patching, path: Path) -> None:
    from probekit.presentation.patch_page import write_patch_page

    write_patch_page(found.to_html(), found.model, path)


def _print(found: Patching) -> None:
    """Sites from the last to the first, positions from left to right, as many as the window holds."""
    values = found.change if found.restored is None else found.restored
    most = max(1e-9, float(np.abs(values).max()))
    names = max(map(len, found.sites)) + 1
    fit = max(1, (out.width - names) // 7)
    for first in range(0, len(found.positions), fit):
        shown = range(first, min(first + fit, len(found.positions)))
        header = Text("".ljust(names), style="bold")
        for place in shown:
            header.append(_right(found.tokens[found.positions[place]]) + " ")
        out.print(header, no_wrap=True, overflow="crop")
        for row in reversed(range(len(found.sites))):
            line = Text(found.sites[row].ljust(names))
            for place in shown:
                value = float(values[row, place])
                line.append(f"{value:z6.2f} ", style=_shade(value / most))
            out.print(line, no_wrap=True, overflow="crop")
        out.print()
    base = float(found.base.difference)
    out.print(Text(f"{found.measure}. Clean {float(found.clean.difference):.2f}, unpatched {base:.2f}.", style="dim"))


def _right(token: str) -> str:
    text = clipped(token, 6)
    return " " * (6 - columns(text)) + text


def _shade(share: float) -> str:
    """Blue for what helps the answer, orange for what hurts it; letters and ground both set."""
    if abs(share) < 0.05:
        return ""
    blues = ("color(255) on color(18)", "color(255) on color(25)", "color(16) on color(117)")
    oranges = ("color(255) on color(52)", "color(255) on color(130)", "color(16) on color(215)")
    return (blues if share > 0 else oranges)[min(2, int(abs(share) * 3))]
