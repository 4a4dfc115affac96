"""Work that strangers wrote, as a chat template is, in a process of its own: bounded in time and memory."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from probekit.errors import InputError
from probekit.foreign.text import MOST_CHARACTERS

MOST_SECONDS = 5  # of the processor
MOST_BYTES = 2**30


class Bounded:
    """Texts that `work` makes of questions, from a fork of this process; on other systems than Linux it is called here.

    One fork answers all questions, for it takes the longer the more memory this process holds. It is made at the first
    one, and anew behind one that it did not survive. Leave the context, and it is gone.
    """

    def __init__(self, work: Callable[[Any], str]) -> None:
        self._work = work
        self._child: int | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Bounded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def text(self, question: Any, what: str) -> str:
        """The text of one question, which is pickled.

        what: what runs, as the sentence begins. Raises InputError for whatever `work` raises, and for a question that
        takes more than MOST_SECONDS or MOST_BYTES, or makes a text of more than MOST_CHARACTERS.
        """
        if sys.platform != "linux":
            try:
                return self._work(question)
            except Exception as error:
                raise InputError(f"{what} cannot be used: {_in_short(error)}.") from None
        fresh = self._child is None
        said = self._asked(question)
        if not said and not fresh:  # it may have died of what earlier questions left
            said = self._asked(question)
        text = said[1:].decode("utf-8", "surrogatepass")
        if said[:1] == b"+":
            return text
        hint = "Take another template, or shorter messages." if not said else ""
        raise InputError(f"{what} {text or f'takes more than {MOST_SECONDS} s or {MOST_BYTES // 2**30} GB'}.", hint)

    def _asked(self, question: Any) -> bytes:
        """What the child says; nothing where it died of the question."""
        try:
            pipe = self._pipe or self._fork()
            pipe.send(question)
            return pipe.recv_bytes()
        except (EOFError, ConnectionError):
            self.close()
            return b""
        except BaseException:  # also when a signal came while it was waited for: its answer is nobody's
            self.close()
            raise

    def _fork(self) -> Connection:
        here, there = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forks beside threads: the child only renders, and ends
            child = os.fork()
        if not child:
            _serve(self._work, here, there)
        there.close()
        self._child, self._pipe = child, here
        return here

    def close(self) -> None:
        """End the child, whatever it does."""
        child, pipe, self._child, self._pipe = self._child, self._pipe, None, None
        if pipe is not None:
            pipe.close()
        if child is not None:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)


def _serve(work: Callable[[Any], str], here: Connection, there: Connection) -> NoReturn:
    """In the child: bounds itself, and answers b"+" and a text, or b"-" and what went wrong, until nobody asks."""
    try:
        here.close()
        _bound()
        while True:
            question = there.recv()
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # its signal ends the process
            try:
                text = work(question)
                said = "+" + text if len(text) <= MOST_CHARACTERS else f"-makes a text of {len(text):,} characters"
            except MemoryError:
                break
            except Exception as error:
                said = f"-cannot be used: {_in_short(error)}"
            there.send_bytes(said.encode("utf-8", "surrogatepass"))
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        os._exit(0)


def _bound() -> None:
    import resource

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = size + MOST_BYTES if hard == resource.RLIM_INFINITY else min(hard, size + MOST_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _in_short(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
