"""JSON from outside, read with bounds: its size, its nesting, its encoding, and what it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from probekit.errors import InputError

MOST_BYTES = 256 * 2**20
MOST_DEPTH = 100


def read_json(path: str | Path, hint: str = "") -> Any:
    """What a JSON file holds.

    Raises InputError, with `hint`, for a file that cannot be read, is not UTF-8, is larger than MOST_BYTES, or is
    nested deeper than MOST_DEPTH.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputError(f"{path} cannot be read: it has {size:,} bytes; at most {MOST_BYTES:,} are read.", hint)
        text = path.read_bytes().decode("utf-8")
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
    """`json.loads` that cannot use up the stack. Raises ValueError for what is no JSON, or is nested too deep."""
    if _deepest(text) > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep.")
    return json.loads(text)


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
