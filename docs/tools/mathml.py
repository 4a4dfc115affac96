"""Formulas as MathML, made when the site is built: a page needs no script, no font and no network to show them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex leaves in the page: \(...\) in a span, \[...\] in a div.
FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\(?:\((.*?)\\\)|\[(.*?)\\\])</(?:span|div)>', re.DOTALL)

# The converter writes a function's name as an operator, which stands apart from its bracket.
NAME = re.compile(r"<mo>([A-Za-z]{2,})</mo>")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """mkdocs calls this with each page's HTML."""

    def replaced(found: re.Match[str]) -> str:
        inline, display = found.groups()
        return as_mathml(unescape(inline or display), "inline" if display is None else "block", page.file.src_uri)

    return FORMULA.sub(replaced, html)


def as_mathml(latex: str, display: str, page: str) -> str:
    """One formula. What the converter does not know it would print as it stands, so that is an error."""
    mathml = convert(latex.strip(), display=display)
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        raise PluginError(f"{page}: the formula {latex.strip()!r} has a command that latex2mathml does not know.")
    return NAME.sub(r"<mi>\1</mi>", mathml)
