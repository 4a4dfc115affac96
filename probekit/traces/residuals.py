"""Residuals that a run kept: positions x width, with the prompt and position of each row beside them.

They lie in one safetensors file a part. The numbers are mapped, not read: what is never looked at takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from probekit.errors import InputError
from probekit.foreign.json import parse_json

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype("<u2"),
}
_MADE_ANEW = "Trace again with --resume."
BLOCK_ROWS = 4096
"""Rows that are read at once where no memory for all of them is asked for."""


_Count = Annotated[int, Field(strict=True, ge=0, le=2**48)]


class _Entry(BaseModel):
    """One tensor of a safetensors header: where its bytes lie, from the header's end on."""

    dtype: Literal["F32", "F16", "I32", "BF16"]
    shape: Annotated[tuple[_Count, ...], Field(max_length=4)]
    data_offsets: tuple[_Count, _Count]

    def place(self, start: int, size: int) -> tuple[int, np.dtype[Any], tuple[int, ...]]:
        """(offset in the file, dtype, shape). Raises ValueError where its bytes are not in a file of `size` bytes."""
        first, last = (start + offset for offset in self.data_offsets)
        dtype = _DTYPES[self.dtype]
        if last - first != prod(self.shape) * dtype.itemsize or last > size:
            raise ValueError(f"the bytes of a tensor of {self.dtype} {list(self.shape)} are not there")
        return first, dtype, self.shape


_HEADER = TypeAdapter(dict[str, _Entry])


class ResidualPart(NamedTuple):
    """rows: those of the part that belong here, ascending. numbers: (rows of the part, width), mapped."""

    rows: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True, eq=False)
