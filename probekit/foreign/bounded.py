"""Work that strangers wrote, as a chat template is, in a process of its own: bounded in time and memory."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from probekit.errors import InputError
from probekit.foreign.text import MOST_CHARACTERS

MOST_SECONDS = 5  # of the processor
MOST_BYTES = 2**30


def bounded_text(work: Callable[[], str], what: str) -> str:
    """The text that `work` gives, from a fork of this process; on other systems than Linux it is called here.

    what: what runs, as the sentence begins. Raises InputError for whatever it raises, and for one that takes more than
    MOST_SECONDS or MOST_BYTES, or makes a text of more than MOST_CHARACTERS.
    """
    if sys.platform != "linux":
        try:
            return work()
        except Exception as error:
            raise InputError(f"{what} cannot be used: {_in_short(error)}.") from None
    here, there = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads: the child only renders, and ends
        child = os.fork()
    if not child:
        _answer(work, here, there)
    os.close(there)
    try:
        with open(here, "rb") as answer:
            said = answer.read()
    finally:  # also when a signal came while it was waited for
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = said[1:].decode("utf-8", "surrogatepass")
    if said[:1] == b"+":
        return text
    hint = "Take another template, or shorter messages." if not said else ""
    raise InputError(f"{what} {text or f'takes more than {MOST_SECONDS} s or {MOST_BYTES // 2**30} GB'}.", hint)


def _answer(work: Callable[[], str], here: int, there: int) -> None:
    """In the child: bounds itself, works, writes b"+" and the text, or b"-" and what went wrong, and ends."""
    try:
        os.close(here)
        _bound()
        try:
            text = work()
            said = "+" + text if len(text) <= MOST_CHARACTERS else f"-makes a text of {len(text):,} characters"
        except MemoryError:
            said = ""
        except Exception as error:
            said = f"-cannot be used: {_in_short(error)}"
        with open(there, "wb") as answer:
            answer.write(said.encode("utf-8", "surrogatepass"))
    finally:
        os._exit(0)


def _bound() -> None:
    import resource

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = size + MOST_BYTES if hard == resource.RLIM_INFINITY else min(hard, size + MOST_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _in_short(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
