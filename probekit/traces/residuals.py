"""Residuals that a run kept: positions x width, with the prompt and position of each row beside them.

They lie in one safetensors file a part. The numbers are mapped, not read: what is never looked at takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.errors import InputError
from probekit.foreign.json import parse_json

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True, eq=False)
class Residuals:
    """The residual stream after one layer.

    Parameters
    ----------
    layer: 0 is the embedding, L the last, before the final norm.
    frame: a row for each position: prompt, position, output (below 0 inside the prompt), generated.
    parts: (rows of the part that belong to this trace, its mapped numbers (rows, width)), in the order of `frame`.
    """

    layer: int
    frame: pd.DataFrame
    parts: tuple[tuple[np.ndarray, np.ndarray], ...]

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def width(self) -> int:
        return self.parts[0][1].shape[1]

    def blocks(self) -> Iterator[np.ndarray]:
        """(rows, width), float32, part after part: for what does not fit into memory at once."""
        for rows, numbers in self.parts:
            yield _as_float32(numbers[rows])

    def numpy(self, generated: bool = False) -> np.ndarray:
        """(rows, width), float32; with `generated`, only the rows that predict a generated token."""
        whole = np.concatenate(list(self.blocks()))
        return whole[self.frame["generated"].to_numpy()] if generated else whole

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        whole = self.numpy()
        return whole if dtype is None else whole.astype(dtype)

    def __repr__(self) -> str:
        return f"Residuals(layer {self.layer}: {len(self)} positions x {self.width})"


def read_residuals(folder: Path, parts: int, layer: int, rows: pd.DataFrame) -> Residuals:
    """The residuals of some rows. rows: indexed by (prompt, position), with what is known of them."""
    frames, found = [], []
    for part in range(parts):
        tensors = _mapped(folder / f"residuals-{part:05d}.safetensors")
        keys = pd.MultiIndex.from_arrays([tensors["prompt"], tensors["position"]], names=["prompt", "position"])
        wanted = np.flatnonzero(keys.isin(rows.index))
        if len(wanted):
            frames.append(rows.loc[keys[wanted]].reset_index())
            found.append((wanted, tensors[f"layer_{layer}"]))
    return Residuals(layer, pd.concat(frames, ignore_index=True), tuple(found))


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped: eight bytes of a length, a header in JSON, and the numbers."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, path.stat().st_size)).decode("utf-8"), str(path))
        start = 8 + length
        header.pop("__metadata__", None)
        return {
            name: np.memmap(
                path, dtype=_DTYPES[entry["dtype"]], mode="r", offset=start + entry["data_offsets"][0],
                shape=tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }  # fmt: skip
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as residuals: {error}.", "Trace again with --resume.") from None


def _as_float32(numbers: np.ndarray) -> np.ndarray:
    """bfloat16 comes as the upper half of a float32's bits."""
    if numbers.dtype == _DTYPES["BF16"]:
        return (numbers.astype("<u4") << 16).view("<f4")
    return np.asarray(numbers, dtype=np.float32)
