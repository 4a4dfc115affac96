"""Where the models of a run are found: as arguments of transformers, and as a command line names them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from probekit.engines.engine import Pretrained
from probekit.errors import InputError
from probekit.traces.manifest import ModelRecord
from probekit.traces.trace import Trace

if TYPE_CHECKING:
    from probekit.models.checkpoint import Source


def pretrained_of(trace: Trace) -> Pretrained:
    """The model of a run and its draft model, by the references in its manifest."""
    manifest = trace.manifest
    path, revision = _place(manifest.model)
    model = Pretrained(
        model=_arguments(manifest.model.reference), adapter=_adapter(manifest.model), path=path, revision=revision
    )
    if manifest.drafter is None:
        return model
    return replace(
        model,
        drafter=_arguments(manifest.drafter.reference),
        drafter_adapter=_adapter(manifest.drafter),
        drafter_path=_place(manifest.drafter)[0],
    )


def _adapter(record: ModelRecord) -> str | None:
    return None if record.adapter is None else repr(record.adapter.reference)


def _arguments(reference: str) -> str:
    """Of `from_pretrained`, as Python source."""
    source = _found(reference)
    hub, at, revision = reference.partition("@")
    if source is None:  # a model that was in memory, or that has been moved: what the run says
        return repr(hub) + (f", revision={revision!r}" if at else "")
    if source.revision is not None:
        return f"{hub!r}, revision={source.revision!r}"
    return repr(str(source.folder)) + (f", gguf_file={source.gguf!r}" if source.gguf else "")


def _place(record: ModelRecord) -> tuple[str, str | None]:
    """(hub id, folder or GGUF file; the hub's commit or None)."""
    source = _found(record.reference)
    hub, _, revision = record.reference.partition("@")
    if source is None:
        return ("MODEL" if record.in_memory else hub), revision or None
    return (hub, source.revision) if source.revision is not None else (str(source.path), None)


def _found(reference: str) -> Source | None:
    from probekit.models.reference import find_checkpoint  # with torch, which readers of a trace need not have

    try:
        return find_checkpoint(reference)
    except InputError:
        return None
