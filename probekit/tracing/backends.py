"""The ways to read residuals, by name."""

from __future__ import annotations

from collections.abc import Callable

from probekit.errors import InputError
from probekit.models.loaded import Loaded
from probekit.tracing.backend import Backend, HooksBackend
from probekit.tracing.block_backend import BlockBackend
from probekit.tracing.nnsight_backend import NnsightBackend
from probekit.tracing.remote_service import Service

BACKENDS: dict[str, Callable[..., Backend]] = {"hooks": HooksBackend, "nnsight": NnsightBackend}


def open_backend(name: str, loaded: Loaded) -> Backend:
    """The backend of that name, not entered yet: hooks, nnsight, or nnsight:WHERE, where a service runs the model.

    A batch-invariant model is read by its own engine. Raises InputError with the names that there are.
    """
    kind, _, where = check_backend(name).partition(":")
    if loaded.anatomy.batch_invariant:
        return BlockBackend(loaded)
    return BACKENDS[kind](loaded, where) if where else BACKENDS[kind](loaded)


def check_backend(name: str) -> str:
    kind, colon, where = name.partition(":")
    if kind not in BACKENDS or (colon and kind != "nnsight"):
        raise InputError(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}.")
    if colon:
        Service.of(where)
    return name
