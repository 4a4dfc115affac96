"""Files that are written: each whole or not at all, to a name that was checked, by one process at a time.

A file is written under a name of its own beside its place, synced, and renamed; then its folder is synced. So a file
under its own name is whole, whatever ends the process. Links and devices are never written through or replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from probekit.errors import InputError, ProbekitError, ResourceError

UNFINISHED = ".unfinished"
LOCK = ".lock"
# What a machine lacks; everything else that the system refuses is a name that its user can change.
_LACKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def atomic_text(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all; half a character (a lone surrogate) is written as an escape."""
    atomic_bytes(path, text.encode("utf-8", "backslashreplace"))


def atomic_bytes(path: str | Path, content: Any) -> None:
    """Write a file, whole or not at all.

    Raises InputError for a place that cannot be written, and ResourceError where the disk has no room; both name it.
    """
    path = check_file_target(path)
    unfinished = path.with_name(f".{secrets.token_hex(8)}{UNFINISHED}")  # short: the name itself may be a long one
    try:
        with _created(unfinished) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            unfinished.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file of lines, UTF-8, and return when the disk has it. A killed writer may leave half a line.

    Raises as `atomic_bytes`.
    """
    path = check_file_target(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
            file.write((line + "\n").encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def _created(path: Path) -> Any:
    """A new file, open for bytes: what is there already under this name, a planted link too, is not opened."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb")


def _sync_folder(folder: Path) -> None:
    """Make a rename last: where a system cannot (it has no such call for folders), it does so in its own time."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make a folder and those above it. Raises InputError or ResourceError, which name it."""
    folder = check_folder_target(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def cannot_write(path: Path, error: OSError) -> ProbekitError:
    """What the system said of a place that was to be written, as an error of ours."""
    said = f"{path} cannot be written: {error.strerror or error}."
    if error.errno in _LACKS:
        return ResourceError(said, "Nothing is left half written; make room, and run the same command again.")
    return InputError(said, "Name another place.")


@contextmanager
def built(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A place beside `target` at which a library writes a file, or a folder's files: they are put there at the end.

    A file is replaced whole; a folder that is there keeps its other files. After an exception nothing is left.

    Raises InputError or ResourceError, which name the target, where the system refuses.
    """
    target = Path(target)
    make_folder(target.parent)
    place = target.parent / f".{secrets.token_hex(8)}{UNFINISHED}"
    try:
        yield place
        if not (place.is_dir() and target.is_dir()):
            place.replace(target)
        else:
            for each in sorted(place.iterdir()):
                each.replace(target / each.name)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):
            place.unlink()


# -------------------------------------------------------------------------------------------- before the work
def check_file_target(path: str | Path, name: str = "") -> Path:
    """A file that can be written later, before the work that fills it.

    name: of the option that names it. Raises InputError for what is no plain file, for a missing folder, and for what
    may not be written.
    """
    path, said = Path(path), f"{name} is {path}, " if name else f"{path} cannot be written: "
    which = "which" if name else "it"
    kind = _kind(path, said)
    if kind is not None and stat.S_ISLNK(kind):
        raise InputError(f"{said}{which} is a link; files are not written through links.", "Name the file itself.")
    if kind is not None and not stat.S_ISREG(kind):
        raise InputError(f"{said}{which} is no file that can be written.", "Name a file.")
    if not os.path.isdir(path.parent):
        raise InputError(
            f"{said}{'and ' if name else ''}there is no folder {path.parent}.", "Make it, or name another file."
        )
    if not os.access(path if kind is not None else path.parent, os.W_OK):
        raise InputError(f"{said}{which} may not be written.", "Name another file.")
    return path


def check_folder_target(folder: str | os.PathLike[str]) -> Path:
    """A folder that is there and can be written to, or can be made. Raises InputError."""
    folder = Path(folder)
    said = f"{folder} cannot be written: "
    above = folder
    while _kind(above, said) is None and above != above.parent:
        above = above.parent
    try:
        plain = stat.S_ISDIR(above.stat().st_mode)
    except OSError as error:  # a link to nothing, or to itself
        raise InputError(f"{said}{above} is a link that leads nowhere ({error.strerror}).", "Name another.") from None
    if not plain:
        what = "is a file; a folder is needed" if above == folder else f"is below {above}, which is no folder"
        raise InputError(f"{folder} {what}.", "Name another one.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{said}{above} may not be written.", "Name another one.")
    return folder


def _kind(path: Path, said: str) -> int | None:
    """What is at a place itself, links not followed; None where nothing is."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # the name is too long, or has a zero byte
        raise InputError(f"{said}{getattr(error, 'strerror', None) or error}.", "Name another place.") from None


def entries(folder: Path) -> list[Path]:
    """What is in a folder, without what writers of files leave there: locks, and what a killed one did not finish."""
    return sorted(
        path for path in folder.iterdir() if not path.name.startswith(LOCK) and not path.name.endswith(UNFINISHED)
    )


# ---------------------------------------------------------------------------------------------------- one writer
@contextmanager
def locked(folder: str | os.PathLike[str], helper: int | None = None) -> Iterator[Path]:
    """Within it this process alone writes to the folder, which is made if it is not there.

    The lock is the system's: it ends with the process, however that ends. What a killed writer left unfinished is
    removed. A folder that was made for this, and is empty at the end, is removed again.

    helper: the number of a process that writes with the one that holds the folder: its own lock outlives the other's,
    and while it is held nobody else gets the folder.

    Raises InputError while another process holds the lock, and names it.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    make_folder(folder)
    try:
        with _held(folder / (LOCK if helper is None else f"{LOCK}-{helper:05d}")):
            if helper is None:
                for left in folder.glob(f"{LOCK}-*"):
                    with _held(left):
                        pass
                clear_unfinished(folder)
            yield folder
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()  # which removes empty folders only


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """A lock file, held and removed again. Raises InputError while another process holds it."""
    lock = FileLock(path, mode=0o644, is_singleton=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, RuntimeError):  # the second: held in this very process
        raise InputError(f"{path.parent} is in use: {_holder(path)}.", "Wait for it, or name another folder.") from None
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        _write_holder(path)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever waits for it finds it gone, and makes its own
        lock.release()


def check_unlocked(folder: str | os.PathLike[str]) -> None:
    """Raise InputError, which names the holder, while another process writes to the folder."""
    folder = check_folder_target(folder)
    if folder.is_dir() and any(folder.glob(f"{LOCK}*")):
        with locked(folder):
            pass


def _write_holder(path: Path) -> None:
    holder = {
        "process": os.getpid(), "host": platform.node(), "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }  # fmt: skip
    with suppress(OSError):  # on a full disk, the lock holds all the same
        path.write_text(json.dumps(holder), encoding="utf-8")


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']} writes to it since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process writes to it"


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed writer left in a folder that nobody else writes to."""
    for left in folder.glob(f"*{UNFINISHED}"):
        with suppress(OSError):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


# ------------------------------------------------------------------------------------------------------ checksums
def sha256_of(path: str | Path, *, cached: bool = True) -> str:
    """The SHA-256 of a file, hexadecimal; if `cached`, read once while size and time of the file stay the same."""
    found = Path(path).stat()
    return (_sha256 if cached else _sha256.__wrapped__)(
        os.path.abspath(path), found.st_ino, found.st_size, found.st_mtime_ns
    )


@lru_cache(maxsize=4096)
def _sha256(path: str, inode: int, size: int, modified: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
