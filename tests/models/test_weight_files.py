"""What is hashed is what is loaded: the files of weights as transformers finds them, and no others."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from probekit.errors import InputError
from probekit.models.loaded import load
from probekit.models.weight_files import weight_files

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def other_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor * 0.5 for name, tensor in load_file(folder / "model.safetensors").items()}


def index_of(folder: Path, names: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))


def named_in_config(folder: Path, name: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))


def assert_hashed_is_loaded(folder: Path, expected: dict[str, torch.Tensor], *files: str) -> None:
    loaded = load(folder, device="cpu")
    found = dict(loaded.model.named_parameters())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    digest = sha256(b"".join((folder / name).read_bytes() for name in sorted(files)))
    assert loaded.weights_hash == f"sha256:{digest.hexdigest()}"


def test_a_single_file_beside_an_index(folder):
    decoy = other_weights(folder)
    save_file(decoy, folder / "decoy.safetensors", metadata={"format": "pt"})
    index_of(folder, dict.fromkeys(decoy, "decoy.safetensors"))
    assert_hashed_is_loaded(folder, load_file(folder / "model.safetensors"), "model.safetensors")


def test_an_index_of_shards_beside_other_files(folder):
    halves = list(other_weights(folder).items())
    shards = {"b.safetensors": dict(halves[:9]), "a.safetensors": dict(halves[9:])}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index_of(folder, {tensor: name for name, tensors in shards.items() for tensor in tensors})
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    assert_hashed_is_loaded(folder, dict(halves), "a.safetensors", "b.safetensors")


def test_the_file_that_a_configuration_names(folder):
    """transformers takes it before model.safetensors, which is a decoy then."""
    named = other_weights(folder)
    save_file(named, folder / "named.safetensors", metadata={"format": "pt"})
    named_in_config(folder, "named.safetensors")
    assert_hashed_is_loaded(folder, named, "named.safetensors")


def test_the_index_that_a_configuration_names(folder):
    named = other_weights(folder)
    save_file(named, folder / "shard.safetensors", metadata={"format": "pt"})
    index_of(folder, dict.fromkeys(named, "shard.safetensors"))
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    named_in_config(folder, "other.safetensors.index.json")
    assert_hashed_is_loaded(folder, named, "shard.safetensors")


STRANGE = (
    "../elsewhere/w.safetensors", "/etc/w.safetensors", "sub/w.safetensors", "..", ".", "", ".w.safetensors",
    "..\\elsewhere\\w.safetensors", "C:w.safetensors", "w.bin", "w.safetensors\0", "w\n.safetensors", 5, None, ["w"],
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in STRANGE if not isinstance(name, list)], ids=repr)
def test_an_index_of_files_elsewhere_is_refused(folder, name):
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "w.safetensors", elsewhere)
    index_of(folder, {"model.norm.weight": "w.safetensors", "lm_head.weight": name})
    with pytest.raises(InputError, match="names a file elsewhere, or none that holds weights"):
        load(folder)


@pytest.mark.parametrize("name", [name for name in STRANGE if name is not None], ids=repr)
def test_a_configuration_that_names_weights_elsewhere_is_refused(folder, name):
    named_in_config(folder, name)
    with pytest.raises(InputError, match="transformers_weights is"):
        load(folder)


def test_an_index_that_names_nothing_is_refused(folder):
    (folder / "model.safetensors").unlink()
    index_of(folder, {})
    with pytest.raises(InputError, match="names no file"):
        weight_files(folder)
