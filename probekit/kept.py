"""What the steps of a long job made, kept on disk so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from probekit.errors import InputError, Remark
from probekit.files import atomic_bytes, atomic_text, make_folder, sha256_of
from probekit.foreign.json import read_object


@dataclass(frozen=True)
class Kept:
    """Artefacts as JSON, one file a phase, under the digest of the settings and weights that they were made with.

    Each carries its checksum: one that is damaged is named, and made anew.
    """

    folder: Path
    digest: str

    def path(self, phase: str) -> Path:
        return self.folder / f"{phase}.json"

    def once(self, phase: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a phase made: read where it was made before with the same settings, else made and kept."""
        path = self.path(phase)
        before = self._before(path)
        if before is not None:
            return before
        made = json.dumps(make())
        make_folder(path.parent)
        atomic_text(path, sealed(self.digest, made))
        return json.loads(made)  # as JSON holds it, also the first time

    def file_once(self, phase: str, path: Path, make: Callable[[], bytes]) -> Path:
        """The same of a phase that makes a file of its own: made anew where that file is missing or damaged."""

        def write() -> dict[str, Any]:
            make_folder(path.parent)
            content = make()
            atomic_bytes(path, content)
            return {"file": path.name, "sha256": sha256(content).hexdigest()}

        if self._before(self.path(phase)) is not None and not self._is_whole(phase, path):
            warnings.warn(f"{path} is missing or damaged; it is made anew.", Remark, stacklevel=2)
            self.path(phase).unlink()
        self.once(phase, write)
        return path

    def _is_whole(self, phase: str, path: Path) -> bool:
        return path.is_file() and sha256_of(path) == (self._before(self.path(phase)) or {}).get("sha256")

    def _before(self, path: Path) -> dict[str, Any] | None:
        """What was kept with these settings; None where nothing was, or it is damaged, of which it warns."""
        if not path.exists():
            return None
        try:
            kept = read_document(path)
        except InputError as error:
            warnings.warn(f"{error.problem.rstrip('.')}; it is made anew.", Remark, stacklevel=2)
            return None
        return kept["made"] if kept["digest"] == self.digest else None


def sealed(digest: str, made: str) -> str:
    """JSON in one line, `made` within it beside its checksum and the digest of what it was made with."""
    kept = {"digest": digest, "sha256": sha256(made.encode()).hexdigest()}
    return f'{json.dumps(kept)[:-1]}, "made": {made}}}'


def read_document(path: Path) -> dict[str, Any]:
    """A file of `Kept`, {"digest", "sha256", "made"}. Raises InputError, which names it, where it is damaged."""
    kept = read_object(path)
    made = kept.get("made")
    if (
        not isinstance(made, dict)
        or not isinstance(kept.get("digest"), str)
        or sha256(json.dumps(made).encode()).hexdigest() != kept.get("sha256")
    ):
        raise InputError(f"{path} is damaged: its checksum is not the one that it carries.")
    return kept
