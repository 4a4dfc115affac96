"""The folder of a run: parts that are written whole or not at all, and are read again.

A run folder holds `manifest.json` and one set of Parquet parts for each batch of its plan. A part counts when the
manifest, or a ledger beside it, lists its files, with their checksums, and they are there; so a run that was killed
goes on where it stopped, and what is damaged, or of another run, is found.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from probekit.errors import InputError, Remark
from probekit.files import (
    atomic_bytes,
    atomic_text,
    check_folder_target,
    check_unlocked,
    entries,
    locked,
    make_folder,
    sha256_of,
)
from probekit.traces.ledger import LedgerEntry, append_entry, is_ledger, ledger_of, ledgers_in
from probekit.traces.manifest import Manifest, read_manifest
from probekit.traces.schema import LENSES, REQUIRED, checked, conform, require_columns

EXIT_HEADS = "exit_heads.safetensors"  # beside the manifest, where the run was read through some
PART_NAME = re.compile(r"[a-z_]+-\d{5,}\.(parquet|safetensors)")
_MADE_ANEW = "Run the same `probekit trace` command again with --resume: it is made anew."


class Tables(Protocol):
    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None: ...


class TablesInMemory:
    """Tables in memory."""

    def __init__(self, frames: Mapping[str, pd.DataFrame]) -> None:
        self._frames = dict(frames)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        frame = self._frames.get(table)
        if frame is None or columns is None:
            return frame
        require_columns(table, frame.columns, columns)
        return frame[list(columns)]


class TablesInParts:
    """Tables in the Parquet parts of a run folder, or in some of them; a whole table, once read, is kept."""

    def __init__(self, folder: Path, manifest: Manifest, parts: Sequence[int] | None = None) -> None:
        self._folder = folder
        self._manifest = manifest
        self._parts = range(len(manifest.plan.batches)) if parts is None else parts
        self._whole: dict[str, pd.DataFrame] = {}

    def some(self, parts: Sequence[int]) -> TablesInParts:
        """The tables of some parts."""
        return TablesInParts(self._folder, self._manifest, parts)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        if table not in tables_of(self._manifest):
            return None
        if table in self._whole and columns is not None:
            require_columns(table, self._whole[table].columns, columns)
            return self._whole[table][list(columns)]
        if table not in self._whole:
            frame = self._load(table, columns)
            if columns is not None:
                return frame
            self._whole[table] = frame
        return self._whole[table]

    def _load(self, table: str, columns: Sequence[str] | None) -> pd.DataFrame:
        parts = []
        for part in self._parts:
            path = checked_file(self._folder, self._manifest, part_name(table, part))
            try:
                require_columns(table, pq.read_schema(path).names, columns or REQUIRED[table])
                read = pq.read_table(path, columns=None if columns is None else list(columns))
                parts.append(checked(table, read, str(path)))
                _check_prompts(table, parts[-1], self._manifest.plan.batches[part], path)
                if table == "texts":
                    self._check_lengths(parts[-1], path, part_name("tokens", part))
            except (OSError, ValueError, pa.ArrowException) as error:
                raise InputError(f"{path} cannot be read: {error}", _MADE_ANEW) from None
        # Text of which a part has none is written without a type by pandas 2.
        frame = pa.concat_tables(parts, promote_options="default").unify_dictionaries().to_pandas()
        if "lens" in frame.columns:
            frame["lens"] = frame["lens"].cat.set_categories(LENSES)
        return frame

    def _check_lengths(self, texts: pa.Table, path: Path, tokens: str) -> None:
        """Texts are as long as the rows of their tokens, before anything is made of these numbers."""
        if not os.path.isfile(self._folder / tokens):
            return  # it is missed where it is read
        beside = checked_file(self._folder, self._manifest, tokens)
        try:
            rows = pq.read_metadata(beside).num_rows
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InputError(f"{beside} cannot be read: {error}", _MADE_ANEW) from None
        named = [name for name in ("prompt_tokens", "new_tokens") if name in texts.column_names]
        columns = [[int(each) for each in texts[name].to_pylist()] for name in named]
        if any(length > rows + 1 for column in columns for length in column) or (
            len(columns) == 2 and sum(map(sum, columns)) - len(texts) != rows
        ):
            raise InputError(f"{path} names texts of other lengths than {tokens} holds.", _MADE_ANEW)


def _check_prompts(table: str, read: pa.Table, batch: Sequence[int], path: Path) -> None:
    """A part is of the prompts that the plan names; one row of `texts` for each, of at least a token and one more."""
    if "prompt" in read.column_names:
        held = read["prompt"].to_pylist() if table == "texts" else read["prompt"].unique().to_pylist()
        whole = sorted(held) == sorted(batch) if table == "texts" else set(held) <= set(batch)
        if not whole:
            raise InputError(f"{path} holds other prompts than its plan names, or one twice.", _MADE_ANEW)
    for name in ("prompt_tokens", "new_tokens"):
        if table == "texts" and name in read.column_names and min(read[name].to_pylist()) < 1:
            raise InputError(f"{path} holds a text of no {name.replace('_', ' ')}.", _MADE_ANEW)


def tables_of(manifest: Manifest) -> list[str]:
    """Tables of a run, in the order in which a part's files are written."""
    optional = [
        ("top", manifest.settings.top_prompts > 0),
        ("drafter", manifest.drafter is not None),
        ("draft_head", manifest.settings.draft_vocabulary is not None),
    ]
    return ["texts", "tokens", *(name for name, there in optional if there), "layers"]


