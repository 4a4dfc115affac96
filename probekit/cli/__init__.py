"""The command line: the only place that parses arguments or prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    0: done. 1: it did not hold, or something broke. 2: wrong use or bad input. 128 + n: ended by signal n (130 after
    Ctrl-C, 143 after SIGTERM).
    """
    from probekit.cli.signals import Stopped, stoppable

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stoppable():
            from probekit.cli.app import run  # in here: what is slow to import can be interrupted, too

            status = run(words)
    except Stopped as stop:  # between the commands' own care and here: nothing was begun
        sys.stderr.write(f"probekit: {stop.said}. Nothing was begun.\n")
        status = stop.exit_status
    sys.exit(status)


__all__ = ["main"]
