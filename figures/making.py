"""From a study to its figures: all of them, some, or one script's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Protocol

import typer
from matplotlib.figure import Figure

from figures import style
from probekit.errors import InputError, ProbekitError
from probekit.presentation.study_folder import StudyFolder, open_study

StudyOption = Annotated[Path, typer.Option("--study", metavar="DIR", help="A folder that `probekit study` wrote.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="By default the study's paper/.")
]


class _Script(Protocol):
    def draw(self, study: StudyFolder) -> Figure: ...


def names() -> list[str]:
    """The figures' names, in order: those of the scripts."""
    return sorted(path.stem for path in Path(__file__).parent.glob("fig[0-9][0-9]_*.py"))


def make(study: StudyFolder, wanted: Sequence[str], output: Path) -> Iterator[Path]:
    """Draw and write each wanted figure; yields every file."""
    for name in wanted:
        script: _Script = import_module(f"figures.{name}")
        with style.paper():
            yield from style.save(script.draw(study), output, name)


def chosen(only: Sequence[str]) -> list[str]:
    """The names that begin with what was asked for; all without a wish. Raises InputError where nothing does."""
    found = []
    for wish in only:
        matching = [name for name in names() if name.startswith(wish)]
        if not matching:
            raise InputError(f"there is no figure {wish!r}.", f"There are {', '.join(names())}.")
        found += matching
    return list(dict.fromkeys(found)) or names()


def finish(work: Callable[[], Iterator[Path]]) -> None:
    """Do the work and print what was written; an error is one line, with the exit status of its kind."""
    try:
        for path in work():
            typer.echo(path)
    except ProbekitError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(error.exit_status) from None


def alone(file: str) -> None:
    """Run one script by itself: `python -m figures.<name> --study DIR`."""
    name = Path(file).stem

    def command(study: StudyOption, output: OutputOption = None) -> None:
        finish(lambda: make(open_study(study), [name], output or study / "paper"))

    command.__doc__ = sys.modules["__main__"].__doc__
    typer.run(command)
