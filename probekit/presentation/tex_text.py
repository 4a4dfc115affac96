r"""Any text as LaTeX text, in every font encoding and with every engine.

What LaTeX reads as a command is escaped, ligatures are kept apart, and a character that its fonts may lack is written
as its code point, as `tokens.shown` does.
"""

from __future__ import annotations

import unicodedata
from itertools import pairwise

from probekit.presentation.tokens import shown

_SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",  # babel makes the sign itself a command in some languages
    # A row or an argument that begins with one of these would be read as an option of what is before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "␣": r"\textvisiblespace{}",
    "⏎": r"$\hookleftarrow$",
    "⇥": r"$\mapsto$",
    "⟨": r"$\langle$",
    "⟩": r"$\rangle$",
    "∅": r"$\emptyset$",
    "…": r"\ldots{}",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "±": r"$\pm$",
    "°": r"$^\circ$",
    "‖": r"$\Vert$",
    "•": r"$\bullet$",
    "−": r"$-$",
    "–": "--",
    "—": "---",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "\N{NO-BREAK SPACE}": "~",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip
_LETTERS = {"ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "œ": r"\oe{}", "Œ": r"\OE{}", "ø": r"\o{}", "Ø": r"\O{}",
            "ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}", "§": r"\S{}", "¶": r"\P{}", "¡": r"!`", "¿": r"?`"}  # fmt: skip
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"', "\u0304": "=", "\u0307": ".",
    "\u0306": "u", "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
_LIGATURES = {("-", "-"), ("'", "'"), ("`", "`"), (",", ","), ("?", "`"), ("!", "`")}


def tex_text(text: str) -> str:
    """`text` as LaTeX: visible, ASCII only, never read as a command."""
    return escaped(" ".join(shown(part, has_tex) if part else "" for part in text.split(" ")))


def escaped(visible: str) -> str:
    """The LaTeX of text of which everything `has_tex`."""
    pieces = [_tex(character) for character in visible]
    for place, pair in enumerate(pairwise(visible)):
        if pair in _LIGATURES:
            pieces[place] += "{}"
    return "".join(pieces)


def has_tex(character: str) -> bool:
    """Whether LaTeX has this character in every font encoding."""
    return _tex(character) != ""


def _tex(character: str) -> str:
    """The character as LaTeX, empty where there is none."""
    found = _SIGNS.get(character) or _LETTERS.get(character)
    if found:
        return found
    if character.isascii():
        return character
    parts = unicodedata.normalize("NFD", character)
    letter, marks = parts[0], parts[1:]
    if len(marks) == 1 and marks in _ACCENTS and letter.isascii() and letter.isalpha():
        dotless = rf"\{letter}" if letter in "ij" and marks != "\u0327" else letter
        return rf"\{_ACCENTS[marks]}{{{dotless}}}"
    return ""
