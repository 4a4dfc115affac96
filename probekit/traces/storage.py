"""The folder of a run: parts that are written whole or not at all, and are read again.

A run folder holds `manifest.json` and one set of Parquet parts for each batch of its plan. Each file is written
under another name and then renamed, `layers` last: a part counts when all of its files are there, so a run that
was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from probekit.errors import InputError
from probekit.traces.manifest import Manifest, read_manifest
from probekit.traces.schema import LENSES, REQUIRED, checked, conform, require_columns

EXIT_HEADS = "exit_heads.safetensors"  # beside the manifest, where the run was read through some
_UNFINISHED = ".unfinished"


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
    """Tables in the Parquet parts of a run folder; a whole table, once read, is kept."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._whole: dict[str, pd.DataFrame] = {}

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
        for part in range(len(self._manifest.plan.batches)):
            path = self._folder / part_name(table, part)
            try:
                require_columns(table, pq.read_schema(path).names, columns or REQUIRED[table])
                read = pq.read_table(path, columns=None if columns is None else list(columns))
                parts.append(checked(table, read, str(path)))
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(
                    f"{path} cannot be read: {error}", "Delete it, and trace again with --resume."
                ) from None
        # Text of which a part has none is written without a type by pandas 2.
        frame = pa.concat_tables(parts, promote_options="default").unify_dictionaries().to_pandas()
        if "lens" in frame.columns:
            frame["lens"] = frame["lens"].cat.set_categories(LENSES)
        return frame


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


def is_done(folder: Path, manifest: Manifest, part: int) -> bool:
    tables = tables_of(manifest) + (["residuals"] if manifest.settings.keep_residuals else [])
    return all((folder / part_name(table, part)).is_file() for table in tables)


class TraceWriter:
    """Writes the parts of one run, each whole or not at all; without a folder, keeps them in memory.

    `resume` goes on with the run in the folder, by the batch plan of its manifest; a run of other settings is
    refused, and they are named. Without `resume`, the folder must be absent or empty. Nothing is written before the
    first part.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        manifest: Manifest,
        *,
        resume: bool = False,
        exit_heads: bytes | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.exit_heads = exit_heads
        self.manifest = manifest
        self._memory: dict[int, dict[str, pd.DataFrame]] = {}
        self._begun = False
        if self.folder is None:
            if manifest.settings.keep_residuals:
                raise InputError("kept residuals are written to files: name a folder for this run.")
            return
        present = check_run_folder(self.folder, manifest, resume=resume)
        if present is not None:
            self.manifest, self._begun = present, True

    @property
    def pending(self) -> list[int]:
        """Parts of the plan that are not written yet."""
        parts = range(len(self.manifest.plan.batches))
        if self.folder is None:
            return [part for part in parts if part not in self._memory]
        return [part for part in parts if not is_done(self.folder, self.manifest, part)]

    def update(self, **changes: Any) -> None:
        """Change fields of the manifest, on disk too once the run has begun."""
        self.manifest = self.manifest.but(**changes)
        if self.folder is not None and self._begun:
            text = json.dumps(self.manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
            atomic_text(self.folder / "manifest.json", text)

    def write(self, part: int, frames: Mapping[str, pd.DataFrame], *, residuals: bytes | None = None) -> None:
        """Write one part: a frame for each table of the run, and the residuals' shard where they are kept."""
        tables = tables_of(self.manifest)
        if set(frames) != set(tables) or (residuals is not None) != bool(self.manifest.settings.keep_residuals):
            raise ValueError(f"a part of this run has the tables {tables}, not {sorted(frames)}")
        whole = {name: conform(name, frames[name]) for name in tables}
        if self.folder is None:
            self._memory[part] = whole
            return
        if not self._begun:
            self._begun = True
            self.folder.mkdir(parents=True, exist_ok=True)
            self.update()
        if self.exit_heads is not None and not (self.folder / EXIT_HEADS).is_file():
            atomic_bytes(self.folder / EXIT_HEADS, self.exit_heads)
        if residuals is not None:
            atomic_bytes(self.folder / part_name("residuals", part), residuals)
        for name in tables:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pandas(whole[name], preserve_index=False), sink, compression="zstd")
            atomic_bytes(self.folder / part_name(name, part), sink.getvalue())

    @property
    def written(self) -> Mapping[str, pd.DataFrame]:
        """The tables of a run in memory, part after part."""
        parts = [self._memory[part] for part in range(len(self.manifest.plan.batches))]
        return {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]}


def check_run_folder(folder: str | os.PathLike[str], manifest: Manifest, *, resume: bool) -> Manifest | None:
    """The manifest of the run that is there to go on with, or None for a new run. Writes nothing.

    Raises InputError for a path that is a file, a folder of something else, a run without `resume`, or a run of other
    settings (named).
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; a run is written to a folder.", "Name another one.")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / "manifest.json").is_file():
        leftovers = [path for path in folder.iterdir() if not path.name.endswith(_UNFINISHED)]
        if leftovers:
            raise InputError(f"{folder} holds other files and is not a run folder.", "Name a new or an empty folder.")
        return None
    present = read_manifest(folder)
    if not resume:
        raise InputError(f"{folder} already holds a run.", "Go on with it (--resume), or name another folder.")
    different = present.differences(manifest)
    if different:
        raise InputError(
            f"the run in {folder} was made with other settings (its own, then yours): {'; '.join(different)}.",
            "Give the same settings, or name another folder.",
        )
    return present


def atomic_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    atomic_bytes(path, text.encode())


def atomic_bytes(path: Path, content: Any) -> None:
    """Write under another name, then rename: a file of this name is always whole."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
