"""Tables of shaded cells as HTML: how results show themselves in a notebook, on a light page and on a dark one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Literal, NamedTuple

Colour = Literal["blue", "orange", "grey"]
_COLOURS: Mapping[str, str] = {"blue": "40,120,160", "orange": "205,110,20", "grey": "128,128,128"}
_DARKEST = 0.6  # opacity of a full share: letters of either theme can still be read on it


class HtmlCell(NamedTuple):
    """One cell: its text, its share of the colour (0..1), and whether it stands in a frame."""

    text: str
    share: float = 0.0
    colour: Colour = "blue"
    framed: bool = False


def html_table(caption: str, corner: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[HtmlCell]]]) -> str:
    """A table with a heading for each column and row. Texts are data: markup in them shows as text."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in (corner, *heads))
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>' for name, cells in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(cell: HtmlCell) -> str:
    style = []
    if cell.share > 0:
        style.append(f"background:rgba({_COLOURS[cell.colour]},{_DARKEST * min(1.0, cell.share):.2f})")
    if cell.framed:
        style.append("outline:2px solid currentColor;outline-offset:-2px;font-weight:bold")
    return f'<td style="{";".join(style)}">{escape(cell.text)}</td>' if style else f"<td>{escape(cell.text)}</td>"


CellKey = tuple[int | None, int]
"""(exit layer, draft length); the exit layer of a draft model is None."""


def grid_html(
    caption: str,
    values: Mapping[CellKey, float | None],
    cell: Callable[[float], HtmlCell],
    *,
    framed: CellKey | None = None,
    drafter: str | None = None,
) -> str:
    """Exit layers from bottom to top, a draft model below them, draft lengths from left to right."""
    lengths = sorted({length for _, length in values})
    exits = sorted({exit_layer for exit_layer, _ in values}, key=lambda exit_layer: exit_layer or 0, reverse=True)
    rows = []
    for exit_layer in exits:
        names: list[CellKey] = [(exit_layer, length) for length in lengths]
        cells = [_shown(values.get(name), cell)._replace(framed=name == framed) for name in names]
        rows.append((str(exit_layer) if exit_layer is not None else drafter or "draft model", cells))
    return html_table(caption, "E \\ K", [str(length) for length in lengths], rows)


def _shown(value: float | None, cell: Callable[[float], HtmlCell]) -> HtmlCell:
    return HtmlCell("-") if value is None else cell(value)
