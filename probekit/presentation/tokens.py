"""Token text as a reader can see it, on a terminal, in a picture, on a page.

A space is ␣, a line end ⏎, a tab ⇥. What has no shape of its own, or none that the medium can draw, is written as
its code point, ⟨200B⟩, and a byte that is no character by itself as ⟨0xE2⟩: never an empty box, never nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator

from probekit.traces.token_text import visible

EMPTY = "∅"
"""Stands for a token without any text."""

Drawable = Callable[[str], bool]

# Unicode's categories without a shape: controls, formats (joiners, directions), surrogates, private, unassigned,
# separators. A plain space has its sign by then.
_SHAPELESS = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
# Letters and marks by category that draw nothing all the same (Default_Ignorable_Code_Point).
_IGNORABLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0\u2800") | frozenset(
    map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)
_BYTE_IN_TEXT = range(0xDC80, 0xDD00)  # how Python's "surrogateescape" keeps a byte that is no UTF-8


def shown(text: str, drawable: Drawable | None = None) -> str:
    """`text` with everything in it visible.

    drawable: says of one character whether the medium has a shape for it; by default it has.
    """
    return "".join(_units(text, drawable))


def clipped(text: str, width: int, drawable: Drawable | None = None) -> str:
    """`shown(text)`, cut to `width` columns (at least 1) with an ellipsis; an escape is never cut in two."""
    units = list(_units(text, drawable))
    if sum(map(columns, units)) <= width:
        return "".join(units)
    kept, used = [], 1
    for unit in units:
        used += columns(unit)
        if used > width:
            break
        kept.append(unit)
    return "".join(kept) + "…"


def columns(text: str) -> int:
    """Columns of a fixed-width terminal that `text` takes: East Asian wide characters two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.category(character) in ("Mn", "Me") for character in text)
    return len(text) + wide - marks


def _units(text: str, drawable: Drawable | None) -> Iterator[str]:
    """The pieces that must stay whole: a character with the marks on it, or an escape."""
    if not text:
        yield EMPTY
        return
    unit = ""
    for character in visible(text):
        if _escaped(character, drawable):
            if unit:
                yield unit
            unit = ""
            yield _escape(character)
        elif unicodedata.category(character).startswith("M"):
            unit = (unit or "◌") + character  # a mark needs something to stand on
        else:
            if unit:
                yield unit
            unit = character
    if unit:
        yield unit


def _escaped(character: str, drawable: Drawable | None) -> bool:
    if unicodedata.category(character) in _SHAPELESS or character in _IGNORABLE:
        return True
    return drawable is not None and not drawable(character)


def _escape(character: str) -> str:
    code = ord(character)
    return f"⟨0x{code - 0xDC00:02X}⟩" if code in _BYTE_IN_TEXT else f"⟨{code:04X}⟩"
