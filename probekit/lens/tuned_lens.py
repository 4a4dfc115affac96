"""Checkpoints of tuned lenses (Belrose et al., arXiv 2303.08112), in the format of the package `tuned-lens`.

A folder with config.json and params.pt. The parameters are a translator a layer, "{l}.weight", (width, width), and
"{l}.bias", (width,), of l = 0 (the embedding) to L - 1; the lens is head(norm(h[l] + weight h[l] + bias)). That is what
an exit head is here, so that a published lens drafts, and fitted heads are read elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.files import atomic_bytes, atomic_text, make_folder
from probekit.foreign.json import read_json
from probekit.lens.torch_files import read_tensors

CONFIG, PARAMETERS = "config.json", "params.pt"
TYPE = "linear_tuned_lens"


class Translator(NamedTuple):
    """weight: (width, width), the map less the identity. bias: (width,)."""

    weight: Tensor
    bias: Tensor


def read_tuned_lens(folder: str | Path) -> dict[int, Translator]:
    """{layer: its translator}, float32 on the CPU, layers 0..L-1. Nothing in the file is run: tensors only are read.

    Raises InputError for a folder that is no tuned lens, or whose tensors are not those that its config promises.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not all(_counts(config.get(key)) for key in ("d_model", "num_hidden_layers")):
        raise InputError(f"{folder / CONFIG} is no tuned lens's: it has no d_model and num_hidden_layers.")
    if config.get("lens_type", TYPE) != TYPE:
        raise InputError(f"{folder} holds a lens of type {config['lens_type']!r}; expected {TYPE!r}.")
    width, depth, biased = config["d_model"], config["num_hidden_layers"], bool(config.get("bias", True))
    state = read_tensors(folder / PARAMETERS, "a tuned lens", str(folder / PARAMETERS))
    if not _is_tensors(state) or depth > len(state):  # before a name is made for each layer that is promised
        raise InputError(f"{folder / PARAMETERS} is not the lens of {depth} layers that {CONFIG} promises.")
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.weight": (width, width) for layer in range(depth)}
    if biased:
        shapes |= {f"{layer}.bias": (width,) for layer in range(depth)}
    found = {str(name): tuple(each.shape) for name, each in state.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise InputError(
            f"{folder / PARAMETERS} is not the lens of {depth} layers of width {width} that {CONFIG} promises: "
            f"{wrong[0]!r} is of shape {found.get(wrong[0])}, expected {shapes.get(wrong[0])}."
        )
    none = torch.zeros(width)
    return {
        layer: Translator(state[f"{layer}.weight"].float(), state[f"{layer}.bias"].float() if biased else none)
        for layer in range(depth)
    }


def write_tuned_lens(folder: str | Path, translators: Mapping[int, Translator], name: str, depth: int) -> Path:
    """Write translators, {layer: translator}, as a tuned lens of the model `name` of `depth` layers.

    Layers without one get zeros: the plain lens. Raises InputError for layers that are not among 0..depth-1.
    """
    if not translators or any(layer not in range(depth) for layer in translators):
        raise InputError(f"a tuned lens has translators of layers 0..{depth - 1}, not of {sorted(translators)}.")
    width = len(next(iter(translators.values())).bias)
    plain = Translator(torch.zeros(width, width), torch.zeros(width))
    state = {}
    for layer in range(depth):
        weight, bias = translators.get(layer, plain)
        state[f"{layer}.weight"], state[f"{layer}.bias"] = (each.detach().float().cpu() for each in (weight, bias))
    config = {
        "base_model_name_or_path": name, "d_model": width, "num_hidden_layers": depth, "bias": True,
        "base_model_revision": None, "unembed_hash": None, "lens_type": TYPE,
    }  # fmt: skip
    folder = make_folder(folder)
    buffer = BytesIO()
    torch.save(state, buffer)
    atomic_bytes(folder / PARAMETERS, buffer.getvalue())
    atomic_text(folder / CONFIG, json.dumps(config) + "\n")
    return folder


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_tensors(state: object) -> bool:
    return isinstance(state, dict) and all(isinstance(each, Tensor) for each in state.values())
