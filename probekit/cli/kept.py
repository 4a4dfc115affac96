"""Where a command keeps what it has decoded, and the costs that decide what it decodes, until it has it all."""

from __future__ import annotations

import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

from probekit.errors import ProbekitError


def kept_costs(kept, timed):
    """Costs that were measured before this command was ended; else measured, and kept where they can be."""
    from probekit.costs.profile import Costs

    timed = cache(timed)
    try:
        return Costs.from_json(kept.once("costs", lambda: timed().to_json()))
    except ProbekitError:  # the run's folder cannot be written, or the times not be taken
        return timed()


def kept_in(run: Path, *words: object) -> Path:
    """Where a validation keeps what it has decoded until it has all: in the run, a folder a command."""
    from probekit.settings import digest

    return Path(run) / "validation" / digest([str(word) for word in words])


def no_longer_kept(place: Path) -> None:
    """All is decoded: what was kept goes, so that the run is as it was."""
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        place.parent.rmdir()  # which removes empty folders only
