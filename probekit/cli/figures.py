"""`probekit figures`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probekit.cli import options
from probekit.cli.terminal import out, print_json

if TYPE_CHECKING:
    from probekit.presentation.paper.figures import PaperFigure

Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="Figures whose names begin so, as fig03. [default: all]"),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to. [default: the study's paper/]")
]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", help="pdf, svg, png or pgf, or several as pdf,pgf. [default: pdf,svg,png]"),
]
Font = Annotated[
    str | None,
    typer.Option("--font", help="An installed font, or serif, sans-serif, monospace. [default: DejaVu Sans]"),
]
Width = Annotated[
    str | None,
    typer.Option("--width", help="Of the page's text: 5.5in, 14cm, 397pt; a column is half of it. [default: 6.9in]"),
]
UseTeX = Annotated[bool, typer.Option("--usetex", help="LaTeX sets the labels, in the fonts that papers have.")]


def figures(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A folder that `probekit study` wrote.")],
    output: Output = None,
    only: Only = None,
    formats: Formats = None,
    font: Font = None,
    width: Width = None,
    usetex: UseTeX = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw a study's figures for a paper, and write its tables as LaTeX, with captions and alternative texts."""
    written = []
    for path in files(study, output, only, formats, font, width, usetex):
        written.append(str(path))
        if not as_json:
            out.print(str(path), markup=False, soft_wrap=True)
    if as_json:
        folder = output or study / "paper"
        print_json({"schema": "probekit/figures/1", "folder": str(folder), "files": written})


def files(
    study: Path,
    output: Path | None,
    only: list[str] | None,
    formats: list[str] | None,
    font: str | None,
    width: str | None,
    usetex: bool,
    figures: Mapping[str, PaperFigure] | None = None,
) -> Iterator[Path]:
    """Draw and write what these options ask for; yields every file. figures: by default the package's own."""
    from probekit.presentation.paper.figures import FIGURES
    from probekit.presentation.paper.look import PAGE, Look, Page, kinds_of
    from probekit.presentation.paper.make import make
    from probekit.presentation.study_folder import open_study

    page = PAGE if width is None else Page.of(width)
    look = Look(kinds_of(formats or ()), font, usetex)
    opened = open_study(study)
    yield from make(
        opened, output or study / "paper", only=only or (), page=page, look=look, figures=figures or FIGURES
    )
