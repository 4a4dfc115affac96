"""JSON from outside, read with bounds: its size, its nesting, its encoding, and what it must be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from probekit.errors import InputError
from probekit.foreign.text import SURROGATE, read_bytes

MOST_DEPTH = 100
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # only an escape can bring one into a text that was UTF-8


def read_json(path: str | Path, hint: str = "") -> Any:
    """What a JSON file holds.

    Raises InputError, with `hint`, for a file that cannot be read, is not UTF-8, is larger than `text.MOST_BYTES`,
    is nested deeper than MOST_DEPTH, or holds halves of surrogate pairs.
    """
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8")
    except InputError as error:
        raise InputError(error.problem, hint or error.hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint) from None
    return parse_json(text, str(path), hint)


def read_object(path: str | Path, hint: str = "") -> dict[str, Any]:
    """The same of a file that must hold an object; InputError for anything else."""
    document = read_json(path, hint)
    if not isinstance(document, dict):
        raise InputError(f"{path} cannot be read: it holds a {type(document).__name__}, not an object.", hint)
    return document


def parse_json(text: str, source: str, hint: str = "") -> Any:
    """What a text holds; the errors are those of `read_json`, and name `source`."""
    try:
        return loads(text)
    except ValueError as error:
        raise InputError(f"{source} cannot be read: {error}", hint) from None


def loads(text: str) -> Any:
    """`json.loads` that cannot use up the stack. Raises ValueError for what is no JSON, nested too deep, or no text."""
    if _deepest(text) > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep.")
    document = json.loads(text)
    if _HALF.search(text) and (half := _half_pair(document)):
        raise ValueError(f"it holds half of a surrogate pair (U+{ord(half):04X}), which is no text.")
    return document


def _half_pair(document: Any) -> str:
    """The first half of a surrogate pair in the texts and keys of a document; empty where there is none."""
    if isinstance(document, str):
        found = SURROGATE.search(document)
        return found[0] if found else ""
    if isinstance(document, dict):
        return next((half for pair in document.items() for each in pair if (half := _half_pair(each))), "")
    if isinstance(document, list):
        return next((half for each in document if (half := _half_pair(each))), "")
    return ""


def _deepest(text: str) -> int:
    """The deepest nesting of brackets outside strings: json's own parser would use up the stack."""
    depth = deepest = 0
    inside = escaped = False
    for sign in text:
        if escaped:
            escaped = False
        elif inside:
            escaped, inside = sign == "\\", sign != '"'
        elif sign == '"':
            inside = True
        elif sign in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MOST_DEPTH:
                break
        elif sign in "]}":
            depth -= 1
    return deepest
