"""Exit heads: an affine map of an exit's residual, put before the model's own norm and head when drafting.

Fitted in closed form, in one pass over any amount of text: the sums that ridge regression needs have a fixed size.
(Linear maps between layers for early exit: Yom Din et al., arXiv 2303.09435.)
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from probekit.errors import InputError
from probekit.files import atomic_bytes
from probekit.foreign.json import parse_json
from probekit.foreign.text import read_bytes
from probekit.hooks.capture import Capture
from probekit.lens.jacobian_lens import BEGINS, read_jacobian_lens
from probekit.lens.tuned_lens import Translator, read_tuned_lens, write_tuned_lens
from probekit.models.anatomy import Anatomy, anatomy

SCHEMA = "probekit/exit-heads/1"
RIDGE = 1e-2  # relative to the mean square of the residual's median component
_NAME = re.compile(r"([1-9]\d{0,4})\.(?:change|offset)")


@dataclass(frozen=True, eq=False)
class ExitHead:
    """residual + residual @ change.T + offset: a guess of the last residual from that of an exit.

    change: (width, width), the map less the identity, so that zeros are no head at all. offset: (width,).
    """

    change: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        width = len(self.offset)
        if self.offset.shape != (width,) or self.change.shape != (width, width):
            raise InputError(
                f"an exit head has a change (width, width) and an offset (width,), not {tuple(self.change.shape)} "
                f"and {tuple(self.offset.shape)}."
            )
        if not (self.change.isfinite().all() and self.offset.isfinite().all()):
            raise InputError("an exit head with numbers that are not finite cannot be used.", "Fit it anew.")

    def __call__(self, residual: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the residual's dtype; the product is in float32."""
        wide = residual.float()
        return (wide + functional.linear(wide, self.change.float(), self.offset.float())).to(residual.dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ExitHead:
        return ExitHead(self.change.to(device, dtype), self.offset.to(device, dtype))


class HeadFit:
    """Ridge regression of h[L] on h[E] for some exits, from sums that do not grow with the text.

    Each row counts with weight width / |h[L]|^2: the final norm divides by that length, so that an error matters in
    proportion to it, and the few tokens with huge residuals do not rule the fit. The ridge pulls the map towards the
    identity, the plain lens. Memory: `bytes`.

    Parameters
    ----------
    parts: the model's anatomy.
    exits: the exits to fit; all by default.
    """

    def __init__(self, parts: Anatomy, exits: Iterable[int] | None = None) -> None:
        self.parts = parts = anatomy(parts)
        self.exits = tuple(parts.exits if exits is None else map(parts.check_exit, exits))
        if not self.exits:
            raise InputError("there is no exit to fit a head for.")
        self.rows = 0
        width = parts.width + 1  # with a constant, for the offset
        zeros = partial(torch.zeros, dtype=torch.float64, device=parts.device)
        self._squares = {layer: zeros(width, width) for layer in self.exits}
        self._products = {layer: zeros(width, parts.width) for layer in self.exits}

    @property
    def bytes(self) -> int:
        return sum(sums.nbytes for table in (self._squares, self._products) for sums in table.values())

    @torch.no_grad()
    def add(self, residuals: Mapping[int, Tensor]) -> None:
        """Count some rows. residuals: {site: (rows, width)} of the exits and of site L."""
        last = residuals[self.parts.depth].float()
        length = torch.linalg.vector_norm(last, dim=-1, keepdim=True)
        weight = last.shape[-1] ** 0.5 / length.clamp(min=torch.finfo(torch.float32).tiny)
        for layer in self.exits:
            x = residuals[layer].float()
            wanted = (last - x) * weight
            x = torch.cat([x, torch.ones_like(x[:, :1])], -1) * weight
            self._squares[layer] += (x.T @ x).double()
            self._products[layer] += (x.T @ wanted).double()
        self.rows += len(last)

    def solve(self, ridge: float = RIDGE) -> dict[int, ExitHead]:
        """The head of each exit. ridge: relative to the mean square of the residual's median component; above 0."""
        if not 0 < ridge < math.inf:
            raise InputError(f"the ridge must exceed 0, and be finite, not {ridge}.", "Without one the fit is open.")
        if not self.rows:
            raise InputError("there are no rows to fit exit heads on.", "Add some first.")
        return {layer: self._solve(layer, ridge) for layer in self.exits}

    def _solve(self, layer: int, ridge: float) -> ExitHead:
        squares, width = self._squares[layer].clone(), self.parts.width
        penalty = ridge * squares.diagonal()[:width].median()
        squares.diagonal()[:width] += penalty  # the offset goes free
        solution = torch.linalg.solve(squares, self._products[layer])
        return ExitHead(solution[:width].T.float().contiguous(), solution[width].float())


def fit_heads(
    parts: Anatomy, batches: Iterable[Tensor], exits: Iterable[int] | None = None, *, ridge: float = RIDGE
) -> dict[int, ExitHead]:
    """Fit a head for each exit on the text of `batches`.

    batches: token ids, (texts, positions), int64, without padding; every position counts.
    """
    fit = HeadFit(parts, exits)
    parts = fit.parts
    for ids in batches:
        sites = sorted({*fit.exits, parts.depth})
        with torch.no_grad(), Capture(parts, sites) as capture:
            parts.decoder(input_ids=ids.to(parts.device), use_cache=False)
        fit.add({site: capture[site].flatten(0, 1) for site in sites})
    return fit.solve(ridge)


def check_heads(heads: Mapping[int, ExitHead], parts: Anatomy) -> dict[int, ExitHead]:
    """Return heads, {exit: head}, in ascending order and on the model's device, or raise InputError."""
    parts = anatomy(parts)
    for layer, head in heads.items():
        parts.check_exit(layer)
        if not isinstance(head, ExitHead):
            raise InputError(f"the head of exit {layer} is a {type(head).__name__}, not an ExitHead.", "Fit one.")
        if len(head.offset) != parts.width:
            raise InputError(f"the head of exit {layer} is {len(head.offset)} wide; this model is {parts.width} wide.")
    if not heads:
        raise InputError("there are no exit heads among those that were given.", "Fit some, or leave them out.")
    return {layer: heads[layer].to(parts.device) for layer in sorted(heads)}


def fingerprint(heads: Mapping[int, ExitHead]) -> str:
    """Names heads, {exit: head}, by their numbers: equal ones have equal names."""
    numbers = hashlib.sha256()
    for layer in sorted(heads):
        numbers.update(str(layer).encode())
        for tensor in (heads[layer].change, heads[layer].offset):
            numbers.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return numbers.hexdigest()[:12]


def pack_heads(heads: Mapping[int, ExitHead]) -> bytes:
    """Heads, {exit: head}, as the contents of a safetensors file."""
    tensors = {}
    for layer, head in heads.items():
        tensors[f"{layer}.change"] = head.change.contiguous()
        tensors[f"{layer}.offset"] = head.offset.contiguous()
    return save(tensors, metadata={"schema": SCHEMA})


def unpack_heads(content: bytes, parts: Anatomy, source: str = "this file") -> dict[int, ExitHead]:
    """The heads that `pack_heads` wrote, for a model: onto its device, and checked against it."""
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")  # of the header (the format's own description)
        header = parse_json(content[8 : 8 + size].decode("utf-8"), source)
    except (SafetensorError, ValueError, MemoryError) as error:
        raise InputError(f"{source} cannot be read as exit heads: {error}") from error
    schema = (header.get("__metadata__") or {}).get("schema")
    if schema != SCHEMA:
        raise InputError(f"{source} is no file of exit heads: its schema is {schema!r}, not {SCHEMA!r}.")
    layers = {int(found[1]) for name in tensors if (found := _NAME.fullmatch(name))}
    expected = {f"{layer}.{part}" for layer in layers for part in ("change", "offset")}
    if wrong := sorted(expected ^ tensors.keys()):
        what = "lacks" if wrong[0] in expected else "holds, and has no use for,"
        raise InputError(f"{source} is no file of exit heads: it {what} the tensor {wrong[0]!r}.", "Fit them anew.")
    heads = {layer: ExitHead(tensors[f"{layer}.change"], tensors[f"{layer}.offset"]) for layer in layers}
    return check_heads(heads, parts)


def save_heads(path: str | Path, heads: Mapping[int, ExitHead]) -> None:
    """Write heads, {exit: head}, to one safetensors file, whole or not at all."""
    atomic_bytes(path, pack_heads(heads))


def save_tuned_lens(folder: str | Path, heads: Mapping[int, ExitHead], parts: Anatomy, name: str) -> Path:
    """Write heads, {exit: head}, as a tuned lens of the model `name`, for `load_heads` and the package `tuned-lens`."""
    translators = {layer: Translator(each.change, each.offset) for layer, each in check_heads(heads, parts).items()}
    return write_tuned_lens(folder, translators, name, anatomy(parts).depth)


def load_heads(path: str | Path, parts: Anatomy) -> dict[int, ExitHead]:
    """Read the heads that `save_heads` wrote, {exit: head}, for a model: onto its device, and checked against it.

    A folder is read as a tuned lens (`probekit.lens.tuned_lens`); its translator of the embedding is no exit's. A file
    that torch.save wrote is read as a Jacobian lens (`probekit.lens.jacobian_lens`).
    """
    if os.path.isdir(path):
        translators = read_tuned_lens(path)
        if len(translators) != anatomy(parts).depth:
            raise InputError(f"{path} is a lens of {len(translators)} layers; this model has {anatomy(parts).depth}.")
        return check_heads({layer: ExitHead(*each) for layer, each in translators.items() if layer > 0}, parts)
    try:
        content = read_bytes(Path(path), sys.maxsize)
    except OSError as error:
        raise InputError(f"{path} cannot be read as exit heads: {error.strerror or error}") from error
    if content.startswith(BEGINS):
        parts = anatomy(parts)
        plain, none = torch.eye(parts.width), torch.zeros(parts.width)
        jacobians = read_jacobian_lens(content, parts.depth, parts.width, str(path))
        return check_heads({layer: ExitHead(each - plain, none) for layer, each in jacobians.items()}, parts)
    return unpack_heads(content, parts, str(path))
