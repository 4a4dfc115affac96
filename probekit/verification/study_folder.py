"""A study folder: its settings, summary and tables, what its phases kept, its runs, and every file's checksum."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from probekit.checksums import SUMS, read_sums
from probekit.errors import InputError
from probekit.files import sha256_of
from probekit.foreign.json import read_object
from probekit.kept import read_document
from probekit.presentation.study_folder import SCHEMA, TABLES, open_study
from probekit.verification.findings import Notes
from probekit.verification.run_folder import verify_run


def verify_study(folder: Path, notes: Notes) -> None:
    """Everything that is not as the study was written goes to `notes`."""
    try:
        settings = read_object(folder / "study.json")
        if settings.get("schema") != SCHEMA:
            notes.add(folder / "study.json", f"has schema {settings.get('schema')!r}, not {SCHEMA!r}")
    except InputError as error:
        notes.add(folder / "study.json", error.problem)
    if (folder / SUMS).exists():
        if listed := verify_sums(folder, notes):
            _verify_listed(folder, listed, notes)
    elif (folder / "summary.json").exists():
        notes.add(folder, f"has no {SUMS}: an earlier version wrote it, or it is not finished")
    try:
        study = open_study(folder)
    except InputError as error:
        notes.add(folder, error.problem)
    else:
        for table in TABLES:
            try:
                study.table(table)
            except InputError as error:
                notes.add(folder / "tables" / f"{table}.csv", error.problem)
        for model in study.models:
            try:
                study.attributions(model)
            except InputError as error:
                notes.add(folder / "tables" / "attribution.csv", error.problem)
        there = {path.name for path in (folder / "traces").glob("*")}
        for model in study.models:
            named = PurePosixPath(str(study.entry(model)["trace"]))
            if named.parts[:1] != ("traces",) or len(named.parts) != 2 or named.name not in there:
                notes.add(folder, f"has no run {named} of {model}")
    for path in sorted((folder / "phases").glob("*/*.json")):
        try:
            made = read_document(path)["made"]
        except InputError as error:
            notes.add(path, error.problem)
            continue
        if path.stem == "exit_heads":
            heads = folder / "exit_heads" / f"{path.parent.name}.safetensors"
            if not heads.is_file() or sha256_of(heads, cached=False) != made.get("sha256"):
                notes.add(heads, "is missing, or damaged: its checksum is not the one that its phase noted")
    for run in sorted(path for path in (folder / "traces").glob("*") if path.is_dir()):
        verify_run(run, notes)


def _verify_listed(folder: Path, listed: Collection[str], notes: Notes) -> None:
    """What a study's results are read from stands in its list."""
    read = ["study.json", "summary.json", "report.html", *(f"tables/{table}.csv" for table in TABLES)]
    read += sorted(path.relative_to(folder).as_posix() for path in (folder / "phases").glob("*/*.json"))
    for name in read:
        if name not in listed and (folder / name).exists():
            notes.add(folder / name, f"is not listed in {SUMS}")


def verify_sums(folder: Path, notes: Notes) -> Collection[str]:
    """The files that `SHA256SUMS` lists; their names."""
    try:
        sums = read_sums(folder)
    except InputError as error:
        notes.add(folder / SUMS, error.problem)
        return ()
    if not sums:
        notes.add(folder / SUMS, "lists no file")
    notes.files += len(sums)
    for name, digest in sums.items():
        path = folder / name
        try:
            if path.is_symlink() or not path.is_file():
                notes.add(path, "is a link" if path.is_symlink() else "is missing")
            elif sha256_of(path, cached=False) != digest:
                notes.add(path, f"has changed since it was written: its checksum is not the one in {SUMS}")
        except OSError as error:
            notes.add(path, f"cannot be read: {error.strerror or error}")
    return sums
