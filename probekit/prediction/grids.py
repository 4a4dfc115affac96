"""A figure of every drafter and draft length as a table of shaded cells, for notebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from probekit.drafting.keys import DrafterKey
from probekit.html_tables import HtmlCell, html_table

CellKey = tuple[DrafterKey, int]
"""(who drafts, draft length)."""


def grid_html(
    caption: str,
    values: Mapping[CellKey, float | None],
    cell: Callable[[float], HtmlCell],
    *,
    framed: CellKey | None = None,
) -> str:
    """Exit layers from bottom to top, other drafters below them, draft lengths from left to right."""
    lengths = sorted({length for _, length in values})
    drafters = sorted({key for key, _ in values}, key=lambda key: (-key.exit_layer, key.model))
    rows = []
    for key in drafters:
        cells = [_shown(values.get((key, length)), cell)._replace(framed=(key, length) == framed) for length in lengths]
        rows.append((str(key.exit_layer) if key.is_exit else key.model, cells))
    return html_table(caption, "E \\ K", [str(length) for length in lengths], rows)


def _shown(value: float | None, cell: Callable[[float], HtmlCell]) -> HtmlCell:
    return HtmlCell("-") if value is None else cell(value)
