"""The weights that a run was traced with, held against the hash in its manifest where they can be reached."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from probekit.errors import InputError
from probekit.models.weight_files import BUNDLED, adapter_files, hash_files, weight_files
from probekit.traces.manifest import ModelRecord
from probekit.verification.findings import WeightsChecked


class _UnreachableError(Exception):
    """Weights that are not on this machine; its text says why."""


def check_weights(record: ModelRecord, role: str) -> WeightsChecked:
    """Hash the weights that a record names, and its adapter's; no tensor is read, and nothing is fetched."""
    try:
        state, why = _compared(record)
    except _UnreachableError as error:
        state, why = "not reachable", str(error)
    except (InputError, OSError) as error:
        state, why = "not reachable", str(error).rstrip(".")
    return WeightsChecked(record.name, role, record.reference, state, why)  # type: ignore[arg-type]


def _compared(record: ModelRecord) -> tuple[str, str]:
    if record.weights_hash is None:
        raise _UnreachableError("its manifest has no hash of them")
    if record.in_memory:
        raise _UnreachableError("they were in memory")
    files = _files(record)
    if missing := [path.name for path in files if not path.is_file()]:
        return "other", f"{missing[0]} is missing"
    found = [hash_files(files)]
    if record.adapter is not None:
        added = adapter_files(Path(record.adapter.reference))
        if not all(path.is_file() for path in added):
            raise _UnreachableError(f"its adapter {record.adapter.reference} is not there")
        found.append(hash_files(added))
    return ("same", "") if "+".join(found) == record.weights_hash else ("other", "their hash is another")


def _files(record: ModelRecord) -> list[Path]:
    """As `probekit.load` finds them: a bundled name, a folder, a GGUF file, an id in Hugging Face's cache."""
    reference = record.reference
    if os.sep not in reference and (BUNDLED / reference / "config.json").is_file():
        return weight_files(BUNDLED / reference)
    path = Path(os.path.expanduser(reference))
    if os.path.isdir(path):
        return weight_files(path)
    if os.path.isfile(path):
        return [path]
    if path.is_absolute():
        raise _UnreachableError(f"{path} is not there")
    try:
        repository = reference.partition("@")[0]
        return weight_files(Path(snapshot_download(repository, revision=record.revision, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError):
        raise _UnreachableError("they are no folder or file here, and not in Hugging Face's cache") from None
