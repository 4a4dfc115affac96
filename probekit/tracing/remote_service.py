"""A model that runs elsewhere, behind a service that may fail: where it is, and how often it is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from probekit.errors import InputError, ResourceError
from probekit.models.loaded import Loaded

T = TypeVar("T")
WAITS = (2.0, 8.0, 30.0, 60.0)  # seconds between the tries
TRIES = len(WAITS) + 1
OURS = range(400, 500)  # HTTP statuses that say that the request itself is wrong
BUSY = (408, 425, 429)  # but for these, which pass
_SERVICES = "local (its simulation here), ndif, or the address of a service"


class Service(NamedTuple):
    """Where nnsight sends a pass. remote: as its `trace` takes it: "local", True for NDIF, or an address."""

    remote: Any

    @classmethod
    def of(cls, where: str) -> Service:
        """As `--backend nnsight:WHERE` has it. Raises InputError."""
        if where == "local":
            return cls("local")
        if where == "ndif":
            return cls(True)
        if where.startswith(("http://", "https://")):
            return cls(where)
        raise InputError(f"nnsight cannot read a model at {where!r}.", f"Name one of these: {_SERVICES}.")

    def identity(self, loaded: Loaded) -> tuple[str, str | None]:
        """(the id of a model on the hub, its revision), by which a service knows it. Raises InputError."""
        if loaded.revision is None or loaded.adapter is not None:
            raise InputError(
                f"a service knows models by their ids on Hugging Face, and {loaded.name} is not one of those.",
                "Name the model as owner/name, without an adapter; or simulate a service: --backend nnsight:local.",
            )
        name, _, revision = loaded.reference.partition("@")
        return name, revision or loaded.revision


def asked_again(ask: Callable[[], T], name: str) -> T:
    """What `ask` gives, asked up to TRIES times, with a growing wait, while the service fails.

    Raises InputError for what the service refuses, and ResourceError when it has failed every time.
    """
    for wait in (*WAITS, None):
        try:
            return ask()
        except Exception as error:
            if not _is_of_service(error):
                raise
            said, status = _line(error), _status(error)
        if status in OURS and status not in BUSY:
            raise InputError(f"the service does not run {name}: {said}", "nnsight.status() says what it runs.")
        if wait is not None:
            time.sleep(wait)
    raise ResourceError(
        f"the service that runs {name} failed {TRIES} times, the last time with: {said}",
        "What was written is kept: go on with --resume.",
    )


def _is_of_service(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is the service's: nnsight's RemoteError, or of the libraries of the way."""
    while error is not None:
        library = type(error).__module__.split(".")[0]
        if type(error).__name__ == "RemoteError" or isinstance(error, (ConnectionError, TimeoutError)):
            return True
        if library in ("httpx", "httpcore", "websocket"):
            return True
        error = error.__cause__
    return False


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error stands for; None where there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _line(error: BaseException) -> str:
    """Its last line that says something: a service sends a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
