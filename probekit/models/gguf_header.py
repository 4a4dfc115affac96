"""The header of a GGUF file: its settings and the list of its tensors, without a byte of their data.

Written for files from strangers: nothing is allocated, and no loop runs, on a count that the file cannot hold.
Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from probekit.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors' data, where the file names no other
MOST_DIMENSIONS = 4  # of ggml
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")


class GGUFTensor(NamedTuple):
    """shape: as ggml has it, the fastest dimension first. type: a number of ggml's. start, bytes: in the file."""

    shape: tuple[int, ...]
    type: int
    start: int
    bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """values: numbers, truths and strings by their keys. counts: of each array, how many values it has."""

    path: Path
    values: Mapping[str, Any]
    counts: Mapping[str, int]
    tensors: Mapping[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.values["general.architecture"])

    def setting(self, name: str) -> Any:
        """A value of the architecture, `qwen2.block_count` for instance; None where the file has none."""
        return self.values.get(f"{self.architecture}.{name}")

    def numbers(self, name: str) -> np.ndarray:
        """The data of a float32 tensor, flat."""
        tensor = self.tensors[name]
        if tensor.type != 0:
            raise InputError(f"{self.path} holds {name} in a type that is not float32.")
        return np.fromfile(self.path, "<f4", prod(tensor.shape), offset=tensor.start)


def read_header(path: Path) -> GGUFHeader:
    """Read and check a header.

    Raises InputError for a file that is no GGUF, of another version or byte order, damaged, or cut short.
    """
    try:
        with path.open("rb") as stream:
            if (magic := stream.read(4)) != MAGIC:
                raise InputError(f"{path} is no GGUF file: it begins with {magic!r}.")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as file:
                return _parsed(path, file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (struct.error, UnicodeDecodeError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path} cannot be read as GGUF: its header is damaged ({error}).") from error


def _parsed(path: Path, file: mmap.mmap) -> GGUFHeader:
    version, tensor_count, value_count = struct.unpack_from("<IQQ", file, 4)
    if version not in VERSIONS:
        other = "of the other byte order" if version & 0xFFFF == 0 else f"of version {version}"
        raise InputError(f"{path} is a GGUF file {other}; versions {VERSIONS[0]} and {VERSIONS[1]} are read.",
                         "Convert it again with a current llama.cpp.")  # fmt: skip
    reader = _Reader(file, 24)
    reader.check(value_count, 13)  # at least a length, an empty key, a type and one byte
    values: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for _ in range(value_count):
        key, kind = reader.string(), reader.number("<I")
        if kind == _ARRAY:
            counts[key] = reader.skip_array()
        else:
            values[key] = reader.string() if kind == _STRING else reader.number(_NUMBERS[kind])
    if not isinstance(values.get("general.architecture"), str):
        raise InputError(f"{path} names no architecture.", "Take a GGUF file that llama.cpp reads.")
    reader.check(tensor_count, 24)
    entries = [reader.tensor() for _ in range(tensor_count)]
    if (alignment := int(values.get("general.alignment", ALIGNMENT))) < 1:
        raise ValueError(f"an alignment of {alignment}")
    begin = -(-reader.at // alignment) * alignment
    tensors = {name: GGUFTensor(shape, kind, begin + offset, _bytes(path, name, shape, kind))
               for name, shape, kind, offset in entries}  # fmt: skip
    end = max((tensor.start + tensor.bytes for tensor in tensors.values()), default=0)
    if end > len(file):
        raise InputError(
            f"{path} is cut short: its tensors reach to byte {end:,}, and it has {len(file):,}.", "Fetch it again."
        )
    return GGUFHeader(path, values, counts, tensors)


def _bytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise InputError(
            f"{path} holds {name} in the quantisation {kind}, which the gguf package does not know.",
            "Update it (pip install -U gguf), or take another file of this model.",
        ) from None
    return prod(shape) // numbers * size


class _Reader:
    """A place in the file that moves on; every length is held against what is left."""

    def __init__(self, file: mmap.mmap, at: int) -> None:
        self.file, self.at, self.size = file, at, len(file)

    def check(self, count: int, width: int) -> None:
        if count * width > self.size - self.at:
            raise ValueError(f"{count:,} entries at byte {self.at:,} of {self.size:,}")

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.file, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        self.check(length, 1)
        text = self.file[self.at : self.at + length].decode("utf-8")
        self.at += length
        return text

    def skip_array(self) -> int:
        """Go past an array; returns how many values it has."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _NUMBERS:
            width = struct.calcsize(_NUMBERS[kind])
            self.check(count, width)
            self.at += count * width
            return count
        if kind != _STRING:
            raise ValueError(f"an array of type {kind}")
        self.check(count, 8)
        at, file, size, length_at = self.at, self.file, self.size, _LENGTH.unpack_from
        for _ in range(count):
            at += 8 + length_at(file, at)[0]
            if at > size:
                raise ValueError(f"a string that ends at byte {at:,} of {size:,}")
        self.at = at
        return count

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))
        return name, shape, self.number("<I"), self.number("<Q")
