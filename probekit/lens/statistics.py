"""Statistics of a layer's logits: one entry each, from which tracer, columns, tables, plots and pages take it.

The built-in ones share their passes over the logits and are computed together (`lens.chunked`). One of your own brings
its reduction: `register(Statistic("name", reduce=function))`, and every trace that is made from then on has it.
Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from probekit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "int32", "bool")


class LogitsBlock(NamedTuple):
    """Logits of some tokens at some sites, and what they are held against. Read them, never write to them.

    Sites are the rows of one token: the model's own row first, then layers 0..L-1 of each lens; a block may hold some
    of them only.

    logits: (tokens, sites, vocabulary), float32. model: (tokens, vocabulary), the model's own.
    input_ids, text_ids: (tokens,), the token that each row reads, and the text's next one.
    """

    logits: Tensor
    model: Tensor
    input_ids: Tensor
    text_ids: Tensor


@dataclass(frozen=True)
class Statistic:
    """A column of the `layers` table: a figure of every (lens, layer, row).

    Parameters
    ----------
    name: of the column. dtype: one of DTYPES.
    label: what it is called beside a colour bar, with its unit; empty: nothing is coloured by it.
    low, high: between what it is coloured; None: between the least and the greatest of the data. reverse: the low end
        is the remarkable one.
    reduce: (logits of a block of rows and what they are held against) -> (tokens, sites); None for a built-in one.
    """

    name: str
    dtype: str = "float32"
    label: str = ""
    low: float | None = 0.0
    high: float | None = None
    reverse: bool = False
    reduce: Callable[[LogitsBlock], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.dtype not in DTYPES:
            raise InputError(
                f"a statistic has a name that can be a column and a type out of {', '.join(DTYPES)}, not "
                f"{self.name!r} and {self.dtype!r}."
            )


_BUILT_IN = (
    Statistic("argmax", "int32"),
    Statistic("probability", label="probability of the top token", high=1.0),
    Statistic("margin", label="margin of the top two (logits)"),
    Statistic("agrees", "bool"),
    Statistic("log_probability", label="log-probability of the text's token (nats)", low=None, high=0.0, reverse=True),
    Statistic("rank", "int32", "rank of the text's token (0: top)"),
    Statistic("model_rank", "int32", "rank of the lens's token in the model (0: top)"),
    Statistic("entropy", label="entropy (nats)"),
    Statistic("kl", label="KL(model ‖ lens) (nats)"),
    Statistic("overlap", label="overlap, Σ min(p, q)", high=1.0),
    Statistic("echo", "bool"),
    Statistic("near_tie", "bool"),
    Statistic("accept_probability"),
    Statistic("argmax_rounded", "int32"),
    Statistic("agrees_rounded", "bool"),
)

STATISTICS: dict[str, Statistic] = {each.name: each for each in _BUILT_IN}
"""All of them, in the order of their columns."""

COLOURED: dict[str, Statistic] = {each.name: each for each in _BUILT_IN if each.label}
"""Those that a lens table can be coloured by."""

LAYER_COLUMNS: dict[str, str] = {
    "prompt": "int32", "position": "int32", "output": "int32", "lens": "category", "layer": "int16",
} | {each.name: each.dtype for each in _BUILT_IN}  # fmt: skip
"""The columns of the `layers` table and their types."""


def register(statistic: Statistic) -> None:
    """Compute, keep and offer a statistic of your own from now on.

    Raises InputError for a name that is taken, and for one without a reduction.
    """
    if statistic.name in LAYER_COLUMNS:
        raise InputError(f"there is a column {statistic.name!r} already.", "Choose another name.")
    if statistic.reduce is None:
        raise InputError(f"the statistic {statistic.name!r} has no reduction.", "Give `reduce`.")
    STATISTICS[statistic.name] = statistic
    LAYER_COLUMNS[statistic.name] = statistic.dtype
    if statistic.label:
        COLOURED[statistic.name] = statistic


def unregister(name: str) -> None:
    """Undo `register`. Traces that were made meanwhile keep the column, and cannot be read by name any more."""
    if STATISTICS[name].reduce is None:
        raise InputError(f"{name!r} is built in.")
    for table in (STATISTICS, LAYER_COLUMNS, COLOURED):
        table.pop(name, None)


def registered() -> list[Statistic]:
    """The statistics that bring their own reduction."""
    return [statistic for statistic in STATISTICS.values() if statistic.reduce is not None]
