"""The docstrings' short form as numpydoc, which the site's parser knows: for mkdocstrings, as a griffe extension.

The code writes `name: what it is` on one line, and goes on below, indented. Numpydoc has the name on a line, the rest
below; it takes what follows the colon for a type, and every unindented line for a name. Here each entry is taken
apart, and what follows the entries as prose goes before them.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Parameters|Raises|Attributes)\n-+\n", re.MULTILINE)
ENTRY = re.compile(r"^([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): ?(.*)$")


class ShortDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_numpydoc(obj.docstring.value)


def as_numpydoc(text: str) -> str:
    """The same docstring with its sections as numpydoc has them, and lists of entries elsewhere as lists."""
    before, *sections = SECTION.split(text)
    prose, written = [_with_lists(before)], []
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        entries, _, after = body.strip("\n").partition("\n\n")
        written.append("\n".join([title, "-" * len(title), *map(_entry, entries.split("\n"))]))
        prose.append(_with_lists(after))
    return "\n\n".join(part.strip("\n") for part in [*prose, *written] if part.strip())


def _entry(line: str) -> str:
    found = ENTRY.match(line)
    return f"{found[1]}\n    {found[2]}" if found else line


def _with_lists(prose: str) -> str:
    """Paragraphs whose first line is an entry, as lists."""
    return "\n\n".join(_list(paragraph) if ENTRY.match(paragraph.split("\n")[0]) else paragraph
                       for paragraph in prose.split("\n\n"))  # fmt: skip


def _list(paragraph: str) -> str:
    def item(line: str) -> str:
        found = ENTRY.match(line)
        if found is None:
            return f"  {line.strip()}"
        return f"- {', '.join(f'`{name}`' for name in found[1].split(', '))}: {found[2]}"

    return "\n".join(map(item, paragraph.split("\n")))
