"""Text from outside: files that are whole, characters that can be written again, lengths that can be encoded."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

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
    """The text, or InputError: it is none, or too long (MOST_CHARACTERS), or no Unicode (halves of surrogate pairs).

    where: what it is, as the sentence begins: "line 3: `prompt`".
    """
    if not isinstance(text, str):
        raise InputError(f"{where} is a {type(text).__name__}; expected one text.")
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


def token_ids(given: Any, where: str) -> list[int]:
    """Token ids, of a list, an array or a tensor. Raises InputError for anything else, a batch of them among it."""
    ids = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(ids, Sequence) or not all(isinstance(each, Integral) for each in ids):
        raise InputError(
            f"{where} is a {type(given).__name__} that is none of token ids; expected a text, or token ids.",
            "probekit.trace takes many texts; this takes one.",
        )
    return [int(each) for each in ids]


def printable(text: str) -> str:
    """The same with escapes (`\\x1b`, `\\ud800`) for what would steer a terminal or cannot be encoded."""
    return _CONTROLS.sub(lambda sign: repr(sign[0])[1:-1], text)


def ascii_escapes(document: str) -> str:
    """A JSON document with JSON's own escapes in their place: it means the same."""
    return _CONTROLS.sub(lambda sign: f"\\u{ord(sign[0]):04x}", document)
