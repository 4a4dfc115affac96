"""Tables of shaded cells as HTML: how results show themselves in a notebook, on a light page and on a dark one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

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


def facts_html(caption: str, facts: Mapping[str, Any]) -> str:
    """A row a fact. Names and values are data: markup in them shows as text."""
    body = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(fact))}</td></tr>" for name, fact in facts.items())
    return f"<table><caption>{escape(caption)}</caption>{body}</table>"


def _cell(cell: HtmlCell) -> str:
    style = []
    if cell.share > 0:
        style.append(f"background:rgba({_COLOURS[cell.colour]},{_DARKEST * min(1.0, cell.share):.2f})")
    if cell.framed:
        style.append("outline:2px solid currentColor;outline-offset:-2px;font-weight:bold")
    return f'<td style="{";".join(style)}">{escape(cell.text)}</td>' if style else f"<td>{escape(cell.text)}</td>"
