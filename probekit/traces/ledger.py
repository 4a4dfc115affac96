"""Ledgers: what the processes of a run have written so far, a line a part, beside the manifest.

Each process appends to a file of its own, so that a run of many parts does not write its whole manifest with each of
them, and no two processes write one file. The manifest takes the ledgers in at the end, and when a run is resumed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from probekit.errors import InputError
from probekit.files import append_line
from probekit.foreign.json import parse_json
from probekit.foreign.text import read_bytes


@dataclass(frozen=True)
class LedgerEntry:
    """What came of one part, or of one try at it: the part's share of what the manifest calls `Measured`."""

    files: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, int | float] = field(default_factory=dict)
    savings: Mapping[str, int | float] | None = None
    logged: Mapping[str, int | float] | None = None
    backoff: Mapping[str, Any] | None = None


_ENTRY = TypeAdapter(LedgerEntry)


def ledger_of(folder: Path, rank: int) -> Path:
    return folder / f"ledger-{rank:05d}.jsonl"


def is_ledger(name: str) -> bool:
    return re.fullmatch(r"ledger-\d{5,}\.jsonl", name) is not None


def ledgers_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("ledger-*.jsonl"))


def append_entry(path: Path, entry: LedgerEntry) -> None:
    """Write an entry, and return when the disk has it."""
    given = {name: value for name, value in asdict(entry).items() if value}
    append_line(path, json.dumps(given, ensure_ascii=False))


def ledger_entries(folder: Path) -> Iterator[LedgerEntry]:
    """The entries of all ledgers in a folder. A line that its writer did not finish is left out.

    Raises InputError for a damaged ledger, and names it.
    """
    for path in ledgers_in(folder):
        hint = f"Delete {path}: the parts that it lists are made anew."
        try:
            whole, _, _ = read_bytes(path).decode("utf-8").rpartition("\n")
            for line in whole.splitlines():
                yield _ENTRY.validate_python(parse_json(line, str(path), hint))
        except ValidationError as error:
            raise InputError(f"{path} is no ledger of a run: {error.errors()[0]['msg']}.", hint) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}", hint) from None
