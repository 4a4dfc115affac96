r"""From a study to what a paper includes: figures, tables, and the two LaTeX files that hold them.

PAPER/figNN_name.{pdf,svg,png,pgf}   the figures
PAPER/tables/NAME.tex                the tables
PAPER/figures.tex, PAPER/tables.tex  all of them, with captions, labels and alternative texts
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from probekit.errors import InputError
from probekit.files import atomic_text
from probekit.presentation.figure_files import save
from probekit.presentation.paper.figures import FIGURES, PaperFigure
from probekit.presentation.paper.look import LOOK, PAGE, Look, Page
from probekit.presentation.paper.printed_tables import make_tables
from probekit.presentation.study_folder import StudyFolder
from probekit.presentation.tex_text import tex_text

_MOST_ROWS = 600  # ten pages
_INCLUDED = ("pgf", "pdf", "png")  # what LaTeX takes, the first that there is


def make(
    study: StudyFolder,
    output: Path,
    *,
    only: Sequence[str] = (),
    page: Page = PAGE,
    look: Look = LOOK,
    figures: Mapping[str, PaperFigure] = FIGURES,
) -> Iterator[Path]:
    """Draw and write everything, or `only` some figures, by how their names begin; yields every file.

    Raises InputError before anything is written where the study lacks something, or no figure has a wanted name.
    """
    wanted = _chosen(only, figures, study)
    if not only:
        study.check()
    widths = {}
    for name, figure in wanted.items():
        files, widths[name] = _drawn(study, figure, output, name, page, look)
        yield from files
    if only:
        return
    tables = list(make_tables(study, output, page))
    yield from tables
    if any(kind in look.kinds for kind in _INCLUDED):
        yield _write(output / "figures.tex", _figures_tex(study, wanted, widths, page, look))
    yield _write(output / "tables.tex", _tables_tex({path.stem: len(study.table(path.stem)) for path in tables}, page))


def _chosen(
    only: Sequence[str], figures: Mapping[str, PaperFigure], study: StudyFolder
) -> dict[str, PaperFigure]:  # fmt: skip
    """The figures whose names begin with what was asked for, all without a wish; but for those that the study lacks."""
    there = {name: figure for name, figure in figures.items() if figure.needs is None or study.has(figure.needs)}
    for wish in only:
        meant = [name for name in figures if name.startswith(wish)]
        if not meant:
            raise InputError(f"there is no figure {wish!r}.", f"There are {', '.join(figures)}.")
        if not set(meant) & set(there):
            raise InputError(
                f"{meant[0]} is drawn from tables/{figures[meant[0]].needs}.csv, and the study in {study.folder} has "
                "none of it.",
                "A study with --probes has probes.csv; attribution.csv is of models whose layers' parts are known.",
            )
    return {name: figure for name, figure in there.items() if not only or name.startswith(tuple(only))}


def _drawn(
    study: StudyFolder, figure: PaperFigure, output: Path, name: str, page: Page, look: Look
) -> tuple[list[Path], float]:
    """The files of one figure, and its width in inches; a pgf picture, whose letters are TeX's, is drawn apart."""
    files, width = [], page.text
    for by_pgf in (False, True):
        kinds = [kind for kind in look.kinds if (kind == "pgf") == by_pgf]
        if kinds:
            with look.worn(by_pgf=by_pgf):
                drawn = figure.draw(study, page)
                files += save(drawn, output, name, kinds)
            width = drawn.get_figwidth()
    return files, width


def _figures_tex(
    study: StudyFolder, figures: Mapping[str, PaperFigure], widths: Mapping[str, float], page: Page, look: Look
) -> str:
    r"""A float for each figure; a wide one goes over both columns where there are two."""
    kind = next(kind for kind in _INCLUDED if kind in look.kinds)
    packages = "pgf" if kind == "pgf" else "graphicx"
    lines = [
        rf"% In the preamble: \usepackage{{{packages},import}}. Then: \import{{FOLDER/}}{{figures}}.",
        "% Each figure has the size that it is printed at, so that its letters have theirs; one that is wider than the",
        "% line, or too tall for its page, shrinks.",
        *_made_for(page),
        r"\providecommand{\probekitfitted}[1]{\sbox0{#1}%",
        r"  \ifdim\wd0>\linewidth\sbox0{\resizebox{\linewidth}{!}{\usebox0}}\fi",
        r"  \ifdim\ht0>0.9\textheight\sbox0{\resizebox{!}{0.9\textheight}{\usebox0}}\fi\usebox0}",
    ]
    for name, figure in figures.items():
        alt, caption = tex_text(figure.alt(study)), tex_text(figure.caption(study))
        place = "figure*" if widths[name] > page.column + 0.01 else "figure"
        label = name.partition("_")[2].replace("_", "-")
        picture = rf"\probekitfitted{{\includegraphics[alt={{{alt}}}]{{{name}.{kind}}}}}"
        included = rf"\probekitfitted{{\input{{{name}.pgf}}}}% alt: {alt}" if kind == "pgf" else picture
        lines += [
            "", rf"\begin{{{place}}}[tp]", r"\centering", included, rf"\caption{{{caption}}}\label{{fig:{label}}}",
            rf"\end{{{place}}}",
        ]  # fmt: skip
    return "\n".join([*lines, ""])


def _made_for(page: Page) -> tuple[str, ...]:
    """LaTeX that warns where the document's text is narrower, and says what to do."""
    return (
        rf"\ifdim\textwidth<{page.text - 0.02:.2f}in",
        rf"  \PackageWarningNoLine{{probekit}}{{made for a text {page.text:g}in wide, and this one is \the\textwidth:",
        r"  probekit figures STUDY --width \the\textwidth}\fi",
    )


def _tables_tex(rows: Mapping[str, int], page: Page) -> str:
    """The tables one after the other; those of a book's length are named, and left out."""
    lines = [
        r"% In the preamble: \usepackage{booktabs,siunitx,longtable,import}. Then: \import{FOLDER/}{tables}.",
        r"% Long tables cannot break over pages in two columns: what follows is set in one, as in an appendix.",
        *_made_for(page),
        r"\makeatletter\if@twocolumn\onecolumn\fi\makeatother",
    ]
    for name, count in rows.items():
        left_out = f"% {count} rows, without the sign at the left: " if count > _MOST_ROWS else ""
        lines.append(rf"{left_out}\subimport{{tables/}}{{{name}}}")
    return "\n".join([*lines, ""])


def _write(path: Path, text: str) -> Path:
    atomic_text(path, text)
    return path
