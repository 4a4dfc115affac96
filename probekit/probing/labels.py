"""What a probe is to find: a label for every scored position, from the trace or the user's own. Needs no torch.

A label is of classes (truth values, whole numbers, text) or a number (floats). It is a function of the trace, the rows
and the layer; one of your own goes into LABELS under a name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from probekit.drafting.drafters import ExitLayer
from probekit.errors import InputError
from probekit.foreign.json import loads
from probekit.traces.token_text import looped_mask
from probekit.traces.trace import Trace

Label = Callable[[Trace, pd.DataFrame, int], np.ndarray]
"""(trace, scored rows with `prompt`, `position`, `output`, layer) -> (rows,); NaN or None where there is no label."""


def by_output(rows: pd.DataFrame, read: Callable[[int], np.ndarray]) -> np.ndarray:
    """(rows,): what `read` says of each row's prompt, (N,), at its output position."""
    outputs, prompts = rows["output"].to_numpy(), rows["prompt"].to_numpy()
    pieces = {prompt: np.asarray(read(prompt)) for prompt in np.unique(prompts).tolist()}
    if not pieces:
        return np.zeros(0)
    found = np.empty(len(rows), dtype=np.result_type(*pieces.values()) if len(pieces) > 1 else pieces[prompts[0]].dtype)
    for prompt, values in pieces.items():
        here = prompts == prompt
        found[here] = values[outputs[here]]
    return found


def accepted(trace: Trace, rows: pd.DataFrame, layer: int) -> np.ndarray:
    """Whether a draft of the exit at this layer is accepted at the position.

    On text that is not greedy this is a draw by the exact chance, w, that the trace knows; the run's seed fixes it.
    """
    if not 1 <= layer < trace.depth:
        raise InputError(f"layer {layer} is no exit: this model has exits 1..{trace.depth - 1}.", "Ask for `agrees`.")
    signal = by_output(rows, lambda prompt: ExitLayer(layer).signal(trace, prompt))
    if trace.manifest.settings.text == "greedy":
        return signal.astype(bool)
    seed = abs(trace.manifest.settings.seed)
    longest = int(rows["output"].max()) + 1
    drawn = by_output(rows, lambda prompt: np.random.default_rng((seed, prompt, layer)).random(longest))
    return drawn < signal


def agrees(trace: Trace, rows: pd.DataFrame, layer: int) -> np.ndarray:
    """Whether the lens at this layer has the model's argmax."""
    return by_output(rows, lambda prompt: trace.agreement(prompt)[layer])


def model_entropy(trace: Trace, rows: pd.DataFrame, layer: int) -> np.ndarray:
    """The entropy of the model's own distribution (nats): a number."""
    return by_output(rows, lambda prompt: trace.values(prompt, "entropy")[trace.depth]).astype(np.float64)


def output_position(trace: Trace, rows: pd.DataFrame, layer: int) -> np.ndarray:
    """The output position: a number."""
    return rows["output"].to_numpy().astype(np.float64)


def looped_token(trace: Trace, rows: pd.DataFrame, layer: int) -> np.ndarray:
    """Whether the token that follows lies in a repeated run."""
    return by_output(rows, lambda prompt: looped_mask(trace.outputs(prompt).tolist()))


def token_class(trace: Trace, rows: pd.DataFrame, layer: int) -> np.ndarray:
    """The kind of the token that follows: one of the names that `class_of_token` gives."""
    texts = trace.tokens.set_index(["prompt", "position"])["text"]
    keys = pd.MultiIndex.from_frame(rows[["prompt", "position"]])
    return np.array([class_of_token(text) for text in texts.loc[keys]])


def class_of_token(text: str) -> str:
    """Of a token as a trace shows it: word, piece (of a word), number, punctuation, space, or other."""
    bare = text.lstrip("␣")
    if not bare.strip("␣⏎⇥␍"):
        return "space"
    if bare.isalpha():
        return "word" if bare != text else "piece"
    if bare.isdigit():
        return "number"
    return "other" if any(letter.isalnum() or letter in "⟨⟩" for letter in bare) else "punctuation"


