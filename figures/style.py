"""How a paper's figures look, and how they are written: the same bytes for the same study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

from probekit.presentation import plots
from probekit.traces.storage import atomic_bytes

ONE_COLUMN = 3.35
TWO_COLUMNS = 6.9
PAGE = 9.0
"""Widths of a column and of a page's text, and the height that a figure may take; inches."""

KINDS = ("pdf", "svg", "png")
# No dates, no versions: a figure changes only when what it shows does.
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": "probekit", "Producer": "matplotlib"},
    "svg": {"Date": None, "Creator": "probekit"},
    "png": {"Software": "probekit"},
}


@contextmanager
def paper() -> Iterator[None]:
    """8-point type, embedded fonts, thin lines; whatever was set before comes back."""
    with matplotlib.rc_context(plots.STYLE):
        yield


def canvas(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """An empty figure of this size in inches, which leaves room for its labels by itself.

    layout: "compressed" for panels of a fixed shape.
    """
    return Figure(figsize=(width, height), layout=layout)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `folder/name` as PDF, SVG and PNG, each whole or not at all; returns the three."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, so that the three are the same picture
    written = []
    for kind in KINDS:
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, metadata=_METADATA[kind])
        path = folder / f"{name}.{kind}"
        atomic_bytes(path, buffer.getvalue())
        written.append(path)
    return written
