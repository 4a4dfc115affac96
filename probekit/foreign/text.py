"""Text from outside: files that are whole, characters that can be written again, lengths that can be encoded."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from probekit.errors import InputError

MOST_BYTES = 256 * 2**20
MOST_CHARACTERS = 4_000_000  # of one text: a tokenizer takes about a hundred bytes a character, and aborts without them
SURROGATE = re.compile("[\ud800-\udfff]")
# What moves the cursor, colours, names the window, or turns the direction of writing; a line's end and tabs do not.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """What a file holds. Raises OSError, and InputError for more than `most` (MOST_BYTES) bytes and for no file.

    A pipe is not waited for, and a device is not read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a null byte in its name
        raise InputError(f"{printable(str(path))} cannot be read: {error}.") from None
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} cannot be read: it is no regular file.", "Write what it gives into a file.")
        most = MOST_BYTES if most is None else most
        if found.st_size > most:
            raise InputError(f"{path} cannot be read: it has {found.st_size:,} bytes; at most {most:,} are read.")
        return file.read(found.st_size)  # a larger number would be set aside whole


def check_text(text: str, where: str) -> str:
    """The text, or InputError where it is longer than MOST_CHARACTERS or no Unicode text (halves of surrogate pairs).

    where: what it is, as the sentence begins: "line 3: `prompt`".
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(
            f"{where} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are encoded.", "Cut it into several."
        )
    if half := SURROGATE.search(text):
        raise InputError(
            f"{where} is no Unicode text: it holds half of a surrogate pair (U+{ord(half[0]):04X}, character "
            f"{half.start():,}).",
            "Write it again as UTF-8.",
        )
    return text


def printable(text: str) -> str:
    """The same with escapes (`\\x1b`, `\\ud800`) for what would steer a terminal or cannot be encoded."""
    return _CONTROLS.sub(lambda sign: repr(sign[0])[1:-1], text)


def ascii_escapes(document: str) -> str:
    """A JSON document with JSON's own escapes in their place: it means the same."""
    return _CONTROLS.sub(lambda sign: f"\\u{ord(sign[0]):04x}", document)
