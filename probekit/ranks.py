"""Several processes at one job, as torchrun, srun or mpirun starts them: who this one is, and what all must hear.

What they tell one another is little (a plan, a noise level, results), and goes over gloo, beside whatever a model's own
parallelism uses. torch is imported where there is more than one process, and only there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from probekit.errors import InputError, ProbekitError, ResourceError

T = TypeVar("T")
U = TypeVar("U")
MEETING = timedelta(minutes=30)  # in which all processes of a job must have started
PATIENCE = timedelta(days=7)  # a process may read for long before the others hear of it
# (rank, number of processes, rank on this machine), as launchers name them.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # of a step: a batch script itself is one process
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


class ElsewhereError(ProbekitError):
    """Another process of the job failed, and says why: there is nothing to add to it here."""

    def __init__(self, rank: int, problem: str, exit_status: int) -> None:
        super().__init__(f"process {rank} of this job failed: {problem}")
        self.exit_status = exit_status


@dataclass(frozen=True)
class Ranks:
    """This process among those of a job. rank: 0..size-1; local: the rank on this machine.

    group: what they talk through; None before `joined`, and for one process. in_step: whether they share a model
        (tensor parallelism) and not the work: all do all of it, and the first writes.

    Examples
    --------
    >>> from probekit.ranks import Ranks
    >>> Ranks(rank=1, size=3).share(["a", "b", "c", "d", "e"])
    ['b', 'e']
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    group: Any = None
    in_step: bool = False

    @classmethod
    def of_environment(cls) -> Ranks:
        """As torchrun, or srun or mpirun with MASTER_ADDR and MASTER_PORT set, started this process; else alone.

        Raises InputError for ranks that are none.
        """
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            return cls()
        for names in _LAUNCHERS:
            if names[0] in os.environ and names[1] in os.environ:
                said = [os.environ.get(name, "0") for name in names]
                if not all(word.isdecimal() for word in said) or not int(said[0]) < int(said[1]):
                    raise InputError(
                        f"{', '.join(names)} are {', '.join(said)}; a rank must be a number below that of processes.",
                        "Start the processes with torchrun or srun, or unset MASTER_ADDR.",
                    )
                rank, size, local = map(int, said)
                return cls(rank, size, local)
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, asked: str | None) -> str | None:
        """Where this process loads a model: of several on a machine, each has a GPU of its own."""
        if self.size == 1 or self.in_step or asked not in (None, "cuda"):
            return asked
        from torch import cuda

        return f"cuda:{self.local % cuda.device_count()}" if cuda.is_available() else asked

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """Every size-th, from its rank on: neighbours are of like length, so that all have as much to do."""
        return things if self.in_step else things[self.rank :: self.size]

    def shared_out(self, things: Sequence[T], work: Callable[[Sequence[T]], Sequence[U]]) -> list[U]:
        """What `work` makes of each thing, in their order, for all: every process works on its share.

        work: a share of the things -> as many results, which can be pickled. Raises as `agreed`.
        """
        mine = self.share(things)
        made = list(self.agreed(lambda: work(mine) if mine else ()))
        if self.size == 1 or self.in_step:
            return made
        shares = self.all(made)
        return [shares[place % self.size][place // self.size] for place in range(len(things))]

    # ------------------------------------------------------------------------------------------- what all must hear
    def from_first(self, value: T) -> T:
        """The first process's value, for all; anything that can be pickled."""
        return self._talk(lambda distributed: _broadcast(distributed, value, self.group)) if self.size > 1 else value

    def all(self, value: T) -> list[T]:
        """Every process's value, by rank, for all. It waits for the slowest."""
        return self._talk(lambda distributed: _gather(distributed, value, self)) if self.size > 1 else [value]

    def from_first_of(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, for all; only there it is called. Raises as `agreed`."""
        made = self.agreed(lambda: make() if self.first else None)
        found = self.from_first(made)
        if found is None:
            raise RuntimeError("the first process told of nothing")
        return found

    def agreed(self, make: Callable[[], T]) -> T:
        """What `make` gives, once it has given something in every process.

        Raises its error where it was the first to fail, and ElsewhereError in all other processes.
        """
        failure: ProbekitError | None = None
        try:
            made = make()
        except ProbekitError as error:
            failure = error
        told = self.all(None if failure is None else (failure.problem, failure.exit_status))
        failed = next((rank for rank, what in enumerate(told) if what is not None), None)
        if failed is None:
            return made
        if failure is not None and failed == self.rank:
            raise failure
        raise ElsewhereError(failed, *(told[failed] or ("", 1)))

    def _talk(self, call: Callable[[Any], T]) -> T:
        from torch import distributed

        try:
            return call(distributed)
        except RuntimeError as error:  # what gloo raises when a connection ends
            raise _ended(error) from None


def _broadcast(distributed: Any, value: T, group: Any) -> T:
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=group)
    return box[0]


def _gather(distributed: Any, value: T, ranks: Ranks) -> list[T]:
    found: list[Any] = [None] * ranks.size
    distributed.all_gather_object(found, value, group=ranks.group)
    return found


@contextmanager
def connected() -> Iterator[None]:
    """Where processes share a model: that another of them ended is a ResourceError, which says how to go on."""
    try:
        yield
    except RuntimeError as error:
        from torch import distributed

        if isinstance(error, distributed.DistError) or "gloo" in str(error):  # gloo's are of no kind of their own
            raise _ended(error) from None
        raise


def _ended(error: RuntimeError) -> ResourceError:
    why = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]  # not where in gloo, nor its advice
    return ResourceError(
        f"another process of this job ended before its work was done ({why}).",
        "Run the same command again, with any number of processes (a trace with --resume: its parts are kept).",
    )


@contextmanager
def joined(ranks: Ranks) -> Iterator[Ranks]:
    """The same processes, able to talk; leaves torch.distributed as it was."""
    if ranks.size == 1 or ranks.group is not None:
        yield ranks
        return
    from torch import distributed

    mine = not distributed.is_initialized()
    if mine:
        _meet(distributed, ranks)
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        with connected():
            yield replace(ranks, group=group)
    finally:
        distributed.destroy_process_group(None if mine else group)


def _meet(distributed: Any, ranks: Ranks) -> None:
    try:
        distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.size, timeout=MEETING)
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ResourceError(
            f"process {ranks.rank} of {ranks.size} did not meet the others at {place} ({str(error).splitlines()[0]})",
            "Start all processes of the job, as torchrun and srun do; or unset MASTER_ADDR, for one alone.",
        ) from None
