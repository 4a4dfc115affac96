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
