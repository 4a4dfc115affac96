"""The models that ship in the package. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from probekit.foreign.json import read_object
from probekit.models.weight_files import BUNDLED, config_of

TALES = ("tales-untied", "tales-tied", "tales-layerskip")
DRAFT = "tales-draft"


@dataclass(frozen=True)
class BundledModel:
    """A model that ships in the package. `parameters`: distinct weights."""

    name: str
    path: Path
    layers: int
    tied: bool
    parameters: int
    says: str
    trained_on: str

    def to_json(self) -> dict[str, Any]:
        """One entry of `probekit models --json`."""
        return {**asdict(self), "path": str(self.path)}


def bundled_models() -> list[BundledModel]:
    """The models that this installation ships, the ones to compare first, the draft model last."""
    return [_bundled(BUNDLED / name) for name in (*TALES, DRAFT) if (BUNDLED / name / "config.json").is_file()]


def _bundled(folder: Path) -> BundledModel:
    config = config_of(folder)
    record_file = folder / "training.json"
    record = read_object(record_file) if record_file.is_file() else {}
    seen = f", {record['tokens_seen'] / 1e6:.1f} million tokens" if "tokens_seen" in record else ""
    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        parameters = sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return BundledModel(
        name=folder.name,
        path=folder,
        layers=config["num_hidden_layers"],
        tied=bool(config.get("tie_word_embeddings")),
        parameters=parameters,
        says=record.get("says", ""),
        trained_on=f"English fairy and folk tales in the public domain (Project Gutenberg){seen}",
    )
