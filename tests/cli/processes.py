"""Commands in processes of their own, forked from one that has the large libraries already."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tracing.jobs import MANY, PATIENCE


class Command:
    """`probekit WORDS`, with what it prints in files of `folder`. before: called first, in that process."""

    def __init__(self, folder: Path, *words: object, before: Callable[[], None] | None = None) -> None:
        self._printed, self._said = folder / "printed", folder / "said"
        self._process = MANY.Process(target=_command, args=(list(map(str, words)), self._printed, self._said, before))
        self._process.start()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)

    def ended(self) -> tuple[int, str, str]:
        """(status, standard output, standard error), when it has ended; the status is below 0 after a signal."""
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError("the command did not end")
        return self._process.exitcode or 0, self._printed.read_text(), self._said.read_text()


def _command(words: list[str], printed: Path, said: Path, before: Callable[[], None] | None) -> None:
    for number, path in ((1, printed), (2, said)):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner's children may ignore it
    sys.argv = ["probekit", *words]
    if before is not None:
        before()
    from probekit.cli import main

    main()