def part_name(table: str, part: int) -> str:
    return f"{table}-{part:05d}.{'safetensors' if table == 'residuals' else 'parquet'}"


def files_of(manifest: Manifest, part: int) -> list[str]:
    """The names of a part's files."""
    tables = tables_of(manifest) + (["residuals"] if manifest.settings.keep_residuals else [])
    return [part_name(table, part) for table in tables]


def is_done(folder: Path, manifest: Manifest, part: int, *, there: bool = True) -> bool:
    """Whether a part's files are listed, and (`there`) in the folder. Checksums are compared when a file is read."""
    listed, names = manifest.files, files_of(manifest, part)
    return (listed is None or all(name in listed for name in names)) and (
        not there or all((folder / name).is_file() for name in names)
    )


def checked_file(folder: Path, manifest: Manifest, name: str) -> Path:
    """A file of a run, after its checksum was compared with the manifest's (runs of earlier versions list none).

    Raises InputError, which names it, where it is missing, damaged, or of another run.
    """
    path = folder / name
    if wrong := what_is_wrong(folder, manifest, name):
        raise InputError(f"{path} {wrong}.", _MADE_ANEW)
    return path


def what_is_wrong(folder: Path, manifest: Manifest, name: str, *, cached: bool = True) -> str:
    """What is wrong with a file of a run, as the end of a sentence that begins with its name; empty: nothing.

    cached: a file that was read before, and has the same size and time of change, is not read again.
    """
    path, listed = folder / name, manifest.files
    try:
        if path.is_symlink() or not path.is_file():
            return "is a link" if path.is_symlink() else "is missing"
        if listed is not None and name not in listed:
            return "is not listed in the manifest"
        if listed is not None and sha256_of(path, cached=cached) != listed[name]:
            return "is damaged or of another run: its checksum is not the one that the manifest lists"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return ""


