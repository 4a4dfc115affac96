"""A run folder: its manifest, its files against their checksums, its tables against the schema and each other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from probekit.errors import InputError
from probekit.files import entries
from probekit.traces.manifest import Manifest, read_manifest
from probekit.traces.residuals import kept_rows, shard_shapes
from probekit.traces.schema import REQUIRED, checked, require_columns
from probekit.traces.storage import EXIT_HEADS, PART_NAME, files_of, is_done, part_name, tables_of, what_is_wrong
from probekit.verification.findings import Notes
from probekit.verification.weights import check_weights

_IDS = {"tokens": ("input_id", "text_id"), "layers": ("argmax", "argmax_rounded"), "top": ("token",),
        "drafter": ("argmax", "argmax_rounded")}  # fmt: skip


def verify_run(folder: Path, notes: Notes) -> None:
    """Everything that is not as the run was written goes to `notes`."""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        notes.add(folder / "manifest.json", error.problem)
        return
    _verify_files(folder, manifest, notes)
    for role, record in (("model", manifest.model), ("draft model", manifest.drafter)):
        if record is not None:
            found = check_weights(record, role)
            notes.weights.append(found)
            if found.state == "other":
                notes.add(folder / "manifest.json", f"was made with other weights of {record.reference}: {found.why}")


def _verify_files(folder: Path, manifest: Manifest, notes: Notes) -> None:
    if manifest.files is None:
        notes.add(folder / "manifest.json", "lists no checksums: an earlier version wrote it")
    listed = manifest.files or {}
    wrong = {name: problem for name in listed if (problem := what_is_wrong(folder, manifest, name, cached=False))}
    notes.files += len(listed)
    for name, problem in wrong.items():
        notes.add(folder / name, problem)
    planned = {name for part in range(len(manifest.plan.batches)) for name in files_of(manifest, part)}
    if manifest.settings.exit_heads is not None:
        planned.add(EXIT_HEADS)
        if manifest.files is not None and EXIT_HEADS not in listed:
            notes.add(folder / EXIT_HEADS, "is not listed in the manifest")
    for path in entries(folder):
        if PART_NAME.fullmatch(path.name) and path.name not in {*listed, *planned}:
            notes.add(path, "is no file of this run: the manifest does not know it")
    for name in listed:
        if name not in planned:
            notes.add(folder / name, "is listed in the manifest, and no part of its plan")
    pending = [part for part in range(len(manifest.plan.batches)) if not is_done(folder, manifest, part, there=False)]
    if pending:
        parts = len(manifest.plan.batches)
        notes.add(folder, f"is not finished: {len(pending)} of {parts} parts are missing; `trace --resume` makes them")
    for part, batch in enumerate(manifest.plan.batches):
        if part not in pending and not any(name in wrong for name in files_of(manifest, part)):
            _verify_part(folder, manifest, part, batch, notes)


def _verify_part(folder: Path, manifest: Manifest, part: int, batch: tuple[int, ...], notes: Notes) -> None:
    """The tables of one part: columns, types, ids within the vocabulary, and the rows that its texts must have."""
    tables: dict[str, pd.DataFrame] = {}
    for table in tables_of(manifest):
        path = folder / part_name(table, part)
        try:
            require_columns(table, pq.read_schema(path).names, REQUIRED[table])
            tables[table] = checked(table, pq.read_table(path), str(path)).to_pandas()
        except InputError as error:
            notes.add(path, error.problem)
            return
        except (OSError, pa.ArrowException, ValueError) as error:
            notes.add(path, f"cannot be read: {error}")
            return
    texts, tokens = tables["texts"], tables["tokens"]
    where = {table: folder / part_name(table, part) for table in tables}
    if sorted(texts["prompt"]) != sorted(batch):
        notes.add(where["texts"], f"holds other prompts than the plan of part {part} names")
        return
    lengths = (texts["prompt_tokens"].astype("int64") + texts["new_tokens"] - 1).to_numpy()
    rows = pd.MultiIndex.from_frame(tokens[["prompt", "position"]])
    whole = (lengths >= 0).all() and lengths.sum() == len(rows)  # before anything is made of these numbers
    if whole:
        places = np.concatenate([np.arange(length) for length in lengths])
        prompts = np.repeat(texts["prompt"].to_numpy(), lengths)
        whole = not rows.has_duplicates and rows.isin(pd.MultiIndex.from_arrays([prompts, places])).all()
    if not whole:
        notes.add(where["tokens"], "does not hold each position of each text once")
        return
    generated = int((tokens["output"] >= 0).sum())
    if generated != int(texts["new_tokens"].sum()):
        notes.add(where["tokens"], "holds another number of new tokens than the texts have")
    layers, lenses = manifest.depth + 1, len(manifest.settings.lenses)
    expected = {"layers": len(rows) * layers * lenses, "drafter": len(rows), "draft_head": generated * layers}
    for table, frame in tables.items():
        if table in expected and len(frame) != expected[table]:
            notes.add(where[table], f"has {len(frame):,} rows, where its texts have {expected[table]:,}")
        if "layer" in frame and len(frame) and not frame["layer"].between(0, manifest.depth).all():
            notes.add(where[table], f"holds layers that the model has not: it has {manifest.depth}")
        for column in _IDS.get(table, ()):
            if column in frame and len(frame) and not frame[column].between(0, manifest.model.vocabulary - 1).all():
                notes.add(where[table], f"holds token ids (`{column}`) that the model has not")
        if not set(frame["prompt"]) <= set(batch):
            notes.add(where[table], f"holds prompts that are not of part {part}")
    if manifest.settings.keep_residuals:
        keys = {name: tokens[name].to_numpy() for name in ("prompt", "position", "output")}
        settings = manifest.settings
        kept = kept_rows(keys, settings.residual_rows, settings.residual_share, settings.seed)
        _verify_shard(folder / part_name("residuals", part), manifest, int(kept.sum()), notes)


def _verify_shard(path: Path, manifest: Manifest, rows: int, notes: Notes) -> None:
    try:
        shapes = shard_shapes(path)
    except InputError as error:
        notes.add(path, error.problem)
        return
    expected: dict[str, tuple[int, ...]] = {"prompt": (rows,), "position": (rows,)}
    expected |= {f"layer_{layer}": (rows, manifest.model.width) for layer in manifest.settings.keep_residuals}
    if shapes != expected:
        wrong = next(name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name))
        notes.add(path, f"does not hold the residuals of its texts: {wrong} is {shapes.get(wrong)}, "
                        f"not {expected.get(wrong)}")  # fmt: skip


def is_run(folder: Path) -> bool:
    """Whether a folder looks like that of a run, also a damaged one."""
    return (folder / "manifest.json").exists() or any(re.fullmatch(PART_NAME, path.name) for path in entries(folder))
