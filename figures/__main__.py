"""Every figure and table of a study, for a paper: `python -m figures --study DIR [--only NAME]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from figures.latex import make_tables
from figures.making import OutputOption, StudyOption, chosen, finish, make
from probekit.presentation.study_folder import open_study

Only = Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="One figure, by its name or fig03.")]


def command(study: StudyOption, only: Only = None, output: OutputOption = None) -> None:
    """Draw a study's figures as PDF, SVG and PNG, and write its tables as LaTeX."""

    def work() -> Iterator[Path]:
        wanted, opened, folder = chosen(only or ()), open_study(study), output or study / "paper"
        if not only:
            opened.check()  # before anything is written
        yield from make(opened, wanted, folder)
        if not only:
            yield from make_tables(opened, folder)

    finish(work)


if __name__ == "__main__":
    typer.run(command)
