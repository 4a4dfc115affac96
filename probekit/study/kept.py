"""What the phases of one model made, kept on disk so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probekit.errors import InputError
from probekit.files import atomic_text
from probekit.foreign.json import read_json


@dataclass(frozen=True)
class Kept:
    """Artefacts as JSON, one file a phase, under the digest of the settings and weights that they were made with."""

    folder: Path
    digest: str

    def path(self, phase: str) -> Path:
        return self.folder / f"{phase}.json"

    def once(self, phase: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a phase made: read where it was made before with the same settings, else made and kept."""
        path = self.path(phase)
        before = _document(path)
        if before.get("digest") != self.digest:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = {"digest": self.digest, "made": make()}
            atomic_text(path, json.dumps(before))
        return _document(path)["made"]  # as JSON holds it, also the first time


def _document(path: Path) -> dict[str, Any]:
    """The file's contents; nothing where there is none, or a damaged one."""
    try:
        document = read_json(path)
    except InputError:
        return {}
    return document if isinstance(document, dict) and "made" in document else {}
