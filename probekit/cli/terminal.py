"""Standard output for results, standard error for everything else, progress only on a terminal."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from probekit.foreign.text import ascii_escapes, printable

_WIDE = 140  # columns where there is no window to fold to
_CELL = 24  # columns that a cell may ask for before its heading folds


class Terminal(Console):
    """A console that shows what others wrote and never obeys it: escape codes in names, titles and errors are text."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


out = Terminal(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
err = Terminal(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDE)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document; what is not a number in JSON (NaN, infinities) becomes null."""
    sys.stdout.write(ascii_escapes(json.dumps(_finite(document), ensure_ascii=False, allow_nan=False)) + "\n")
    sys.stdout.flush()


def notice(message: str, *, quiet: bool = False) -> None:
    """A line for the person at the terminal; escaped, since it may quote prompts and tokens."""
    if not quiet:
        err.print(escape(message))


def say_remarks(manifest: Any, quiet: bool) -> None:
    """The remarks of a run."""
    for remark in manifest.provenance.remarks:
        notice(f"remark: {remark}", quiet=quiet)


@contextmanager
def warnings_as_notices(quiet: bool, kind: type[Warning] = UserWarning) -> Iterator[None]:
    """What the library warns of, as lines for the person at the terminal; others' warnings go their own way."""
    others = warnings.showwarning

    def say(
        message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if category is kind:
            notice(f"remark: {message}", quiet=quiet)
        else:
            others(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = say
        yield


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], footnote: str = "", *, keys: int = 1
) -> None:
    """A table whose cells are data, never markup. Where it is wider than the window, several below one another.

    keys: the first columns, which say what a row is about; they stand in each of the tables.
    """
    shown = [[show(value) for value in row] for row in rows]
    cells = [max((cell_len(row[index]) for row in shown), default=0) for index in range(len(columns))]
    least = [max([min(_CELL, cell), *map(cell_len, head.split())]) for cell, head in zip(cells, columns, strict=True)]
    most = [max(cell, cell_len(head)) for cell, head in zip(cells, columns, strict=True)]
    out.print(Text(title, style="bold"))  # not the table's own, which would wrap where the table is narrow
    for number, indices in enumerate(_folded(columns, least, keys, out.width)):
        if number:
            out.print()
        table = Table(show_edge=False, pad_edge=False)
        spare = out.width - _beside(least[each] for each in indices)
        for index in indices:
            side: Any = "left" if index == 0 else "right"
            more = min(most[index] - least[index], max(0, spare))
            spare -= more
            table.add_column(Text(columns[index]), justify=side, overflow="fold", width=least[index] + more)
        for row in shown:
            table.add_row(*(Text(row[index]) for index in indices))
        out.print(table)
    if footnote:
        out.print(Text(footnote, style="dim"))


def _folded(columns: Sequence[str], least: Sequence[int], keys: int, width: int) -> Iterator[list[int]]:
    """Which columns stand beside one another, by their least widths: the keys, and as many others as there is room.

    An interval stays with what it is of, the column before it.
    """
    beside = list(range(keys))
    for index in range(keys, len(columns)):
        if columns[index].startswith("95 %"):
            continue
        own = [index, *(each for each in (index + 1,) if columns[each:] and columns[each].startswith("95 %"))]
        if len(beside) > keys and _beside(least[each] for each in (*beside, *own)) > width:
            yield beside
            beside = list(range(keys))
        beside += own
    yield beside


def _beside(widths: Iterable[int]) -> int:
    """How wide columns are together, with the lines between them."""
    return sum(width + len(" │ ") for width in widths) - len(" │ ")


def show(value: Any) -> str:
    """A figure as a person reads it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(part, float) for part in value):
        if any(map(math.isnan, value)):
            return "-"
        return f"[{value[0]:.2f}, {value[1]:.2f}]"
    if isinstance(value, (list, tuple)):
        return " ".join(show(part) for part in value)
    return str(value)


class _Count(ProgressColumn):
    """Done and total, where they count something; a whole study has no unit."""

    def render(self, task: Task) -> Text:
        if task.total is None or not float(task.total).is_integer() or task.fields.get("says") is not None:
            return Text("")
        return Text(f"{int(task.completed)}/{int(task.total)}", "progress.download")


class _Left(ProgressColumn):
    """The time left at the speed so far: never cut, whatever else has to give way."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, min_width=len("left 0:00:00")))

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"took {_clock(task.finished_time or 0.0)}", "progress.elapsed")
        if not task.completed or task.total is None or task.elapsed is None:
            return Text("left -:--:--", "progress.remaining")
        return Text(f"left {_clock(task.elapsed * (task.total / task.completed - 1))}", "progress.remaining")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


class _Figures(ProgressColumn):
    """What a phase reports of itself: tokens a second, a loss, a cell. Cut off where the window is narrow."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=1))

    def render(self, task: Task) -> Text:
        figures = task.fields.get("figures", {})
        return Text("  ".join(f"{name.replace('_', ' ')} {_brief(value)}" for name, value in figures.items()), "dim")


def _brief(value: Any) -> str:
    """A figure that changes while it is read: three digits are enough."""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else show(value)


class Bars:
    """Progress as the library reports it: `bars(phase, done, total, **figures)`; one bar for each phase."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: float, total: float | None, **figures: Any) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(escape(phase), total=total, figures={}, says=None)
        says = figures.pop("says", None)
        named = phase if says is None else f"{phase}: {says}"
        self._progress.update(
            self._tasks[phase], description=escape(named), completed=done, total=total, figures=figures, says=says
        )


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Bars]:
    """Bars with time left on a terminal; nothing elsewhere."""
    columns = (
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=2)),
        *([] if err.width < 60 else [BarColumn(bar_width=12 if err.width < 100 else 24)]),
        _Count(Column(no_wrap=True)),
        _Left(),
        *([] if err.width < 100 else [_Figures()]),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, expand=True) as progress:
        yield Bars(progress)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # a NumPy scalar
        return _finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
