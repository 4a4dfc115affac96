"""The command line: the only place that parses arguments or prints."""

from __future__ import annotations

import json
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
        said, status = f"{stop.said}. Nothing was begun.", stop.exit_status
        if "--json" in words:
            command = next((word for word in words if not word.startswith("-")), "probekit")
            print(json.dumps({"schema": f"probekit/{command}/1", "error": said, "hint": ""}), flush=True)
        else:
            sys.stderr.write(f"probekit: {said}\n")
    sys.exit(status)


__all__ = ["main"]
