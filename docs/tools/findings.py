"""The page of findings, from its text and the kept tables: `python docs/tools/findings.py` writes page and picture.

`docs/sources/findings.md.in` is the text, with a marker such as `{tied.echo.L1}` for each figure.
`docs/sources/findings.csv` says what a marker stands for: a table below `docs/results/science`, the one row of it, and
a format. `0.0` is the column `value` with one decimal; `0 [0, 0] %` is `value`, `low` and `high` in hundredths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pandas as pd

DOCS = Path(__file__).parent.parent
PAGE = DOCS / "findings.md"
TEXT = DOCS / "sources" / "findings.md.in"
SOURCES = DOCS / "sources" / "findings.csv"
TABLES = DOCS / "results" / "science"
PICTURE = DOCS / "pictures" / "findings.png"

MARKER = re.compile(r"\{([a-zA-Z0-9][\w.-]*)\}")
ZERO = re.compile(r"0(?:\.(0+))?")


def page() -> str:
    """The text with every marker filled in."""
    found = figures()
    return MARKER.sub(lambda marker: found[marker[1]], TEXT.read_text(encoding="utf-8"))


def figures() -> dict[str, str]:
    """What stands on the page for each marker."""
    rows = pd.read_csv(SOURCES, dtype=str).to_dict("records")
    found = {row["marker"]: figure(row) for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"{SOURCES.name} has a marker twice.")
    return found


def figure(source: Mapping[str, str]) -> str:
    """One figure: the format's zeros replaced by `value`, `low` and `high`, in this order."""
    row = row_of(source["table"], source["row"])
    scale = 100 if source["format"].endswith("%") else 1
    columns = iter(("value", "low", "high"))
    return ZERO.sub(lambda zero: rounded(scale * float(row[next(columns)]), len(zero[1] or "")), source["format"])


def rounded(value: float, places: int) -> str:
    """A number with so many decimals; zero has no sign."""
    text = f"{value:.{places}f}"
    return text.lstrip("-") if float(text) == 0 else text


def row_of(table: str, where: str) -> pd.Series:
    """The one row of a table with `column=value; column=value`."""
    rows = read(table)
    for condition in where.split("; "):
        column, _, wanted = condition.partition("=")
        numeric = pd.api.types.is_numeric_dtype(rows[column])
        rows = rows[rows[column] == (float(wanted) if numeric else wanted)]
    if len(rows) != 1:
        raise ValueError(f"{table}: {where!r} names {len(rows)} rows, not one.")
    return rows.iloc[0]


@cache
def read(table: str) -> pd.DataFrame:
    return pd.read_csv(TABLES / f"{table}.csv", dtype={"layers": str})


def draw() -> None:
    """Agreement and echo by depth, all four models: the picture of the page's first screen."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from probekit.presentation import plots

    tables = pd.concat([read("01_agreement_by_layer"), read("smollm2/01_agreement_by_layer")])
    tables = tables[tables["loops"] == "with"].assign(lens="final norm")
    tables["model"] = tables["model"].str.replace(r"-135M-Instruct.*", "", regex=True)
    with rc_context(plots.STYLE):
        canvas = Figure(figsize=(6.9, 2.7), layout="constrained")
        axes = canvas.subplots(1, 2)
        for ax, quantity, statistic, plot in (
            (axes[0], "agrees", "agreement", plots.agreement_by_layer),
            (axes[1], "echo", "echo", plots.echo_by_layer),
        ):
            rows = tables[tables["quantity"] == quantity]
            columns = {"value": statistic, "low": f"{statistic}_low", "high": f"{statistic}_high"}
            plot(rows.rename(columns=columns), ax=ax)
        plots.one_legend(canvas, axes)
        canvas.savefig(PICTURE, dpi=200, metadata={"Software": "probekit"})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    draw()
