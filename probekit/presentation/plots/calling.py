"""How every plot is called: first the table, then `ax=`, by default the current Axes; it returns the Axes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from probekit.errors import InputError
from probekit.presentation.plots.glyphs import plain, with_their_fonts

Plot = TypeVar("Plot", bound=Callable[..., Any])


def plot(*columns: str) -> Callable[[Plot], Plot]:
    """Marks a function `draw(table, ..., ax=None)` as a plot of a table with at least these columns.

    The table may be anything with `to_pandas`. The order of before, `draw(ax, table, ...)`, still works, warns, and
    returns what it did: what a colour bar needs, or None. Raises InputError for a table without the columns.
    """

    def marked(draw: Plot) -> Plot:
        table = next(iter(signature(draw).parameters))

        @wraps(draw)
        def called(*arguments: Any, ax: Axes | None = None, **options: Any) -> Any:
            if table in options:
                arguments = (*arguments, options.pop(table))
            if not arguments or not isinstance(arguments[0], Axes):
                drawn = draw(*_checked(draw.__name__, arguments, columns), ax=axes_or_current(ax), **options)
                with_their_fonts(drawn)
                return drawn
            warnings.warn(
                f"{draw.__name__}(ax, table) is now {draw.__name__}(table, ax=ax), and returns the Axes.",
                DeprecationWarning,
                stacklevel=2,
            )
            first, *rest = arguments
            return _mapped(draw(*_checked(draw.__name__, tuple(rest), columns), ax=first, **options))

        return cast("Plot", called)

    return marked


def axes_or_current(ax: Axes | None) -> Axes:
    """The Axes to draw on: those given, or pyplot's current ones, as in seaborn."""
    if ax is None:
        import matplotlib.pyplot as plt

        return plt.gca()
    if not isinstance(ax, Axes):
        raise InputError(f"ax is of type {type(ax).__name__}; expected matplotlib Axes.", "Hand in one of several.")
    return ax


def colours_of(ax: Axes) -> ScalarMappable:
    """What a colour bar needs of the heat map on these Axes: `figure.colorbar(colours_of(ax), ax=ax)`.

    Raises InputError where there is none.
    """
    found = _mapped(ax)
    if found is None:
        raise InputError("there is no heat map on these Axes.", "A table without a value has none.")
    return found


def one_bar(figure: Figure, axes: Sequence[Axes], label: str, **options: Any) -> None:
    """One colour bar for heat maps that share their colours; none where all of them are empty."""
    found = next((colours for ax in axes if (colours := _mapped(ax))), None)
    if found is not None:
        bar = figure.colorbar(found, ax=list(axes), **options)
        bar.set_label(plain(label))
        with_their_fonts(bar.ax)


def _mapped(ax: Axes) -> ScalarMappable | None:
    meshes = [drawn for drawn in ax.collections if isinstance(drawn, QuadMesh)]
    return ScalarMappable(meshes[-1].norm, meshes[-1].cmap) if meshes else None


def _checked(name: str, arguments: tuple[Any, ...], columns: tuple[str, ...]) -> tuple[Any, ...]:
    """The arguments with a DataFrame in front that has the columns."""
    if not arguments:
        raise InputError(f"{name} was given nothing to draw; expected a table with columns {', '.join(columns)}.")
    table, *rest = arguments
    if not isinstance(table, pd.DataFrame):
        if not hasattr(table, "to_pandas"):
            raise InputError(
                f"{name} was given a {type(table).__name__}; expected a DataFrame.", "`probekit.presentation.tables` "
                "makes those that are drawn."
            )  # fmt: skip
        table = table.to_pandas()
    lacking = [column for column in columns if column not in table.columns]
    if lacking:
        raise InputError(f"the table for {name} has no column {', '.join(lacking)}.", "It needs "
                         f"{', '.join(columns)}.")  # fmt: skip
    return (table, *rest)
