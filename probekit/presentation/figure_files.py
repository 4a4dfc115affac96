"""How figures are written: the same bytes for the same study."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

from matplotlib.backends.backend_pgf import LatexError
from matplotlib.figure import Figure

from probekit.errors import InputError
from probekit.files import atomic_bytes, make_folder

# No dates, no versions: a figure changes only when what it shows does.
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": "probekit", "Producer": "matplotlib"},
    "svg": {"Date": None, "Creator": "probekit"},
    "png": {"Software": "probekit"},
}


def canvas(width: float, height: float, layout: Literal["constrained", "compressed", "none"] = "constrained") -> Figure:
    """An empty figure of this size in inches, which leaves room for its labels by itself.

    layout: "compressed" for panels of a fixed shape, "none" where they are placed by hand.
    """
    return Figure(figsize=(width, height), layout=None if layout == "none" else layout)


def save(figure: Figure, folder: Path, name: str, kinds: Sequence[str]) -> list[Path]:
    """Write `folder/name` as each of these kinds, whole or not at all; returns the files.

    Raises InputError where LaTeX, which was asked to set the text, could not.
    """
    make_folder(folder)
    try:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, so that all kinds are the same picture
        return [_write(figure, folder / f"{name}.{kind}", kind) for kind in kinds]
    except (RuntimeError, LatexError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"LaTeX could not set {name}: {said[:300]}", "`tlmgr` or the system's packages have what it lacks."
        ) from None


def _write(figure: Figure, path: Path, kind: str) -> Path:
    if kind == "pgf":
        for drawn in figure.findobj(include_self=False):
            drawn.set_rasterized(False)  # all of it in one file
        text = StringIO()
        figure.savefig(text, format=kind)
        # The numbers of ticks are set by a command that matplotlib leaves to the document.
        atomic_bytes(path, (r"\providecommand{\mathdefault}[1]{#1}%" + "\n" + text.getvalue()).encode())
        return path
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, metadata=_METADATA[kind])
    atomic_bytes(path, buffer.getvalue())
    return path
