r"""A table as LaTeX: booktabs, decimals aligned by siunitx, long ones over several pages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probekit.presentation.tex_text import tex_text

_LONG = 40  # rows from which a LaTeX table may break over pages
_SIZES = {8: 0.52, 7: 0.555, 6: 0.6, 5: 0.66}  # points that all LaTeX fonts have: a letter's width in them, em
_ENDS = (("_low", "_high"), ("_20", "_80"))
MISSING = "--"


@dataclass(frozen=True)
class _Column:
    """A column of the table, or the two of a number and its interval.

    specification: what `tabular` is told. heading: LaTeX. cells: LaTeX, one for each row. width: letters.
    """

    specification: str
    heading: str
    cells: tuple[str, ...]
    width: int
    columns: int = 1


def to_latex(
    frame: pd.DataFrame,
    caption: str,
    label: str,
    *,
    headings: Mapping[str, str] | None = None,
    decimals: Mapping[str, int] | None = None,
    width: float = 6.9,
    column: float = 3.35,
) -> str:
    r"""A booktabs table: text escaped, numbers aligned at their decimal marks, `x_low` and `x_high` beside `x`.

    Needs \usepackage{booktabs,siunitx}, and longtable for more than 40 rows.

    headings: {column: LaTeX of its heading}; by default the columns' names in words.
    decimals: {column: digits after the mark}; by default so many that the column's middle number has three digits.
    width, column: inches of the text, and of one of its columns. The type is of 8 points, or as small as it must be.
    """
    ends = {name + end for name in frame.columns for pair in _ENDS for end in pair}
    columns = [
        _column(frame, name, (headings or {}).get(name, tex_text(name.replace("_", " "))), (decimals or {}).get(name))
        for name in frame.columns
        if name not in ends
    ]
    rows = [" & ".join(cells) + r" \\" for cells in zip(*(column.cells for column in columns), strict=True)]
    head = " & ".join(column.heading for column in columns) + r" \\"
    layout = "".join(column.specification for column in columns)
    sizes = {points: _inches(columns, points) for points in _SIZES}
    points = next((points for points, inches in sizes.items() if inches <= width), min(_SIZES))
    small = rf"\fontsize{{{points}}}{{{1.2 * points:g}}}\selectfont\setlength{{\tabcolsep}}{{{points / 2:g}pt}}"
    if len(rows) > _LONG:
        lines = _long(layout, sum(each.columns for each in columns), small, head, rows, tex_text(caption), label)
    else:
        environment = "table*" if sizes[points] > column else "table"
        lines = _floating(layout, environment, small, head, rows, tex_text(caption), label)
    return "\n".join(lines)


def _inches(columns: Sequence[_Column], points: int) -> float:
    """About how wide a table is in type of this size: its letters, and the gaps."""
    return sum(_SIZES[points] * points * each.width + points for each in columns) / 72.27


def _floating(
    layout: str, environment: str, small: str, head: str, rows: Sequence[str], caption: str, label: str
) -> Iterator[str]:
    """The lines of a table on one page; `table*` goes over both columns where there are two."""
    yield rf"\begin{{{environment}}}[t]"
    yield rf"\centering{small}"
    yield r"\setlength{\abovecaptionskip}{0pt}\setlength{\belowcaptionskip}{6pt}"  # it stands above the table
    yield rf"\caption{{{caption}}}\label{{{label}}}"
    yield rf"\begin{{tabular}}{{{layout}}}"
    yield from (r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", rf"\end{{{environment}}}", "")


def _long(
    layout: str, count: int, small: str, head: str, rows: Sequence[str], caption: str, label: str
) -> Iterator[str]:
    """The lines of a table that breaks over pages; the small type ends with it."""
    yield rf"{{{small}"
    yield rf"\begin{{longtable}}{{{layout}}}"
    yield rf"\caption{{{caption}}}\label{{{label}}}\\"
    yield from (r"\toprule", head, r"\midrule", r"\endfirsthead")
    yield from (r"\caption[]{(continued)}\\", r"\toprule", head, r"\midrule", r"\endhead")
    yield rf"\midrule \multicolumn{{{count}}}{{r}}{{Continued on the next page}} \\"
    yield from (r"\endfoot", r"\bottomrule", r"\endlastfoot", *rows, r"\end{longtable}}", "")


def _column(frame: pd.DataFrame, name: str, heading: str, decimals: int | None) -> _Column:
    values = frame[name]
    boolean = all(isinstance(value, (bool, np.bool_)) for value in values.dropna())
    if boolean or not pd.api.types.is_numeric_dtype(values):
        cells = tuple(tex_text(_text(value)) for value in values)
        width = max([_letters(heading), *(round(0.85 * len(cell)) for cell in cells)])  # narrower than digits
        return _Column("c" if boolean else "l", heading, cells, width)
    places = _decimals(values) if decimals is None else decimals
    numbers = _formatted(values, places)
    aligned = tuple(number or f"{{{MISSING}}}" for number in numbers)
    specification = f"S[table-format={_table_format(numbers, places)}]"
    width = max((len(number) for number in numbers), default=1)
    for below, above in _ENDS:
        if {name + below, name + above} <= set(frame.columns):
            low, high = (_formatted(frame[name + end], places) for end in (below, above))
            intervals = _intervals(low, high)
            cells = tuple(f"{number} & {interval}" for number, interval in zip(aligned, intervals, strict=True))
            width += 2 + sum(max(map(len, side), default=1) for side in (low, high))
            both = rf"\multicolumn{{2}}{{c}}{{{heading}}}"
            return _Column(specification + r"@{\;}l", both, cells, max(width, _letters(heading)), 2)
    return _Column(specification, f"{{{heading}}}", aligned, max(width, _letters(heading)))


def _letters(latex: str) -> int:
    """How many letters wide a heading is, at most: those of its longest line."""
    return max(len(re.sub(r"\\[a-z]+(\[.*?\])?|[{}$]", "", line)) for line in latex.split(r"\\"))


def _intervals(low: Sequence[str], high: Sequence[str]) -> Iterator[str]:
    """`[low, high]` with room for the longest number on both sides, so that all decimal marks are aligned."""
    widest = [max(map(len, side), default=0) for side in (low, high)]
    for ends in zip(low, high, strict=True):
        padded = [
            rf"\phantom{{{'0' * (most - len(end))}}}{end}" if len(end) < most else end
            for end, most in zip(ends, widest, strict=True)
        ]
        yield f"$[{padded[0]}, {padded[1]}]$" if all(ends) else ""


def _formatted(values: Iterable[Any], decimals: int) -> list[str]:
    """Numbers with so many decimals; empty where there is none."""
    numbers = (math.nan if pd.isna(value) else float(value) for value in values)
    return [f"{number:.{decimals}f}" if math.isfinite(number) else "" for number in numbers]


def _table_format(numbers: Sequence[str], decimals: int) -> str:
    whole = max((len(number.lstrip("-").partition(".")[0]) for number in numbers), default=1)
    sign = "-" if any(number.startswith("-") for number in numbers) else ""
    return f"{sign}{max(whole, 1)}.{decimals}" if decimals else f"{sign}{max(whole, 1)}"


def _decimals(values: pd.Series) -> int:
    """So many that the middle number has three digits; none for whole numbers."""
    numbers = values.dropna().to_numpy(dtype=float)
    numbers = np.abs(numbers[np.isfinite(numbers)])
    if not numbers.size or (numbers == np.round(numbers)).all():
        return 0
    return int(np.clip(2 - math.floor(math.log10(np.median(numbers[numbers > 0]))), 0, 6))


def _text(value: Any) -> str:
    if value is None or (not isinstance(value, (str, list, tuple)) and pd.isna(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return str(value)
