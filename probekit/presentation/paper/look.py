"""What a paper asks of its figures: how wide, in which letters, as which kinds of file."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import matplotlib
from matplotlib import font_manager

from probekit.errors import InputError
from probekit.presentation import plots

KINDS = ("pdf", "svg", "png", "pgf")
_GENERIC = ("serif", "sans-serif", "monospace")
# The fonts that matplotlib has LaTeX packages for.
_OF_TEX = (
    *_GENERIC, "Computer Modern Roman", "Computer Modern Sans Serif", "Computer Modern Typewriter", "Times", "Palatino",
    "Charter", "New Century Schoolbook", "Bookman", "Zapf Chancery", "Helvetica", "Avant Garde", "Courier",
)  # fmt: skip
_UNITS = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27, "bp": 1 / 72.0}
_GUTTER = 0.2
_PANEL = 1.75  # the least width, in inches, at which the names of neighbouring axes do not touch


@dataclass(frozen=True)
class Page:
    """Where figures must fit: inches of text across, of one of its columns, and of height."""

    text: float = 6.9
    column: float = 3.35
    height: float = 9.0

    def __post_init__(self) -> None:
        if not 3.0 <= self.text <= 40.0:
            raise InputError(
                f"the width is {self.text:g} inches; expected 3 to 40.", "A width is written as 5.5in, 14cm or 397pt."
            )

    def arranged(self, panels: int) -> tuple[int, int]:
        """How many panels stand beside one another, three at most, and in how many rows."""
        across = min(panels, 3, int(self.text / _PANEL))
        return across, math.ceil(panels / across)

    @classmethod
    def of(cls, width: str) -> Page:
        """The page whose text is so wide: `5.5in`, `14cm`, `397pt` (what LaTeX says for \\the\\textwidth)."""
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(in|cm|mm|pt|bp)?\s*", width)
        if found is None:
            raise InputError(f"--width is {width!r}; expected a width as 5.5in, 14cm or 397pt.")
        text = float(found[1]) * _UNITS[found[2] or "in"]
        return cls(text, (text - _GUTTER) / 2)


@dataclass(frozen=True)
class Look:
    """Letters and kinds of file.

    font: an installed family or a generic one ("serif"); with `usetex`, one of those that matplotlib knows for LaTeX. A
        pgf picture takes its letters from the document, of which `font` may name the serif, sans-serif or monospace.
    """

    kinds: tuple[str, ...] = ("pdf", "svg", "png")
    font: str | None = None
    usetex: bool = False

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise InputError(f"the format is {', '.join(unknown) or 'none'}; expected some of {', '.join(KINDS)}.")
        if self.usetex:
            _need(("latex", "dvipng"), "--usetex")
        if "pgf" in self.kinds:
            _need(("pdflatex",), "--format pgf")
        if self.font is not None:
            self._check_font(self.font)

    def _check_font(self, font: str) -> None:
        if "pgf" in self.kinds and font not in _GENERIC:
            raise InputError(
                f"--font is {font!r}; a pgf picture has the document's letters.", f"Give {_any_of(_GENERIC)}, or none."
            )
        if self.usetex and font not in _OF_TEX:
            raise InputError(f"--font is {font!r}; with --usetex, expected {_any_of(_OF_TEX)}.")
        known = {name.lower(): name for name in font_manager.fontManager.get_font_names()}
        if not self.usetex and font not in _GENERIC and font.lower() not in known:
            near = [known[name] for name in get_close_matches(font.lower(), known, 3, 0.5)]
            raise InputError(
                f"--font is {font!r}, which is not installed.", f"Near it: {', '.join(near)}." if near else
                "`python -c 'import matplotlib.font_manager as f; print(f.get_font_names())'` lists those that are."
            )  # fmt: skip

    @contextmanager
    def worn(self, *, by_pgf: bool = False) -> Iterator[None]:
        """matplotlib's settings for these figures; whatever was set before comes back."""
        rc: dict[Any, Any] = dict(plots.STYLE)
        if self.font or self.usetex or by_pgf:
            rc["font.family"] = [self.font or "serif"]
        if self.usetex or by_pgf:
            rc["text.usetex"] = True
        if by_pgf:
            rc |= {"savefig.format": "pgf", "pgf.texsystem": "pdflatex", "pgf.rcfonts": False}
        with matplotlib.rc_context(rc):
            yield


PAGE, LOOK = Page(), Look()
"""Two columns of a page of 8.5 inches, and the project's own letters."""


def kinds_of(texts: Sequence[str]) -> tuple[str, ...]:
    """`pdf,pgf`, or one after the other, as kinds in their order without repeats."""
    given = [kind.strip().lower().removeprefix(".") for text in texts for kind in text.split(",")]
    return tuple(dict.fromkeys(given)) or Look.kinds


def _need(programs: Sequence[str], option: str) -> None:
    lacking = [program for program in programs if shutil.which(program) is None]
    if lacking:
        raise InputError(f"{option} needs {' and '.join(lacking)}, not found.", "Install TeX Live, or leave it out.")


def _any_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
