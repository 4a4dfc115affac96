"""`SHA256SUMS`: the checksums of a folder's files, in the form that `sha256sum -c` reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from probekit.errors import InputError
from probekit.files import LOCK, UNFINISHED, atomic_text, sha256_of
from probekit.foreign.text import read_bytes

SUMS = "SHA256SUMS"
_LINE = re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9a-f]{64}) [ *](?P<name>.+)")


def write_sums(folder: Path, wanted: Callable[[PurePosixPath], bool] = lambda _: True) -> None:
    """List a folder's files. wanted: whether a file, named from the folder, is listed."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = [PurePosixPath(path.relative_to(folder).as_posix()) for path in found]
    own = (SUMS, LOCK)
    _write(folder, {
        str(name): sha256_of(folder / name)
        for name in names if name.name not in own and not name.name.endswith(UNFINISHED) and wanted(name)
    })  # fmt: skip


def renew_sums(folder: Path, names: Iterable[str]) -> None:
    """Files that were written anew since, in a folder that has a list; nothing where it has none."""
    if (folder / SUMS).is_file():
        _write(folder, read_sums(folder) | {name: sha256_of(folder / name) for name in names})


def read_sums(folder: Path) -> dict[str, str]:
    """{file, named from the folder: its SHA-256, hexadecimal}. Raises InputError for a list that is none."""
    path = folder / SUMS
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    sums = {}
    for number, line in enumerate(lines, start=1):
        found = _LINE.fullmatch(line)
        name = "" if found is None else _unescaped(found["name"]) if found["escaped"] else found["name"]
        place = PurePosixPath(name)
        if found is None or place.is_absolute() or ".." in place.parts or "\0" in name:
            raise InputError(
                f"{path}, line {number} is no checksum and file of this folder.",
                "Delete this list; what wrote the folder writes it anew.",
            )
        sums[name] = found["digest"]
    return sums


def _write(folder: Path, sums: dict[str, str]) -> None:
    lines = []
    for name in sorted(sums):
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{'' if escaped == name else chr(92)}{sums[name]}  {escaped}\n")
    atomic_text(folder / SUMS, "".join(lines))


def _unescaped(name: str) -> str:
    letters = {"n": "\n", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([nr\\])", lambda found: letters[found[1]], name)
