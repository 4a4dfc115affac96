"""Dequantised copies of GGUF files: what was read once, as a folder that is read in seconds.

A copy appears whole or not at all (written beside its place, then renamed), is held against the checksums that it
carries before it is used, and is made again where it is damaged. Without room for one, nothing is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from probekit.errors import InputError
from probekit.foreign.json import read_object
from probekit.models.checkpoint import first_line

SCHEMA = "probekit/gguf-copy/1"
RECORD = "copy.json"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_settings.json"
PARTIAL = "partial-"
ABANDONED_S = 86_400  # a copy that somebody began to write so long ago will not be finished
BLOCK = 2**22
SPARE = 64 * 2**20  # bytes that stay free on the disk


_chosen: ContextVar[str | Path | bool | None] = ContextVar("cache", default=None)


@contextmanager
def caching(cache: str | Path | bool | None) -> Iterator[None]:
    """Within it this is the cache of every load that names none: what `--cache` is to a command."""
    before = _chosen.set(cache)
    try:
        yield
    finally:
        _chosen.reset(before)


def cache_folder(cache: str | Path | bool | None) -> Path | None:
    """The folder that keeps copies; None: none are kept.

    cache: a folder; None: $XDG_CACHE_HOME/probekit, or ~/.cache/probekit; False: keep none.
    """
    cache = _chosen.get() if cache is None else cache
    if cache is False:
        return None
    if cache is not None and cache is not True:
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "probekit"
    except RuntimeError:  # a user without a home
        return None


@dataclass(frozen=True)
class GGUFCopy:
    """The place of one copy: of these weights, in this dtype, as this version of transformers reads them."""

    folder: Path
    record: dict[str, Any]

    @property
    def whole(self) -> bool:
        """Whether the copy is there, and every byte of it as it was written."""
        try:
            record = read_object(self.folder / RECORD)
            files = record.pop("files")
            return record == self.record and all(_checksum(self.folder / name) == was for name, was in files.items())
        except (InputError, OSError, LookupError, TypeError, AttributeError):
            return False

    def keep(self, model: Any, tokenizer: Any) -> str | None:
        """Write the copy. Returns why there is none, where it cannot be written."""
        needed = sum(weight.numel() * weight.element_size() for weight in model.parameters()) + SPARE
        root, partial = self.folder.parent, None
        try:
            root.mkdir(parents=True, exist_ok=True)
            _clear(root)
            if (free := shutil.disk_usage(root).free) < needed:
                return f"{root} has {free / 1e6:,.0f} MB left, and it needs {needed / 1e6:,.0f} MB"
            partial = Path(tempfile.mkdtemp(dir=root, prefix=PARTIAL))
            model.save_pretrained(partial)
            if not _write_tokenizer(partial, tokenizer):
                return "its tokenizer would not come back the same"
            files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
            (partial / RECORD).write_text(json.dumps({**self.record, "files": files}), encoding="utf-8")
            self.discard()
            partial.rename(self.folder)
        except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
            if not self.whole:  # otherwise another process was faster
                return f"{root} cannot be written: {getattr(error, 'strerror', None) or first_line(error)}"
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
        return None

    def discard(self) -> None:
        """Take away what lies in this copy's place, at once for every reader."""
        if self.folder.exists():
            aside = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=PARTIAL))
            self.folder.rename(aside / "old")
            shutil.rmtree(aside, ignore_errors=True)


def copy_of(root: Path, weights_hash: str, source: Path, dtype: torch.dtype) -> GGUFCopy:
    """Where the copy of a file belongs. A hash of samples misses some changes, so the file's time goes with it."""
    scheme, _, digits = weights_hash.partition(":")
    record = {
        "schema": SCHEMA,
        "weights_hash": weights_hash,
        "modified": None if scheme == "sha256" else source.stat().st_mtime_ns,
        "dtype": str(dtype).removeprefix("torch."),
        "transformers": version("transformers"),
    }
    name = "-".join(str(part) for part in (digits, record["modified"], record["dtype"], record["transformers"]) if part)
    return GGUFCopy(root / "gguf" / name, record)


def _clear(root: Path) -> None:
    """Remove what processes that were killed left half written."""
    for left in root.glob(f"{PARTIAL}*"):
        if time.time() - left.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


def _checksum(path: Path) -> list[int]:
    """[bytes, CRC-32]: it finds damage; against forgery the folder has its owner."""
    found = size = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            found, size = zlib.crc32(block, found), size + len(block)
    return [size, found]


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a copy, as a plain one: the class that transformers has for a family would build it anew."""
    settings = read_object(folder / SETTINGS)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER), name_or_path=str(folder), **settings)


def _write_tokenizer(folder: Path, tokenizer: Any) -> bool:
    """Write it, and say whether it comes back the same."""
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    text = json.dumps(_settings(tokenizer), ensure_ascii=False)
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    again = read_tokenizer(folder)
    same = again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    return same and _settings(again) == _settings(tokenizer) and again.all_special_ids == tokenizer.all_special_ids


def _settings(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer has beside its backend."""
    return {
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")},
        "extra_special_tokens": [str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or ()],
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "model_input_names": list(tokenizer.model_input_names),
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
    }
