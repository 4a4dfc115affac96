"""The models of a run, loaded from the references in its manifest."""

from __future__ import annotations

from probekit.errors import InputError
from probekit.models.loaded import Loaded, batch_invariant, load
from probekit.traces.manifest import ModelRecord, RunSettings
from probekit.traces.trace import Trace


def models_of(trace: Trace, device: str | None = None, dtype: str | None = None) -> tuple[Loaded, Loaded | None]:
    """The model of a run and its draft model, by default on the run's device and in its dtype.

    Raises InputError for a model that was in memory, and where a reference holds other weights by now.
    """
    manifest = trace.manifest
    loaded = model_of(manifest.model, manifest.settings, device, dtype)
    return loaded, None if manifest.drafter is None else model_of(manifest.drafter, manifest.settings, device, dtype)


def model_of(record: ModelRecord, settings: RunSettings, device: str | None = None, dtype: str | None = None) -> Loaded:
    """One model of a run, its adapter with it. Raises InputError where it is another one by now."""
    if record.in_memory:
        raise InputError(
            f"the run is of {record.name}, a model that was in memory: a command cannot load it.",
            "Go on in Python: probekit.wrap it again, and call probekit.validate or measure_costs with it.",
        )
    adapter = None if record.adapter is None else record.adapter.reference
    loaded = load(
        record.reference,
        adapter=adapter,
        device=device or settings.device,
        dtype=dtype or settings.dtype,
    )
    known = record.weights_hash
    if known is not None and known != loaded.weights_hash:
        same = known.split("+")[0] == str(loaded.weights_hash).split("+")[0]
        what = f"the adapter {adapter}" if adapter is not None and same else f"the model {record.reference}"
        raise InputError(f"{what} holds other weights than when this run was traced.", "Trace again.")
    return batch_invariant(loaded) if settings.batch_invariant else loaded
