"""The tables of a trace and their columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import pandas as pd
import pyarrow as pa

from probekit.errors import InputError
from probekit.lens.statistics import LAYER_COLUMNS

LENSES = ("final-norm", "raw")
LensName = Literal["final-norm", "raw"]
# What a column of each kind is in a Parquet file; texts and lenses are what pandas makes of them.
_ARROW = {
    "int8": pa.int8(), "int16": pa.int16(), "int32": pa.int32(), "float32": pa.float32(), "bool": pa.bool_(),
}  # fmt: skip

_LENS = pa.dictionary(pa.int8(), pa.string())

# The columns of each table, in order. Those of `layers` after `layer` depend on what was asked for.
COLUMNS: dict[str, dict[str, str]] = {
    "texts": {
        "prompt": "int32",
        "kind": "str",
        "text": "str",
        "continuation": "str",
        "prompt_tokens": "int32",
        "new_tokens": "int32",
        "ended": "str",
        "looped": "float32",
    },
    "tokens": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "generated": "bool",
        "input_id": "int32",
        "text_id": "int32",
        "text": "str",
    },
    "layers": LAYER_COLUMNS,
    "top": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "lens": "category",
        "layer": "int16",
        "place": "int8",
        "token": "int32",
        "token_text": "str",
        "probability": "float32",
    },
    "drafter": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "argmax": "int32",
        "agrees": "bool",
        "margin": "float32",
        "near_tie": "bool",
        "overlap": "float32",
        "accept_probability": "float32",
        "argmax_rounded": "int32",
        "agrees_rounded": "bool",
    },
    # Generated rows only. agrees_up_to: the most rows of a draft head with which the layer says the model's token.
    "draft_head": {
        "prompt": "int32",
        "position": "int32",
        "output": "int32",
        "layer": "int16",
        "agrees_up_to": "int32",
        "surely_up_to": "int32",
        "perhaps_up_to": "int32",
        "agrees_up_to_rounded": "int32",
    },
}
REQUIRED = {
    "texts": tuple(COLUMNS["texts"]),
    "tokens": tuple(COLUMNS["tokens"]),
    "layers": ("prompt", "position", "output", "lens", "layer", "agrees", "near_tie"),
    "top": tuple(COLUMNS["top"]),
    "drafter": ("prompt", "position", "output", "argmax", "agrees", "margin", "near_tie"),
    "draft_head": tuple(name for name in COLUMNS["draft_head"] if not name.endswith("_rounded")),
}


def conform(table: str, frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the columns of `table` in their order and types.

    Raises InputError on a wrong set of columns, and on values that are missing or do not fit a column's type.
    """
    unknown = [name for name in frame.columns if name not in COLUMNS[table]]
    missing = [name for name in REQUIRED[table] if name not in frame.columns]
    if unknown or missing:
        raise InputError(f"a {table!r} table has unknown columns {unknown} and lacks {missing}.")
    whole: dict[str, Any] = {}
    for name, kind in COLUMNS[table].items():
        if name in frame.columns:
            values = frame[name]
            dtype = pd.CategoricalDtype(list(LENSES)) if kind == "category" else pd.api.types.pandas_dtype(kind)
            try:
                whole[name] = values.astype(dtype)
            except (TypeError, ValueError, OverflowError) as error:
                raise InputError(f"the column {name!r} of a {table!r} table is no {kind}: {error}") from None
    return pd.DataFrame(whole).reset_index(drop=True)


def require_columns(table: str, present: Iterable[str], wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in set(present)]
    if missing:
        raise InputError(
            f"the {table!r} table of this trace has no {', '.join(missing)}.",
            "Trace again with `statistics='all'`, or at the settings that this figure needs.",
        )


def checked(table: str, read: pa.Table, source: str) -> pa.Table:
    """Columns of a Parquet part, each of the type that it is written with.

    Raises InputError, which names `source`, for a column of another kind, for numbers or bits that are missing, for
    text that is none, and for lenses that there are not.
    """
    for name in read.column_names:
        kind = COLUMNS[table].get(name)
        wanted = _ARROW.get(kind or "")
        column = read[name]
        if kind in ("str", "category"):
            _check_text(name, kind, column, source)
            read = read.set_column(read.column_names.index(name), name, _one_kind(kind, column))
        if wanted is None:
            continue
        if column.null_count and kind != "float32":
            raise InputError(f"{source} lacks {column.null_count} values of {name!r}.", "Trace again with --resume.")
        if column.type != wanted:
            try:
                read = read.set_column(read.column_names.index(name), name, column.cast(wanted))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise InputError(
                    f"{source} holds {column.type} as {name!r}, where {wanted} belongs: {error}",
                    "Trace again with --resume.",
                ) from None
    return read.replace_schema_metadata(None)  # what pandas would obey: a file's own word for types and index


def _one_kind(kind: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text of one type in every part, whichever version of a library wrote it."""
    if kind == "str":
        return column.cast(pa.large_string())
    return column if column.type == _LENS else column.cast(pa.string()).dictionary_encode().cast(_LENS)


def _check_text(name: str, kind: str, column: pa.ChunkedArray, source: str) -> None:
    held = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    texts = pa.types.is_string(held) or pa.types.is_large_string(held) or (pa.types.is_null(held) and kind == "str")
    try:
        column.validate(full=True)  # offsets that point elsewhere, bytes that are no UTF-8
        strange = set(column.unique().to_pylist()) - set(LENSES) if texts and kind == "category" else set()
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{source} holds what is no text as {name!r}: {error}", "Trace again with --resume.") from None
    if not texts or strange:
        what = column.type if not texts else sorted(map(str, strange))[0]
        wanted = "text belongs" if kind == "str" else f"one of {', '.join(LENSES)} belongs"
        raise InputError(f"{source} holds {what} as {name!r}, where {wanted}.", "Trace again with --resume.")
