"""Encoded prompts, of which only the first some are held in memory: the others wait in a temporary file.

A plan needs of every prompt how long it is, and a batch all of a few: so that many prompts take little memory, wherever
they come from. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import IO

from probekit.errors import InputError
from probekit.tracing.prompts import Encoded, Prompt

HELD_TOKENS = 2_000_000  # tokens of prompts that are held in memory, some hundred bytes each with their text


class PromptStore(Mapping[int, Encoded]):
    """Encoded prompts by their index, in the order in which they were added.

    sizes: {index: (tokens, context)}. hash: `sha256:hex` of all that the prompts hold, and their
    order, but not their source. source: where they came from: files, a bundled set, or Python.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}
        self._held: dict[int, Encoded] = {}
        self._tokens = 0
        self._places: dict[int, tuple[int, int]] = {}  # offset and length in the file
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256(b"[")
        self._sources: set[str] = set()

    def add(self, one: Encoded) -> None:
        """Raises InputError for an index that is there."""
        index = one.prompt.index
        if index in self.sizes:
            raise InputError("two prompts have the same index.", "Number them apart.")
        self._digest.update((", " if self.sizes else "").encode() + _document(one.prompt).encode())
        self._sources.add(one.prompt.source or "Python")
        self.sizes[index] = len(one.ids), one.context
        self._tokens += len(one.ids)
        if self._tokens <= HELD_TOKENS:
            self._held[index] = one
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with the store
        record = json.dumps(asdict(one)).encode()
        self._places[index] = self._file.seek(0, 2), len(record)
        self._file.write(record)

    @property
    def hash(self) -> str:
        digest = self._digest.copy()
        digest.update(b"]")
        return f"sha256:{digest.hexdigest()}"

    @property
    def source(self) -> str:
        return ", ".join(sorted(self._sources))

    def __getitem__(self, index: int) -> Encoded:
        if index in self._held:
            return self._held[index]
        offset, length = self._places[index]
        if self._file is None:
            raise KeyError(index)
        self._file.seek(offset)
        return _restored(json.loads(self._file.read(length)))

    def __iter__(self) -> Iterator[int]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def _document(prompt: Prompt) -> str:
    return json.dumps(asdict(replace(prompt, source="")), sort_keys=True)


def _restored(record: dict) -> Encoded:
    given = record.pop("prompt")
    lists = {name: None if given[name] is None else tuple(given[name]) for name in ("messages", "ids", "response_ids")}
    return Encoded(Prompt(**{**given, **lists}), **{**record, "ids": tuple(record["ids"])})
