"""From a study to the figures of this folder's scripts: all of them, some, or one script's own.

`probekit figures STUDY` draws those of the package, which are the same until a script here is changed or added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from probekit.cli import figures as options
from probekit.errors import ProbekitError
from probekit.presentation.paper.figures import FIGURES, PaperFigure

StudyOption = Annotated[Path, typer.Option("--study", metavar="DIR", help="A folder that `probekit study` wrote.")]


def names() -> list[str]:
    """The scripts, in order."""
    return sorted(path.stem for path in Path(__file__).parent.glob("fig[0-9][0-9]_*.py"))


def scripts() -> dict[str, PaperFigure]:
    """The figures of all scripts."""
    return {name: figure_of(name, import_module(f"figures.{name}")) for name in names()}


def figure_of(name: str, script: ModuleType) -> PaperFigure:
    """A script's `draw(study, page)`; its caption is the package's for that name, or what the script says of itself."""
    line = " ".join((script.__doc__ or name).split())
    known = FIGURES.get(name) or PaperFigure(script.draw, lambda _: line, lambda _: line)
    return replace(known, draw=script.draw)


def alone(file: str) -> None:
    """Run one script by itself: `python -m figures.<name> --study DIR`."""
    name = Path(file).stem
    script = import_module(f"figures.{name}")
    run({name: figure_of(name, script)}, script.__doc__, only=[name])


def run(figures: Mapping[str, PaperFigure], what: str | None, only: list[str] | None = None) -> None:
    """Read the arguments and draw."""
    typer.run(command_for(figures, what, only))


def command_for(
    figures: Mapping[str, PaperFigure], what: str | None, only: list[str] | None = None
) -> Callable[..., None]:
    """A command that draws these figures and prints what was written; an error is one line, with its exit status."""

    def command(
        study: StudyOption,
        output: options.Output = None,
        names: options.Only = only,
        formats: options.Formats = None,
        font: options.Font = None,
        width: options.Width = None,
        usetex: options.UseTeX = False,
    ) -> None:
        try:
            for path in options.files(study, output, names, formats, font, width, usetex, figures):
                typer.echo(path)
        except ProbekitError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(error.exit_status) from None

    command.__doc__ = what
    return command
