"""Token text: everything visible, nothing cut in two, nothing empty."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.presentation.tokens import clipped, columns, shown

ANY_TEXT = st.text(st.characters(codec=None), max_size=12)  # lone surrogates, controls, private letters and all


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "␣the"),
        ("\n\n", "⏎⏎"),
        ("\tx\r", "⇥x␍"),
        ("", "∅"),
        ("a\u200bb", "a⟨200B⟩b"),  # zero-width space
        ("\u00a0", "⟨00A0⟩"),  # no-break space
        ("\x07", "⟨0007⟩"),
        ("\u202eabc", "⟨202E⟩abc"),  # would turn the rest of the line around
        ("\ufe0f", "⟨FE0F⟩"),  # a variation selector draws nothing
        ("\ue000", "⟨E000⟩"),  # private use
        ("\udce2\udc80", "⟨0xE2⟩⟨0x80⟩"),  # half a character, as surrogateescape keeps it
        ("\ud800", "⟨D800⟩"),
        ("\ufffd", "\ufffd"),
        ("\u0301", "◌\u0301"),  # an accent without a letter gets a place to stand
        ("e\u0301", "e\u0301"),
        ("<b>&", "<b>&"),
        ("王القمر", "王القمر"),
        ("␣the", "␣the"),  # what a trace holds is shown already
    ],
)
def test_shown(text: str, expected: str):
    assert shown(text) == expected


def test_what_cannot_be_drawn_is_escaped():
    assert shown(" 王a😀", str.isascii) == "⟨2423⟩⟨738B⟩a⟨1F600⟩"


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("princess", 8, "princess"),
        ("princess", 7, "prince…"),
        ("princess", 1, "…"),
        ("a\u200bb", 5, "a…"),  # an escape stays whole or goes
        ("王王王", 6, "王王王"),
        ("王王王", 5, "王王…"),
        ("e\u0301e\u0301e\u0301", 2, "e\u0301…"),
    ],
)
def test_clipped(text: str, width: int, expected: str):
    assert clipped(text, width) == expected


@given(ANY_TEXT)
def test_nothing_stays_invisible(text: str):
    seen = shown(text)
    assert seen
    assert all(unicodedata.category(character)[0] not in "CZ" for character in seen)
    assert shown(seen) == seen
    seen.encode()  # no lone surrogate is left: it can be printed, saved and sent


@given(ANY_TEXT, st.integers(1, 12))
def test_clipped_keeps_to_its_width(text: str, width: int):
    cut = clipped(text, width)
    assert columns(cut) <= width
    assert cut == shown(text) or shown(text).startswith(cut.removesuffix("…"))