class Residuals:
    """The residual stream after one layer, for rows that may be more than fit into memory.

    Parameters
    ----------
    layer: 0 is the embedding, L the last, before the final norm.
    frame: a row for each position: prompt, position; output (below 0 inside the prompt) and generated of a trace's.
    parts: where the numbers lie, in the order of `frame`.
    """

    layer: int
    frame: pd.DataFrame
    parts: tuple[ResidualPart, ...]

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def width(self) -> int:
        return self.parts[0].numbers.shape[1] if self.parts else 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.width

    def blocks(self, rows: int | None = None) -> Iterator[np.ndarray]:
        """(rows, width), float32: part after part, or at most so many rows at a time, whatever part they lie in."""
        for part in self.parts:
            step = max(1, len(part.rows)) if rows is None else rows
            for start in range(0, len(part.rows), step):
                yield _as_float32(part.numbers[part.rows[start : start + step]])

    def numpy(self, generated: bool = False) -> np.ndarray:
        """(rows, width), float32; with `generated`, only the rows that predict a generated token."""
        if generated:
            return self.where(self.frame["generated"].to_numpy()).numpy()
        return np.concatenate([np.empty((0, self.width), np.float32), *self.blocks()])

    def torch(self, generated: bool = False) -> Tensor:
        """The same as a tensor on the CPU."""
        import torch

        return torch.from_numpy(self.numpy(generated))

    def where(self, chosen: np.ndarray) -> Residuals:
        """The rows that are chosen, (rows,) bool; nothing is read."""
        chosen = np.asarray(chosen)
        if chosen.dtype != bool or chosen.shape != (len(self),):
            raise InputError(f"rows are chosen by {len(self)} truth values, not by {chosen.shape} of {chosen.dtype}.")
        cuts = np.cumsum([len(part.rows) for part in self.parts])[:-1]
        parts = (
            ResidualPart(part.rows[mine], part.numbers)
            for part, mine in zip(self.parts, np.split(chosen, cuts), strict=True)
        )
        return Residuals(self.layer, self.frame[chosen].reset_index(drop=True), tuple(parts))

    def within(self, rows: pd.DataFrame) -> Residuals:
        """Those of some rows, with what is known of them in `frame`. rows: indexed by (prompt, position)."""
        keys = pd.MultiIndex.from_frame(self.frame[["prompt", "position"]])
        mine = keys.isin(rows.index)
        return Residuals(self.layer, rows.loc[keys[mine]].reset_index(), self.where(mine).parts)

    def between(self, prompt: int, start: int, end: int) -> np.ndarray:
        """(rows, width), float32: of a prompt, at positions from start up to before end, in their order."""
        position = self.frame["position"].to_numpy()
        rows = np.flatnonzero((self.frame["prompt"].to_numpy() == prompt) & (position >= start) & (position < end))
        return self.take(rows[np.argsort(position[rows], kind="stable")])

    def scored(self) -> Residuals:
        """The rows that predict a token of the continuation."""
        return self.where(self.frame["generated"].to_numpy())

    def take(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """(places, width), float32: these rows, in any order; the others stay on disk."""
        places = np.asarray(places, dtype=np.int64)
        if len(places) and not -len(self) <= places.min() <= places.max() < len(self):
            raise IndexError(f"rows {places.min()}..{places.max()} of {len(self)} residuals")
        places = places % max(1, len(self))
        ends = np.cumsum([len(part.rows) for part in self.parts])
        of = np.searchsorted(ends, places, side="right")
        found = np.empty((len(places), self.width), dtype=np.float32)
        for number in np.unique(of).tolist():
            part, mine = self.parts[number], of == number
            found[mine] = _as_float32(part.numbers[part.rows[places[mine] - (ends[number] - len(part.rows))]])
        return found

    def dataset(self, labels: Any = None) -> Dataset:
        """A `torch.utils.data.Dataset` of rows, (width,) float32 each; with labels, (rows,), of (row, label) pairs.

        It reads a row when it is asked for, whole batches at once, and goes to a DataLoader's workers as a file's name.
        """
        return _dataset(self, None if labels is None else np.asarray(labels))

    def __getitem__(self, place: int) -> np.ndarray:
        return self.take([place])[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        whole = self.numpy()
        return whole if dtype is None else whole.astype(dtype)

    def __repr__(self) -> str:
        return f"Residuals(layer {self.layer}: {len(self)} positions x {self.width})"

    def __getstate__(self) -> dict[str, Any]:
        """Mapped numbers travel as the place where they lie."""
        return {**self.__dict__, "parts": tuple((part.rows, _place(part.numbers)) for part in self.parts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = tuple(ResidualPart(rows, _at(place)) for rows, place in state["parts"])
        self.__dict__.update(state | {"parts": parts})


def read_residuals(folder: Path, parts: int, layer: int) -> Residuals:
    """All residuals that a run kept of a layer; `frame` has the prompt and position of each row."""
    frames, found = [], []
    for part in range(parts):
        tensors = _mapped(path := folder / f"residuals-{part:05d}.safetensors")
        _check_shard(tensors, layer, path)
        frames.append(pd.DataFrame({name: np.array(tensors[name]) for name in ("prompt", "position")}))
        found.append(ResidualPart(np.arange(len(frames[-1])), tensors[f"layer_{layer}"]))
    return Residuals(layer, pd.concat(frames, ignore_index=True), tuple(found))


def _check_shard(tensors: dict[str, np.ndarray], layer: int, path: Path) -> None:
    """Each row of the layer has its prompt and its position. Raises InputError."""
    try:
        prompt, position, numbers = (tensors[name] for name in ("prompt", "position", f"layer_{layer}"))
        whole = prompt.dtype == position.dtype == _DTYPES["I32"] and prompt.shape == position.shape == numbers.shape[:1]
    except KeyError:
        whole, numbers = False, np.empty(0)
    if not whole or numbers.ndim != 2:
        raise InputError(f"{path} does not hold rows of layer {layer} with their places.", "Trace again with --resume.")


def kept_rows(keys: Mapping[str, np.ndarray], rows: str, share: float, seed: int) -> np.ndarray:
    """(rows,) bool: whose residuals are kept. Nothing but a row's own prompt and position decides of a share."""
    chosen = keys["output"] >= 0 if rows == "scored" else np.ones(len(keys["output"]), dtype=bool)
    if share < 1:
        for prompt in np.unique(keys["prompt"]).tolist():
            here = keys["prompt"] == prompt
            at = keys["position"][here]
            drawn = np.random.default_rng((abs(seed), prompt)).random(int(at.max()) + 1)
            chosen[here] &= drawn[at] < share
    return chosen


def shard_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{tensor: its shape} of a file of residuals. Raises InputError where it cannot be read as one."""
    return {name: numbers.shape for name, numbers in _mapped(path).items()}


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped: eight bytes of a length, a header in JSON, and the numbers."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header = parse_json(file.read(min(length, size)).decode("utf-8"), str(path))
        header.pop("__metadata__", None)
        return {name: _at((str(path), *entry.place(8 + length, size)))
                for name, entry in _HEADER.validate_python(header).items()}  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its header"
        raise InputError(f"{path} cannot be read as residuals: {where}: {first['msg']}.", _MADE_ANEW) from None
    except (InputError, OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as residuals: {error}.", _MADE_ANEW) from None


def _at(place: Any) -> np.ndarray:
    """Numbers by where they lie: (path, offset, dtype, shape); or themselves, when they lie in no file."""
    if isinstance(place, np.ndarray):
        return place
    path, offset, dtype, shape = place
    if 0 in shape:
        return np.empty(shape, dtype)  # nothing cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _place(numbers: np.ndarray) -> Any:
    if not isinstance(numbers, np.memmap):
        return numbers
    return str(numbers.filename), numbers.offset, numbers.dtype, numbers.shape


def _as_float32(numbers: np.ndarray) -> np.ndarray:
    """bfloat16 comes as the upper half of a float32's bits."""
    if numbers.dtype == _DTYPES["BF16"]:
        return (numbers.astype("<u4") << 16).view("<f4")
    return np.array(numbers, dtype=np.float32)


def _dataset(residuals: Residuals, labels: np.ndarray | None) -> Dataset:
    if labels is not None and len(labels) != len(residuals):
        raise InputError(f"{len(labels)} labels were given for {len(residuals)} residuals.", "Give one for each row.")
    return _dataset_class()(residuals, labels)


@cache
def _dataset_class() -> Any:
    """Made when it is first asked for: this room is imported without torch."""
    import torch
    from torch.utils.data import Dataset

    class ResidualDataset(Dataset):
        """Rows of residuals, and their labels where there are any."""

        def __init__(self, residuals: Residuals, labels: np.ndarray | None) -> None:
            self.residuals = residuals
            self.labels = None if labels is None else torch.tensor(labels)

        def __len__(self) -> int:
            return len(self.residuals)

        def __getitem__(self, place: int) -> Any:
            return self.__getitems__([place])[0]

        def __getitems__(self, places: list[int]) -> list[Any]:
            """What a DataLoader calls for a batch: one read of each part."""
            rows = list(torch.from_numpy(self.residuals.take(places)))
            return rows if self.labels is None else list(zip(rows, self.labels[places], strict=True))

        def __reduce__(self) -> Any:
            return _dataset, (self.residuals, None if self.labels is None else self.labels.numpy())

    return ResidualDataset
