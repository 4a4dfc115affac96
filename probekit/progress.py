"""How long work reports itself: `progress(phase, done, total, **figures)`; in a notebook as bars, unasked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Progress = Callable[..., None]
"""Called as `progress(phase, done, total, **figures)`. A phase's total stays what it was at its first call."""

STUDY = "study"
"""The phase that tells of a whole study; its figure `says` names the model and the phase it is at."""


def no_progress(*_: Any, **__: Any) -> None:
    """For whoever does not ask."""


def usual_progress(asked: Progress | None) -> Progress:
    """What was asked for; else bars in a notebook, and nothing elsewhere."""
    if asked is not None:
        return asked
    return NotebookBars() if _in_notebook() else no_progress


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


class NotebookBars:
    """A bar of tqdm for each phase, closed when it is done."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, phase: str, done: float, total: float | None, **figures: Any) -> None:
        from tqdm.auto import tqdm

        if phase not in self._bars:
            self._bars[phase] = tqdm(desc=phase, total=total, leave=phase == STUDY, unit="")
        bar = self._bars[phase]
        says = figures.pop("says", None)
        if says is not None:
            bar.set_description(f"{phase}: {says}", refresh=False)
        bar.set_postfix({name.replace("_", " "): value for name, value in figures.items()}, refresh=False)
        bar.update(done - bar.n)
        if total is not None and done >= total:
            self._bars.pop(phase).close()
