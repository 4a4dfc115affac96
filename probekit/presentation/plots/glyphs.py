"""Which letters a font can draw: tokens may be written in any script."""

from __future__ import annotations

from functools import cache

import matplotlib
from matplotlib import font_manager

from probekit.presentation.tokens import shown


def drawable(character: str) -> bool:
    """Whether some installed font that matplotlib can draw with has a shape for this character."""
    return _font_with(character, tuple(matplotlib.rcParams["font.family"])) is not None


def families(text: str) -> list[str]:
    """Font families for `text`: the usual ones, then those that have the shapes they lack."""
    usual = tuple(matplotlib.rcParams["font.family"])
    found = (_font_with(character, usual) for character in dict.fromkeys(text))
    return [*usual, *dict.fromkeys(family for family in found if family is not None and family not in usual)]


@cache
def _font_with(character: str, usual: tuple[str, ...]) -> str | None:
    """The first of the usual families, else of all installed ones by name, that has a shape for the character."""
    for family in usual:
        path = font_manager.findfont(font_manager.FontProperties(family=family))
        if _covers(path, character):
            return family
    return next((family for family, path in _installed() if _covers(path, character)), None)


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    """Upright regular faces of every family, sans first; fonts made of placeholders or for formulas left out."""
    faces: dict[str, str] = {}
    for face in sorted(font_manager.fontManager.ttflist, key=lambda face: (face.name, str(face.fname))):
        plain = face.style == "normal" and face.weight in (400, "normal", "regular", "book")
        if plain and not face.name.startswith((".", "Last Resort", "STIX", "cm", "DejaVu Sans Display")):
            faces.setdefault(face.name, str(face.fname))
    return tuple(sorted(faces.items(), key=lambda item: ("Sans" not in item[0], item[0])))


def _covers(path: str, character: str) -> bool:
    try:
        font = font_manager.get_font(path)
    except (OSError, RuntimeError):  # a broken file, or a bitmap font, which cannot be scaled
        return False
    return bool(font.scalable) and font.get_char_index(ord(character)) != 0


def plain(text: str) -> str:
    """`text` as a label: visible, and never read as a formula."""
    return shown(text, lambda character: character == " " or drawable(character)).replace("␣", " ").replace("$", r"\$")
