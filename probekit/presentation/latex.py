r"""A table as LaTeX: booktabs, decimals aligned by siunitx, long ones over several pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probekit.presentation.tex_text import tex_text
from probekit.presentation.tokens import shown

_LONG = 40  # rows from which a LaTeX table may break over pages
_COLUMN_OF_TEXT = 50  # letters in small type that a column of a two-column page holds
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
) -> str:
    r"""A booktabs table: text escaped, numbers aligned at their decimal marks, `x_low` and `x_high` beside `x`.

    Needs \usepackage{booktabs,siunitx}, and longtable for more than 40 rows.

    headings: {column: LaTeX of its heading}; by default the columns' names in words.
    decimals: {column: digits after the mark}; by default so many that the column's middle number has three digits.
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
    wide = sum(column.width + 2 for column in columns) > _COLUMN_OF_TEXT
    make = _long if len(rows) > _LONG else _floating
    return "\n".join(
        make(layout, sum(column.columns for column in columns), wide, head, rows, tex_text(caption), label)
    )


def _floating(
    layout: str, count: int, wide: bool, head: str, rows: Sequence[str], caption: str, label: str
) -> Iterator[str]:
    """The lines of a table on one page; a wide one goes over both columns where there are two."""
    table = "table*" if wide else "table"
    yield rf"\begin{{{table}}}[t]"
    yield r"\centering\footnotesize\setlength{\tabcolsep}{4pt}"
    yield r"\setlength{\abovecaptionskip}{0pt}\setlength{\belowcaptionskip}{6pt}"  # it stands above the table
    yield rf"\caption{{{caption}}}\label{{{label}}}"
    yield rf"\begin{{tabular}}{{{layout}}}"
    yield from (r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", rf"\end{{{table}}}", "")


def _long(
    layout: str, count: int, wide: bool, head: str, rows: Sequence[str], caption: str, label: str
) -> Iterator[str]:
    """The lines of a table that breaks over pages; the small type ends with it."""
    yield r"{\footnotesize\setlength{\tabcolsep}{4pt}"
    yield rf"\begin{{longtable}}{{{layout}}}"
    yield rf"\caption{{{caption}}}\label{{{label}}}\\"
    yield from (r"\toprule", head, r"\midrule", r"\endfirsthead")
    yield from (r"\caption[]{(continued)}\\", r"\toprule", head, r"\midrule", r"\endhead")
    yield rf"\midrule \multicolumn{{{count}}}{{r}}{{Continued on the next page}} \\"
    yield from (r"\endfoot", r"\bottomrule", r"\endlastfoot", *rows, r"\end{longtable}}", "")


def _column(frame: pd.DataFrame, name: str, heading: str, decimals: int | None) -> _Column:
    values = frame[name]
    boolean = pd.api.types.is_bool_dtype(values)
    if boolean or not pd.api.types.is_numeric_dtype(values):
        cells = tuple(tex_text(_text(value)) for value in values)
        return _Column("c" if boolean else "l", heading, cells, max((len(cell) for cell in cells), default=1))
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
            width += 4 + sum(max(map(len, side), default=1) for side in (low, high))
            return _Column(specification + r"@{\;}l", rf"\multicolumn{{2}}{{c}}{{{heading}}}", cells, width, 2)
    return _Column(specification, f"{{{heading}}}", aligned, width)


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
    return shown(str(value)).replace("␣", " ") if value != "" else ""
