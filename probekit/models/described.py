"""A model by its description alone: the parts that its configuration makes, with shapes and without numbers.

For arithmetic about models that are not at hand. Nothing is fetched, and no weight is read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from probekit.errors import InputError
from probekit.foreign.json import read_object
from probekit.models.anatomy import Anatomy, anatomy
from probekit.models.checkpoint import check_family, first_line
from probekit.models.configuration import check_configuration, check_values
from probekit.models.loaded import silent
from probekit.models.synthetic import SHAPES

SIZES = {
    "layers": "num_hidden_layers", "width": "hidden_size", "inner": "intermediate_size",
    "heads": "num_attention_heads", "key_value_heads": "num_key_value_heads", "head_dim": "head_dim",
    "vocabulary": "vocab_size", "context": "max_position_embeddings",
}  # fmt: skip
"""Words of a description, and what `config.json` calls them."""
_EXAMPLE = "llama:layers=80,width=8192,inner=28672,heads=64,key_value_heads=8,vocabulary=128256"


class Described(NamedTuple):
    """A model without numbers: every weight of its parts is on torch's meta device."""

    name: str
    anatomy: Anatomy


def described(reference: str | Path) -> Described:
    """The model that a name in `SHAPES`, a folder or file with a `config.json`, or a text like
    "llama:layers=80,width=8192,.." describes; sizes that the text leaves out are its family's own.

    Raises InputError for what is none of these, and for sizes that make no model.

    Examples
    --------
    >>> from probekit.models.described import described
    >>> model = described("llama:layers=80,width=8192,inner=28672,heads=64,key_value_heads=8,vocabulary=128256")
    >>> f"{model.anatomy.parameters:,}"
    '70,553,706,496'
    """
    text, path = str(reference), Path(os.path.expanduser(reference))
    try:
        with silent(), torch.device("meta"):
            if text in SHAPES:
                return Described(text, anatomy(AutoModelForCausalLM.from_config(SHAPES[text].config())))
            name, config = _written(path) if os.path.exists(path) else _told(text)
            kind = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
            made = AutoConfig.for_model(config["model_type"], **kind)
            return Described(name, anatomy(AutoModelForCausalLM.from_config(made)))
    except InputError:
        raise
    except Exception as error:  # whatever transformers makes of sizes that do not go together
        raise InputError(f"{text} describes no model: {first_line(error)}.", f"As an example: {_EXAMPLE}.") from error


def _written(path: Path) -> tuple[str, dict[str, Any]]:
    """A model's name and its configuration, from a folder or a file."""
    file = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise InputError(f"{path} describes no model: it has no config.json.", f"As an example: {_EXAMPLE}.")
    config = read_object(file)
    check_configuration(config, file)
    check_family(config, str(path), decoded=False)
    return path.resolve().name if os.path.isdir(path) else path.stem, config


def _told(text: str) -> tuple[str, dict[str, Any]]:
    """The same, from a text: a family and its sizes."""
    family, colon, sizes = text.partition(":")
    if not colon:
        raise InputError(
            f"{text} describes no model: there is no such folder or file, and the shapes are {', '.join(SHAPES)}.",
            f"Give a config.json, or sizes: {_EXAMPLE}.",
        )
    config: dict[str, Any] = {"model_type": family}
    for size in sizes.split(","):
        found = re.fullmatch(r"\s*(\w+)=(\d{1,12})\s*", size)
        if found is None or found[1] not in SIZES:
            raise InputError(
                f"{size.strip()!r} is no size of a model: expected {', '.join(f'{word}=N' for word in SIZES)}.",
                f"As an example: {_EXAMPLE}.",
            )
        config[SIZES[found[1]]] = int(found[2])
    check_family(config, family, decoded=False)
    check_values(config, text)
    return family, config
