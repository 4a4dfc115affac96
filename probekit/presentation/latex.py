"""A table as LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from probekit.presentation.tokens import shown

_LONG = 40  # rows from which a LaTeX table may break over pages
_SIGNS = {
    "␣": r"\textvisiblespace{}",
    "⏎": r"$\hookleftarrow$",
    "⇥": r"$\mapsto$",
    "⟨": r"$\langle$",
    "⟩": r"$\rangle$",
    "∅": r"$\emptyset$",
    "…": r"\ldots{}",
    "×": r"$\times$",
    "≥": r"$\geq$",
}


def to_latex(frame: pd.DataFrame, caption: str, label: str, *, headings: Mapping[str, str] | None = None) -> str:
    """A booktabs table: data escaped, intervals folded into their figure, three significant digits.

    Needs \\usepackage{booktabs}, and longtable for more than 40 rows.

    headings: {column: LaTeX of its heading}; by default the columns' names in words.
    """
    folded = _folded(frame)
    long = len(folded) > _LONG
    heads = [(headings or {}).get(column, _escaped(column.replace("_", " "))) for column in folded.columns]
    latex = folded.to_latex(
        index=False,
        escape=True,
        header=[head.replace("{", "{{").replace("}", "}}") for head in heads],  # pandas takes a head for a format
        longtable=long,
        column_format="".join("r" if _numeric(frame[column]) else "l" for column in folded.columns),
        caption=_signs(_escaped(caption)),
        label=label,
        position=None if long else "t",
    )
    return _small(_signs(latex), long)


def _small(latex: str, long: bool) -> str:
    """The table in small type with narrow gaps, as papers set them; what is around it keeps its own."""
    size = r"\footnotesize\setlength{\tabcolsep}{4pt}"
    if long:
        return f"{{{size}\n{latex}}}\n"
    return latex.replace(r"\begin{tabular}", f"\\centering{size}\n\\begin{{tabular}}", 1)


def _folded(frame: pd.DataFrame) -> pd.DataFrame:
    """Everything as text; `x`, `x_low`, `x_high` as one column "x [low, high]"."""
    whole = pd.DataFrame(index=frame.index)
    for column in frame.columns:
        stem = column.removesuffix("_low").removesuffix("_high").removesuffix("_20").removesuffix("_80")
        if stem != column and stem in frame.columns:
            continue
        text = [_figure(value) for value in frame[column]]
        for below, above in (("_low", "_high"), ("_20", "_80")):
            if column + below in frame.columns and column + above in frame.columns:
                ends = zip(frame[column + below], frame[column + above], strict=True)
                text = [
                    middle if pd.isna(low) else f"{middle} [{_figure(low)}, {_figure(high)}]"
                    for middle, (low, high) in zip(text, ends, strict=True)
                ]
        whole[column] = text
    return whole


def _figure(value: Any) -> str:
    if value is None or (not isinstance(value, (str, list, tuple)) and pd.isna(value)):
        return "--"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if number.is_integer() and abs(number) < 1e9:
            return f"{number:.0f}"
        return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
    return shown(str(value)).replace("␣", " ")


def _numeric(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column)) and not pd.api.types.is_bool_dtype(column)


def _escaped(text: str) -> str:
    """Escape what pandas escapes in the cells."""
    special = {"\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)


def _signs(latex: str) -> str:
    for sign, command in _SIGNS.items():
        latex = latex.replace(sign, command)
    return latex
