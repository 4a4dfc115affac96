"""Token texts as a trace keeps them, white space and stray bytes made visible; and repetition in a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

LOOP_TOKENS = 8


def looped(tokens: Sequence[int], length: int = LOOP_TOKENS) -> float:
    """Share of `tokens` that lie inside a repeated n-gram, 0..1.

    A run of `length` tokens is repeated when the same run began earlier in the same text (the two may overlap); a
    token is looped when some repeated run covers it. So the first time round of a loop does not count, and a text
    shorter than `length` + 1 tokens has none.
    """
    return float(looped_mask(tokens, length).mean()) if len(tokens) else 0.0


def looped_mask(tokens: Sequence[int], length: int = LOOP_TOKENS) -> np.ndarray:
    """(tokens,) bool: the tokens that some repeated run covers, as `looped` counts them."""
    covered = np.zeros(len(tokens), dtype=bool)
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - length + 1):
        run = tuple(tokens[start : start + length])
        if run in seen:
            covered[start : start + length] = True
        seen.add(run)
    return covered


def visible(text: str) -> str:
    """A token's text with its white space made visible: space, line end and tab get a sign each."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def spelled_bytes(spelling: str) -> str:
    """A vocabulary's spelling of a token that is no whole character, with each stray byte as ⟨0xE2⟩.

    Byte-level vocabularies (GPT-2's) stand a letter for each byte; SentencePiece's write <0xE2>. Other spellings are
    returned as they are.
    """
    if re.fullmatch(r"(<0x[0-9A-Fa-f]{2}>)+", spelling):
        return spelling.replace("<", "⟨").replace(">", "⟩")
    if not spelling or any(letter not in _BYTE_OF_LETTER for letter in spelling):
        return spelling
    raw = bytes(_BYTE_OF_LETTER[letter] for letter in spelling)
    return re.sub(r"\\x([0-9a-f]{2})", lambda byte: f"⟨0x{byte[1].upper()}⟩", raw.decode("utf-8", "backslashreplace"))


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes are their own letters, the others follow from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()
