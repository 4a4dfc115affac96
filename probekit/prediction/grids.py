"""A figure of every exit layer and draft length as a shaded table, for notebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from probekit.tracing.shading import Shaded, shaded_table

CellName = tuple[int | None, int]
"""(exit layer, draft length); the exit layer of a draft model is None."""


def grid_html(
    caption: str,
    values: Mapping[CellName, float | None],
    cell: Callable[[float], Shaded],
    *,
    framed: CellName | None = None,
    drafter: str | None = None,
) -> str:
    """Exit layers from bottom to top, a draft model below them, draft lengths from left to right."""
    lengths = sorted({length for _, length in values})
    exits = sorted({exit_layer for exit_layer, _ in values}, key=lambda exit_layer: exit_layer or 0, reverse=True)
    rows = []
    for exit_layer in exits:
        names: list[CellName] = [(exit_layer, length) for length in lengths]
        cells = [_shown(values.get(name), cell)._replace(framed=name == framed) for name in names]
        rows.append((str(exit_layer) if exit_layer is not None else drafter or "draft model", cells))
    return shaded_table(caption, "E \\ K", [str(length) for length in lengths], rows)


def _shown(value: float | None, cell: Callable[[float], Shaded]) -> Shaded:
    return Shaded("-") if value is None else cell(value)