class TraceWriter:
    """Writes the parts of one run, each whole or not at all; without a folder, keeps them in memory.

    `resume` goes on with the run in the folder, by the batch plan of its manifest, and makes parts that are damaged
    anew; a run of other settings is refused, and they are named. Without `resume`, the folder must be absent or empty.
    Nothing is written before the first part. One writer a folder: hold `probekit.files.locked` meanwhile.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        manifest: Manifest,
        *,
        resume: bool = False,
        exit_heads: bytes | None = None,
    ) -> None:
        self._set(None if folder is None else Path(folder), manifest, exit_heads)
        if self.folder is None:
            if manifest.settings.keep_residuals:
                raise InputError("kept residuals are written to files: name a folder for this run.")
            return
        present = check_run_folder(self.folder, manifest, resume=resume)
        if present is not None:
            self.manifest, self._begun = present, True
            self.finish()
            self._find_whole_parts()
            if self.exit_heads is not None and EXIT_HEADS not in (self.manifest.files or {}):
                self.update(files={**(self.manifest.files or {}), **self._write_file(EXIT_HEADS, self.exit_heads)})

    def _set(self, folder: Path | None, manifest: Manifest, exit_heads: bytes | None = None, rank: int = 0) -> None:
        self.folder = folder
        self.manifest = manifest
        self.ledger = None if folder is None else ledger_of(folder, rank)
        self.exit_heads = exit_heads
        self.mine: Sequence[int] | None = None  # the parts that it writes; None: all
        self.remade: set[int] = set()  # parts that were written before, and are damaged
        self._begun = False
        self._done: set[int] = set()
        self._memory: dict[int, dict[str, pd.DataFrame]] = {}
        self._entries: list[LedgerEntry] = []  # of a run in memory

    @property
    def pending(self) -> list[int]:
        """Parts of the plan that are this writer's, and not written yet."""
        mine = range(len(self.manifest.plan.batches)) if self.mine is None else self.mine
        return [part for part in mine if part not in self._done]

    def begin(self) -> None:
        """Write the manifest, so that the folder is that of a run."""
        if self.folder is None or self._begun:
            return
        make_folder(self.folder)
        self._begun = True
        self.update(files={})
        if self.exit_heads is not None:
            self.update(files=self._write_file(EXIT_HEADS, self.exit_heads))

    def finish(self) -> None:
        """Take what the ledgers say into the manifest, once for all parts; they are removed then."""
        if self.folder is None:
            self.manifest = self._with(self._entries)
            self._entries = []
        elif ledgers := ledgers_in(self.folder):
            self.manifest = read_manifest(self.folder)
            self.update()
            for path in ledgers:
                path.unlink()

    def _with(self, entries: Sequence[LedgerEntry]) -> Manifest:
        files = self.manifest.measured.files
        return replace(self.manifest, measured=replace(self.manifest.measured.with_entries(entries), files=files))

    def _find_whole_parts(self) -> None:
        """Which parts are as they were written. Files that are not are named, and taken off the manifest."""
        folder, listed, parts = self.folder, self.manifest.files, range(len(self.manifest.plan.batches))
        if folder is None:
            return
        if listed is None:
            warnings.warn(f"{folder} lists no checksums; its parts are made anew.", Remark, stacklevel=4)
        before = {part for part in parts if listed and is_done(folder, self.manifest, part, there=False)}
        wrong = {name: what_is_wrong(folder, self.manifest, name) for name in listed or ()}
        for name, what in wrong.items():
            if what:
                warnings.warn(f"{folder / name} {what}; it is made anew.", Remark, stacklevel=4)
        kept = {name: digest for name, digest in (listed or {}).items() if not wrong[name]}
        if kept != listed:
            self.update(files=kept)
        self._done = {part for part in parts if is_done(folder, self.manifest, part)}
        self.remade = before - self._done

    def update(self, **changes: Any) -> None:
        """Change fields of the manifest, on disk too once the run has begun."""
        self.manifest = self.manifest.but(**changes)
        if self.folder is not None and self._begun:
            text = json.dumps(self.manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
            atomic_text(self.folder / "manifest.json", text)

    def back_off(self, note: Mapping[str, Any]) -> None:
        """Note where memory ran out: {"batch", "phase", "size", "limit"}."""
        self.manifest = self.manifest.but(backoffs=(*self.manifest.measured.backoffs, note))
        if self.ledger is not None and self._begun:
            append_entry(self.ledger, LedgerEntry(backoff=note))

    def write(
        self,
        part: int,
        frames: Mapping[str, pd.DataFrame],
        *,
        residuals: bytes | None = None,
        seconds: Mapping[str, int | float] | None = None,
        savings: Mapping[str, int | float] | None = None,
        logged: Mapping[str, int | float] | None = None,
    ) -> None:
        """Write one part: a frame for each table of the run, and the residuals' shard where they are kept.

        seconds, savings, logged: what this part adds to the run's measurements (`Measured`), if it is written.
        """
        tables = tables_of(self.manifest)
        if set(frames) != set(tables) or (residuals is not None) != bool(self.manifest.settings.keep_residuals):
            raise ValueError(f"a part of this run has the tables {tables}, not {sorted(frames)}")
        whole = {name: conform(name, frames[name]) for name in tables}
        entry = LedgerEntry(seconds=seconds or {}, savings=savings, logged=logged)
        if self.ledger is None:
            self._memory[part] = whole
            self._entries.append(replace(entry, files={part_name("texts", part): ""}))
        else:
            self.begin()
            files: dict[str, str] = {}
            if residuals is not None:
                files |= self._write_file(part_name("residuals", part), residuals)
            for table in tables:
                sink = pa.BufferOutputStream()
                pq.write_table(pa.Table.from_pandas(whole[table], preserve_index=False), sink, compression="zstd")
                files |= self._write_file(part_name(table, part), sink.getvalue())
            append_entry(self.ledger, replace(entry, files=files))  # now, and not before, the part counts
        self._done.add(part)

    def _write_file(self, name: str, content: Any) -> dict[str, str]:
        """Write a file of the run; returns {its name: its checksum}."""
        if self.folder is None:
            raise ValueError("a run in memory has no files")
        atomic_bytes(self.folder / name, content)
        return {name: sha256(content).hexdigest()}

    @property
    def written(self) -> Mapping[str, pd.DataFrame]:
        """The tables of a run in memory, part after part."""
        parts = [self._memory[part] for part in range(len(self.manifest.plan.batches))]
        return {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]}


