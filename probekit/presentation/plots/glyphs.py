"""Which letters a font can draw: tokens may be written in any script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.text import Text

from probekit.presentation.tex_text import escaped, has_tex, tex_text
from probekit.presentation.tokens import shown


def drawable(character: str) -> bool:
    """Whether some installed font that matplotlib can draw with has a shape for this character."""
    if _by_pgf():
        return has_tex(character)
    return _font_with(character, _usual()) is not None


def families(text: str) -> list[str]:
    """Font families for `text`: the usual ones, then those that have the shapes they lack."""
    usual = _usual()
    found = (_font_with(character, usual) for character in dict.fromkeys(text))
    return [*usual, *dict.fromkeys(family for family in found if family is not None and family not in usual)]


def with_their_fonts(artist: Artist) -> None:
    """Give each text on this the fonts that have its letters, where the usual ones lack some."""
    for text in artist.findobj(Text):
        needed = families(text.get_text())
        if text.get_fontfamily() != needed and len(needed) > len(_usual()):
            text.set_fontfamily(needed)


def token_ticks(ax: Axes, visible: Sequence[str], inks: Sequence[Any] | None = None, **look: Any) -> None:
    """Name the columns of a table after tokens, slanted; `inks`: their colours, `look` what else the names take."""
    ax.set_xticks([place + 0.5 for place in range(len(visible))], [token(text) for text in visible])
    ax.tick_params(length=0)
    # Not the Axes' tick labels: settings can hide them, or have them twice, below and above.
    for place, tick in enumerate(ax.xaxis.get_major_ticks()):
        own = {} if inks is None else {"color": inks[place]}
        for label, align, side in ((tick.label1, "right", "top"), (tick.label2, "left", "bottom")):
            label.set(
                parse_math=False, usetex=False, family=families(visible[place]), rotation=40, ha=align, va=side,
                rotation_mode="anchor", **own, **look,
            )  # fmt: skip


def plain(text: str) -> str:
    """`text` as a label: visible, and never read as a formula or as TeX."""
    if matplotlib.rcParams["text.usetex"] or _by_pgf():
        return tex_text(text)
    visible = shown(text, lambda character: character == " " or drawable(character)).replace("␣", " ")
    return visible.replace("$", r"\$") if matplotlib.rcParams["text.parse_math"] else visible


def token(visible: str) -> str:
    """What a picture is given of a token all of which is `drawable`.

    Tokens are drawn in matplotlib's fonts also where labels are set by TeX, which would need a run for each of them and
    lacks most scripts; only a pgf picture has no other letters than TeX's.
    """
    return escaped(visible) if _by_pgf() else visible


def _by_pgf() -> bool:
    """Whether what is drawn becomes TeX's own input."""
    return "pgf" in (matplotlib.rcParams["savefig.format"], matplotlib.get_backend(auto_select=False))


def _usual() -> tuple[str, ...]:
    """`font.family`, each generic name ("sans-serif") as the first font of its list that is installed."""
    found = (_installed_as(family, tuple(_listed(family))) for family in matplotlib.rcParams["font.family"])
    return tuple(dict.fromkeys(found))


def _listed(family: str) -> list[str]:
    generic = {"sans": "sans-serif", "sans serif": "sans-serif"}.get(family, family)
    lists = ("serif", "sans-serif", "cursive", "fantasy", "monospace")
    settings: dict[Any, Any] = matplotlib.rcParams
    return list(settings[f"font.{generic}"]) if generic in lists else [family]


@cache
def _installed_as(family: str, listed: tuple[str, ...]) -> str:
    """The name of the font that a family stands for; matplotlib's own where none of them is installed."""
    known = {name.lower(): name for name in font_manager.fontManager.get_font_names()}
    return next((known[name.lower()] for name in listed if name.lower() in known), "DejaVu Sans")


@cache
def _font_with(character: str, usual: tuple[str, ...]) -> str | None:
    """The first of the usual families, else of all installed ones by name, that has a shape for the character."""
    for family in usual:
        # A list: matplotlib reads a lone name as a fontconfig pattern, where a dash or a colon means something.
        path = font_manager.findfont(font_manager.FontProperties(family=[family]))
        if _covers(path, character):
            return family
    return next((family for family, path in _installed() if _covers(path, character)), None)


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    """Upright regular faces of every family, sans first; fonts made of placeholders or for formulas left out."""
    faces: dict[str, str] = {}
    for face in sorted(font_manager.fontManager.ttflist, key=lambda face: (face.name, str(face.fname))):
        regular = face.style == "normal" and face.weight in (400, "normal", "regular", "book")
        if regular and not face.name.startswith((".", "Last Resort", "STIX", "cm", "DejaVu Sans Display")):
            faces.setdefault(face.name, str(face.fname))
    return tuple(sorted(faces.items(), key=lambda item: ("Sans" not in item[0], item[0])))


def _covers(path: str, character: str) -> bool:
    try:
        font = font_manager.get_font(path)
    except (OSError, RuntimeError):  # a broken file, or a bitmap font, which cannot be scaled
        return False
    return bool(font.scalable) and font.get_char_index(ord(character)) != 0
