"""The ways to read residuals, by name."""

from __future__ import annotations

from collections.abc import Callable

from probekit.errors import InputError
from probekit.models.loaded import Loaded
from probekit.tracing.backend import Backend, HooksBackend
from probekit.tracing.nnsight_backend import NnsightBackend

BACKENDS: dict[str, Callable[[Loaded], Backend]] = {"hooks": HooksBackend, "nnsight": NnsightBackend}


def open_backend(name: str, loaded: Loaded) -> Backend:
    """The backend of that name, not entered yet. Raises InputError with the names that there are."""
    return BACKENDS[check_backend(name)](loaded)


def check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}.")
    return name