def _part_of_a_run(name: str) -> bool:
    return name == EXIT_HEADS or PART_NAME.fullmatch(name) is not None or is_ledger(name)


@contextmanager
def writing_run(
    folder: str | os.PathLike[str] | None,
    manifest: Manifest,
    *,
    resume: bool = False,
    exit_heads: bytes | None = None,
) -> Iterator[TraceWriter]:
    """A writer of this run, which alone writes to its folder. Raises InputError as TraceWriter, and while another
    process writes there."""
    if folder is None:
        writer = TraceWriter(None, manifest, exit_heads=exit_heads)
        yield writer
        writer.finish()
        return
    check_unlocked(folder)
    check_run_folder(folder, manifest, resume=resume)
    with locked(folder):
        writer = TraceWriter(folder, manifest, resume=resume, exit_heads=exit_heads)
        yield writer
        writer.finish()


def check_run_target(folder: str | os.PathLike[str], *, resume: bool) -> bool:
    """Whether a run is in a folder that one can be written to; what can be known without its settings. Writes nothing.

    Raises InputError for a path that is a file, may not be written, or holds something else.
    """
    folder = check_folder_target(folder)
    if not folder.exists():
        return False
    there = entries(folder)
    if there and not (folder / "manifest.json").is_file():
        if any(_part_of_a_run(path.name) for path in there):
            raise InputError(f"{folder} holds parts of a run, and no manifest.json.", "Delete it, or name another one.")
        raise InputError(f"{folder} holds other files and is not a run folder.", "Name a new or an empty folder.")
    if there and not resume:
        raise InputError(f"{folder} already holds a run.", "Go on with it (--resume), or name another folder.")
    return bool(there)


def check_run_folder(folder: str | os.PathLike[str], manifest: Manifest, *, resume: bool) -> Manifest | None:
    """The manifest of the run that is there to go on with, or None for a new run. Writes nothing.

    Raises InputError for a path that is a file, a folder of something else, a run without `resume`, or a run of other
    settings (named).
    """
    folder = Path(folder)
    if not check_run_target(folder, resume=resume):
        return None
    present = read_manifest(folder, f"Delete {folder} and trace again, or name another folder.")
    different = present.differences(manifest)
    if different:
        raise InputError(
            f"the run in {folder} was made with other settings (its own, then yours): {'; '.join(different)}.",
            "Give the same settings, or name another folder.",
        )
    return present
