"""The models of a run, loaded from the references in its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.models.checkpoint import Source


def models_of(trace, device, dtype):
    """The model of a run and its draft model, loaded from the references in its manifest."""
    manifest = trace.manifest
    loaded = model_of(manifest.model, manifest.settings, device, dtype)
    return loaded, None if manifest.drafter is None else model_of(manifest.drafter, manifest.settings, device, dtype)


def model_of(record, settings, device, dtype):
    """One model of a run, its adapter with it. Raises InputError where it is another one by now."""
    from probekit.models.loaded import batch_invariant, load

    if record.reference.startswith("memory:"):
        raise InputError(
            f"the run is of {record.name}, a model that was in memory: a command cannot load it.",
            "Go on in Python: probekit.wrap it again, and call probekit.validate or measure_costs with it.",
        )
    added = record.adapter
    loaded = load(
        record.reference,
        adapter=None if added is None else added.reference,
        device=device or settings.device,
        dtype=dtype or settings.dtype,
    )
    if record.weights_hash not in (None, loaded.weights_hash):
        what = f"the adapter {added.reference}" if _only_adapter(record, loaded) else f"the model {record.reference}"
        raise InputError(f"{what} holds other weights than when this run was traced.", "Trace again.")
    return batch_invariant(loaded) if settings.batch_invariant else loaded


def _only_adapter(record, loaded):
    """Whether the model is the same, and its adapter another."""
    return record.adapter is not None and record.weights_hash.split("+")[0] == loaded.weights_hash.split("+")[0]


def pretrained_of(trace):
    """Where the models of a run are found, as arguments of `from_pretrained` and as a command line names them."""
    from probekit.engines.engine import Pretrained

    manifest = trace.manifest
    path, revision = _place(manifest.model.reference)
    found = {
        "model": _arguments(manifest.model.reference),
        "adapter": _adapter(manifest.model),
        "path": path,
        "revision": revision,
    }
    if manifest.drafter is not None:
        found |= {
            "drafter": _arguments(manifest.drafter.reference),
            "drafter_adapter": _adapter(manifest.drafter),
            "drafter_path": _place(manifest.drafter.reference)[0],
        }
    return Pretrained(**found)


def _adapter(record):
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


def _place(reference: str) -> tuple[str, str | None]:
    """(hub id, folder or GGUF file; the hub's commit or None)."""
    source = _found(reference)
    hub, _, revision = reference.partition("@")
    if source is None:
        return ("MODEL" if reference.startswith("memory:") else hub), revision or None
    return (hub, source.revision) if source.revision is not None else (str(source.path), None)


def _found(reference: str) -> Source | None:
    from probekit.models.reference import find_checkpoint

    try:
        return find_checkpoint(reference)
    except InputError:
        return None