LABELS: dict[str, Label] = {
    "accepted": accepted,
    "agrees": agrees,
    "entropy": model_entropy,
    "token-class": token_class,
    "looped": looped_token,
    "position": output_position,
}
"""By the names that `probe` and the command line know."""


def label_named(given: str | Path | Label | pd.DataFrame) -> tuple[str, Label]:
    """A label by its name, from a file or a table, or of your own as a function; with what to call it.

    A table has the columns `prompt`, `position` (or `output`), and one more. Raises InputError.
    """
    if isinstance(given, pd.DataFrame):
        return _of_table(given, "the table of labels")
    if isinstance(given, (str, Path)):
        if str(given) in LABELS:
            return str(given), LABELS[str(given)]
        path = Path(given)
        if not os.path.isfile(path):
            raise InputError(
                f"there is no label {str(given)!r}: there are {', '.join(LABELS)}.",
                "Name one of them, or a file (.csv, .jsonl or .parquet) with prompt, position and a column of labels.",
            )
        return _of_table(_table(path), str(path))
    return getattr(given, "__name__", type(given).__name__), given


def _table(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return pd.DataFrame([loads(line) for line in lines if line.strip()])
        return pd.read_csv(path)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a table of labels: {error}") from None


def _of_table(table: pd.DataFrame, source: str) -> tuple[str, Label]:
    place = next((name for name in ("position", "output") if name in table.columns), None)
    others = [str(name) for name in table.columns if name not in ("prompt", "position", "output")]
    if "prompt" not in table.columns or place is None or len(others) != 1:
        raise InputError(
            f"{source} has the columns {', '.join(map(str, table.columns))}; expected prompt, position (or output) and "
            "one column of labels."
        )
    [name] = others
    keys = ["prompt", place]
    if not all(pd.api.types.is_integer_dtype(table[key]) for key in keys):
        raise InputError(f"{source}: prompts and positions are whole numbers.")
    if table.duplicated(keys).any():
        first = table[table.duplicated(keys)].iloc[0]
        raise InputError(f"{source} labels prompt {first['prompt']}, {place} {first[place]} twice.")
    values: pd.Series = table.set_index(keys)[name]

    def read(trace: Trace, rows: pd.DataFrame, layer: int) -> np.ndarray:
        found = values.reindex(pd.MultiIndex.from_frame(rows[keys]))
        if found.isna().all():
            raise InputError(
                f"{source} labels none of the rows that this run kept.", f"Label them by prompt and {place}."
            )
        return _as_labels(found)

    return name, read


def _as_labels(found: pd.Series) -> np.ndarray:
    """Whole numbers that became floats for want of some rows are classes still."""
    known = found.dropna()
    if pd.api.types.is_bool_dtype(known.infer_objects()):
        return found.to_numpy(dtype=object)
    if pd.api.types.is_numeric_dtype(known) and (known == known.round()).all() and known.nunique() <= 20:
        return np.array([None if pd.isna(value) else int(value) for value in found], dtype=object)
    return found.to_numpy(dtype=np.float64 if pd.api.types.is_numeric_dtype(known) else object)


def known_labels(values: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(which rows have a label, (rows,) bool; the labels of those). Raises InputError for what is no label."""
    values = np.asarray(values)
    if values.shape != (rows,):
        raise InputError(f"the labels have shape {values.shape}; expected one for each of {rows} rows.")
    known = ~pd.isna(values)
    found = values[known]
    if found.dtype == object:
        found = np.array(found.tolist())
    if found.dtype.kind not in "biufUS":
        raise InputError(f"labels are truth values, whole numbers, text or numbers, not {found.dtype}.")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise InputError("a label is not finite.")
    return known, found


def is_number(labels: np.ndarray) -> bool:
    """Whether labels are numbers to be estimated, and not classes to be told apart."""
    return labels.dtype.kind == "f"
