"""Ctrl-C, and a request to end: raised once as `Stopped`, which says what is kept and how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_AFTER_S = 0.01
_SAID = {"SIGINT": "interrupted", "SIGTERM": "asked to end (SIGTERM)", "SIGHUP": "its terminal closed (SIGHUP)"}


_received: list[int] = []  # the signals that `stoppable` raised


class Stopped(BaseException):
    """A signal asked the process to end. Not an Exception, so that nothing on the way takes it for a failure.

    Parameters
    ----------
    number: of the signal.
    kept: what is on disk, as a sentence; empty: nothing is. again: words that the same command line needs to go on.
    """

    def __init__(self, number: int, kept: str = "", again: tuple[str, ...] = ()) -> None:
        self.number = number
        self.kept = kept
        self.again = again

    @property
    def said(self) -> str:
        return _SAID[signal.Signals(self.number).name]

    @property
    def exit_status(self) -> int:
        """As shells give it: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + self.number


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals raise `Stopped` in here, once: a second one ends the process at once, without a word.

    Signals that are ignored stay ignored (a shell's background jobs, `nohup`). One that falls into a destructor or a
    weak reference's callback, from which nothing can be raised, is raised again a moment later; so is one that falls
    into an import, where modules written in C++ end the process at an exception that they did not expect.
    """
    before: dict[int, object] = {}
    unraised = sys.unraisablehook
    _received.clear()
    waiting: set[int] = set()  # signals that fell into an import
    raised: set[int] = set()  # by ourselves, again

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def lost(fault: sys.UnraisableHookArgs) -> None:
        if not isinstance(fault.exc_value, Stopped):
            unraised(fault)
            return
        for number in before:
            signal.signal(number, stop)
        threading.Timer(_AGAIN_AFTER_S, _raised_here, [fault.exc_value.number]).start()

    def again(number: int) -> None:
        if number in waiting:
            raised.add(number)
            _raised_here(number)

    def stop(number: int, frame: FrameType | None) -> None:
        first = number in raised or number not in waiting
        raised.discard(number)
        if _imports(frame) and first:
            waiting.add(number)
            threading.Timer(_AGAIN_AFTER_S, again, [number]).start()
            return
        waiting.clear()
        for each in before:
            signal.signal(each, signal.SIG_DFL)  # not what was there: Python's own answer to Ctrl-C is a traceback
        if not first and _imports(frame):
            signal.raise_signal(number)
            return
        _received.append(number)
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():
        for name in _SAID:
            number = getattr(signal, name, None)  # there is no SIGHUP on Windows
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
        sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = unraised
        waiting.clear()
        restore()
        _received.clear()


def _raised_here(number: int) -> None:
    """As if the signal came from outside, to the main thread: a call that it waits in is interrupted."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def undisguised() -> Iterator[None]:
    """Whatever a signal's exception became on its way is `Stopped` again.

    In an import it may come out as another: Python itself makes a RuntimeError of what is raised in `__set_name__`, and
    modules written in C make what they like of it.
    """
    try:
        yield
    except Exception as error:
        if _received:
            raise Stopped(_received[-1]) from error
        raise


@contextmanager
def keeping(told: Callable[[], str], again: tuple[str, ...] = ()) -> Iterator[None]:
    """Within it, a `Stopped` learns what is kept (`told`, asked then) and what to add to the command line to go on."""
    try:
        yield
    except Stopped as stop:
        stop.kept, stop.again = told(), again
        raise
