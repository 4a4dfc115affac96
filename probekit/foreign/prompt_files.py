"""Records of prompts from files and folders of others: .txt, .jsonl, .json, .csv, .parquet, .arrow, local datasets."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from probekit.errors import InputError
from probekit.foreign.json import loads
from probekit.foreign.prompt_records import FIELDS, PROMPTS
from probekit.foreign.text import MOST_BYTES, MOST_CHARACTERS, read_bytes

_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+\.\w+")
Records = Iterator[tuple[str, Any]]


def _text_of(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path} is not UTF-8 (line {line}, byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _lines_of(path: Path) -> list[str]:
    """Lines, without the empty ones that may close a file."""
    text = _text_of(path).rstrip("\n")
    return text.split("\n") if text else []


def _read_txt(path: Path) -> Records:
    for number, line in enumerate(_lines_of(path), start=1):
        yield f"line {number}", {"prompt": line}


def _read_jsonl(path: Path) -> Records:
    for number, line in enumerate(_lines_of(path), start=1):
        try:
            record = loads(line)
        except ValueError as error:
            what = "is empty" if not line.strip() else f"is not JSON: {str(error).rstrip('.')}"
            raise InputError(f"{path}, line {number} {what}.", 'Each line is an object: {"prompt": ".."}') from None
        yield f"line {number}", record


def _read_json(path: Path) -> Records:
    """An array of objects, or of texts."""
    try:
        records = loads(_text_of(path))
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON: {str(error).rstrip('.')}.", "A file of one object a line ends in .jsonl."
        ) from None
    if not isinstance(records, list):
        raise InputError(f"{path} is no array of prompts.", 'Write [{"prompt": ".."}, ..].')
    for number, record in enumerate(records, start=1):
        yield f"entry {number}", {"prompt": record} if isinstance(record, str) else record


def _read_csv(path: Path) -> Records:
    lines = _text_of(path).split("\n")
    csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARACTERS))
    reader = csv.DictReader((line + "\n" for line in lines), strict=True)
    try:
        _require_prompt_column(path, reader.fieldnames or (), empty=not any(lines))
        for record in reader:
            yield (
                f"line {reader.line_num}",
                {name: record[name] or None for name in FIELDS[2:] if name in record}
                | {"prompt": record["prompt"] or ""},
            )
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}.") from None


def _read_parquet(path: Path) -> Records:
    try:
        held = pq.read_metadata(pa.BufferReader(content := read_bytes(path)))
        size = sum(held.row_group(group).total_byte_size for group in range(held.num_row_groups))
        if size > MOST_BYTES:
            raise InputError(f"{path} cannot be read: it unfolds to {size:,} bytes; at most {MOST_BYTES:,} are read.")
        table = pq.read_table(pa.BufferReader(content))
        _require_prompt_column(path, table.column_names, empty=False)  # names that are no UTF-8 are a ValueError
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None
    yield from _rows(path, table)


def _read_arrow(path: Path) -> Records:
    try:
        table = pa.ipc.open_stream(pa.BufferReader(read_bytes(path))).read_all()
        _require_prompt_column(path, table.column_names, empty=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} is not an Arrow file: {error}") from None
    yield from _rows(path, table)


def _rows(path: Path, table: pa.Table) -> Records:
    wanted = table.select([name for name in FIELDS if name in table.column_names])
    yield from _batches(path, wanted.to_batches(max_chunksize=1024))


def _require_prompt_column(path: Path, columns: Sequence[str], *, empty: bool) -> None:
    if not set(PROMPTS) & set(columns) and not empty:
        raise InputError(f"{path} has no `prompt` column; it has {', '.join(columns) or 'none'}.", "Rename one.")


def _stream_parquet(path: Path) -> Records:
    """Row group by row group: each has the size that `_read_parquet` allows a file."""
    try:
        with pq.ParquetFile(path) as file:
            _require_prompt_column(path, file.schema_arrow.names, empty=False)
            for group in range(file.metadata.num_row_groups):
                if (size := file.metadata.row_group(group).total_byte_size) > MOST_BYTES:
                    held = f"its row group {group} unfolds to {size:,} bytes; at most {MOST_BYTES:,} are read"
                    raise InputError(f"{path} cannot be read: {held}.", "Write it in smaller row groups.")
            wanted = [name for name in FIELDS if name in file.schema_arrow.names]
            yield from _batches(path, file.iter_batches(batch_size=1024, columns=wanted))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None


def _stream_arrow(path: Path) -> Records:
    try:
        with pa.OSFile(str(path)) as held, pa.ipc.open_stream(held) as stream:
            _require_prompt_column(path, stream.schema.names, empty=False)
            wanted = [name for name in FIELDS if name in stream.schema.names]
            yield from _batches(path, (batch.select(wanted) for batch in stream))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} is not an Arrow file: {error}") from None


def _batches(path: Path, batches: Iterable[pa.RecordBatch]) -> Records:
    number = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # offsets that point elsewhere, bytes that are no UTF-8
            for start in range(0, len(batch), 1024):
                for record in batch.slice(start, 1024).to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read behind row {number}: {error}") from None


def read_dataset_folder(folder: Path, readers: Mapping[str, Callable[[Path], Records]] | None = None) -> Records:
    """A local dataset: data files of one kind in the folder or its `data`, or what `save_to_disk` wrote.

    Texts and JSON documents that lie beside them are about the data.
    """
    readers = {suffix: read for suffix, read in (readers or READERS).items() if suffix not in (".txt", ".json")}
    places = [folder, folder / "data"]
    found = next(
        (found for place in places if (found := sorted(p for p in place.glob("*") if p.suffix in readers))), []
    )
    suffixes = sorted({path.suffix for path in found})
    splits = sorted({match["split"] for path in found if (match := _SHARD.fullmatch(path.name))})
    if not found:
        below = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(f.suffix in readers for f in p.glob("*")))
        raise InputError(
            f"the folder {folder} holds no {', '.join(readers)} file.",
            f"Name one of its folders: {', '.join(below)}." if below else "Name a local dataset, or a prompts file.",
        )
    if len(suffixes) > 1 or len(splits) > 1:
        raise InputError(
            f"the folder {folder} holds several sets: {', '.join(suffixes if len(suffixes) > 1 else splits)}.",
            "Name the file that is meant.",
        )
    for path in found:
        for where, record in readers[path.suffix](path):
            yield f"{path.name}, {where}", record


READERS: dict[str, Callable[[Path], Records]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
STREAMS: dict[str, Callable[[Path], Records]] = {".parquet": _stream_parquet, ".arrow": _stream_arrow}
"""The same without holding a file whole."""
