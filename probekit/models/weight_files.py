"""The files that hold a checkpoint's weights: which there are, and their hash. Nothing here needs torch.

Weights come from safetensors or GGUF only, never from a pickle.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from probekit.errors import InputError
from probekit.foreign.json import read_json

BUNDLED = Path(__file__).parent / "bundled"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SINGLE, INDEX = "model.safetensors", ".safetensors.index.json"
FULL_HASH_BYTES = 4 * 10**9
AGAIN = "Fetch it again."
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def hash_files(files: list[Path]) -> str:
    """`scheme:hex` of weight files; the schemes are described at `Loaded`."""
    digest = hashlib.sha256()
    files = sorted(files, key=lambda path: path.name)
    if sum(path.stat().st_size for path in files) <= FULL_HASH_BYTES:
        for path in files:
            with path.open("rb") as stream:
                while block := stream.read(2**22):
                    digest.update(block)
        return f"sha256:{digest.hexdigest()}"
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for part in range(64):
                stream.seek(max(0, size - 2**20) * part // 63)
                digest.update(stream.read(2**20))
    return f"sha256-sampled:{digest.hexdigest()}"


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter, as peft saves it."""
    return [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]


def config_of(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} is no configuration: it holds a {type(config).__name__}.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a checkpoint folder; those of an index may be missing.

    As in transformers, a file or index that the configuration names (`transformers_weights`) comes first, then
    model.safetensors, then the index. Raises InputError for names of files elsewhere.
    """
    named = named_weights(folder)
    if named is not None and not named.endswith(INDEX):
        return [folder / named]
    if named is None and (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / (named or f"{SINGLE}{INDEX.removeprefix('.safetensors')}")
    if named is not None or index.is_file():
        try:
            names = set(read_json(index)["weight_map"].values())
        except (LookupError, TypeError, AttributeError):
            raise InputError(f"{index} is no index: it has no `weight_map` of tensors to files.", AGAIN) from None
        if strange := sorted((name for name in names if not _plain(name)), key=str):
            raise InputError(
                f"{index} names a file elsewhere, or none that holds weights: {strange[0]!r}.",
                "Only .safetensors files beside it are read.",
            )
        if not names:
            raise InputError(f"{index} names no file.")
        return [folder / name for name in sorted(names)]
    if shards := sorted(path.name for path in folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds {len(shards)} safetensors file{'s' if len(shards) > 1 else ''} ({shards[0]}, ..), and "
            "neither model.safetensors nor an index of them.",
            "Copy model.safetensors.index.json from where they came from, or rename a single file.",
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{folder} holds its weights only as a pickle ({pickles[0]}), which can run code when it is read.",
            "Convert it to safetensors, or take a revision that has them.",
        )
    raise InputError(f"{folder} holds no weights: it has no model.safetensors.")


def named_weights(folder: Path) -> str | None:
    """The file of weights, or the index of several, that a configuration names. Raises InputError for one elsewhere."""
    path = folder / "config.json"
    named = config_of(folder).get("transformers_weights") if path.is_file() else None
    if named is None:
        return None
    if not _plain(named) and not (isinstance(named, str) and named.endswith(INDEX) and _beside(named)):
        raise InputError(
            f"{path} names weights elsewhere, or none that are read: transformers_weights is {named!r}.",
            "Only a .safetensors file, or an index of some, beside it is read.",
        )
    return str(named)


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and _beside(name)


def _beside(name: str) -> bool:
    """Whether a name is that of a file in the same folder, on any system."""
    return not set(name) & set("/\\:\0") and not name.startswith(".") and name.isprintable()
