"""The models of a run, loaded from the references in its manifest."""

from __future__ import annotations


def models_of(trace, device, dtype):
    """The model of a run and its draft model, loaded from the references in its manifest."""
    from probekit.models.loaded import load

    manifest = trace.manifest
    device = device or manifest.settings.device
    loaded = load(manifest.model.reference, device=device, dtype=dtype or manifest.settings.dtype)
    if manifest.drafter is None:
        return loaded, None
    return loaded, load(manifest.drafter.reference, device=device, dtype=dtype or manifest.settings.dtype)


def pretrained_of(trace):
    """Where transformers finds the models of a run, as arguments of `from_pretrained`."""
    from probekit.choice.export import Pretrained

    manifest = trace.manifest
    drafter = None if manifest.drafter is None else manifest.drafter.reference
    return Pretrained(*(_arguments(each) for each in (manifest.model.reference, drafter) if each is not None))


def _arguments(reference: str) -> str:
    from probekit.errors import InputError
    from probekit.models.reference import find_checkpoint

    hub, at, revision = reference.partition("@")
    try:
        source = find_checkpoint(reference)
    except InputError:  # a model that was in memory, or that has been moved: what the run says
        return repr(hub) + (f", revision={revision!r}" if at else "")
    if source.revision is not None:
        return f"{hub!r}, revision={source.revision!r}"
    return repr(str(source.folder)) + (f", gguf_file={source.gguf!r}" if source.gguf else "")
