"""One run that several processes write: who writes what, and who writes it down."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from probekit.errors import InputError
from probekit.files import locked
from probekit.ranks import Ranks
from probekit.traces.manifest import Manifest
from probekit.traces.storage import TraceWriter, writing_run


class _Told(NamedTuple):
    """What the first process tells the others: the run as it stands."""

    manifest: Manifest
    pending: list[int]
    remade: set[int]


class RankWriter(TraceWriter):
    """One of the processes of a run but the first: it writes its parts and a ledger of them; the manifest is not its
    own."""

    def __init__(
        self, folder: Path, manifest: Manifest, ranks: Ranks, parts: Sequence[int], remade: Iterable[int]
    ) -> None:
        self._set(folder, manifest, rank=ranks.rank)
        self._silent = ranks.in_step
        self.mine = tuple(parts)
        self.remade = set(remade)

    def update(self, **changes: Any) -> None:
        self.manifest = self.manifest.but(**changes)

    def begin(self) -> None:
        """The first process has."""
        self._begun = not self._silent

    def write(self, part: int, frames: Mapping[str, pd.DataFrame], **given: Any) -> None:
        """As any writer; where the processes go in step, the first one writes for all."""
        if not self._silent:
            super().write(part, frames, **given)


@contextmanager
def writing_together(
    folder: str | os.PathLike[str] | None,
    manifest: Manifest,
    ranks: Ranks,
    *,
    resume: bool = False,
    exit_heads: bytes | None = None,
) -> Iterator[TraceWriter]:
    """A writer for each process, of its share of the parts. The first one's plan is everybody's.

    ranks: as `probekit.ranks.joined` gives them. Raises InputError as `writing_run`, where the processes were not
    given the same things, and without a folder.
    """
    if ranks.size == 1:
        with writing_run(folder, manifest, resume=resume, exit_heads=exit_heads) as writer:
            yield writer
        return
    if folder is None:
        raise InputError("a run of several processes is written to files.", "Name a folder for this run.")
    folder = Path(folder)
    with ExitStack() as stack:
        own: TraceWriter | None = None

        def open_run() -> None:
            nonlocal own
            if ranks.first:
                own = stack.enter_context(writing_run(folder, manifest, resume=resume, exit_heads=exit_heads))

        ranks.agreed(open_run)
        told = ranks.from_first(None if own is None else _Told(own.manifest, own.pending, own.remade))
        if told is None:
            raise RuntimeError("the first process told of no run")
        ranks.agreed(lambda: _check_alike(told.manifest, manifest, ranks))
        mine = ranks.share(told.pending)
        if own is None:
            stack.enter_context(locked(folder, ranks.rank))
            own = RankWriter(folder, told.manifest, ranks, mine, told.remade)
        own.mine = mine
        yield own
        ranks.all("written")
        if ranks.first:
            own.finish()
        ranks.all("taken in")


def _check_alike(first: Manifest, mine: Manifest, ranks: Ranks) -> None:
    if different := first.differences(mine):
        raise InputError(
            f"process {ranks.rank} of {ranks.size} was given other things than the first (its own last): "
            f"{'; '.join(different)}.",
            "Give every process the same files and the same command.",
        )
