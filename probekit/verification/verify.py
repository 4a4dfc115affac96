"""`verify`: whether a run, a study or an exported choice is as it was written. Nothing here needs torch."""

from __future__ import annotations

import os
from pathlib import Path

from probekit.checksums import SUMS
from probekit.errors import InputError
from probekit.files import LOCK, check_unlocked
from probekit.verification.findings import Notes, Verified
from probekit.verification.run_folder import is_run, verify_run
from probekit.verification.study_folder import verify_study, verify_sums


def verify(folder: str | Path) -> Verified:
    """Check again what lies in a folder: its files, their checksums and schema, and the weights it was made with.

    A run's files are held against its manifest, their tables against the schema and each other; a study's against
    `SHA256SUMS`, with each of its runs and what its phases kept; an exported choice's against `SHA256SUMS`. Weights
    are hashed where they can be reached on this machine, and named where not. Every file is read anew; nothing is
    written.

    Raises
    ------
    InputError: for a folder that is none of these, and for one that a process writes to.

    Examples
    --------
    >>> import tempfile
    >>> import probekit
    >>> folder = tempfile.mkdtemp()
    >>> _ = probekit.trace("tales-tied", ["Once upon a time"], folder, max_new_tokens=8)
    >>> found = probekit.verify(folder)
    >>> found.whole, found.files, found.weights[0].state
    (True, 4, 'same')
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {folder}.", "Name the folder of a run, a study or an exported choice.")
    if (folder / LOCK).exists():
        check_unlocked(folder)
    notes = Notes()
    if (folder / "study.json").exists() or (folder / "summary.json").exists():
        verify_study(folder, notes)
        kind = "study"
    elif is_run(folder):
        verify_run(folder, notes)
        kind = "run"
    elif any((folder / name).exists() for name in (SUMS, "choice.json", "schedule.json")):
        if (folder / SUMS).exists():
            verify_sums(folder, notes)
        else:
            notes.add(folder, f"has no {SUMS}: an earlier version wrote it, or it is not finished")
        kind = "export"
    else:
        raise InputError(
            f"{folder} is no run, no study and no exported choice: it has no manifest.json, study.json or {SUMS}.",
            "Name the folder that `probekit trace`, `study` or `export` wrote.",
        )
    return Verified(folder, kind, notes.files, tuple(notes.weights), tuple(notes.findings))  # type: ignore[arg-type]
