"""The logit lens: what a residual would say, if it were the last one.

final-norm: head(norm(h)), the model's own final norm and head, as an early-exit draft reads it.
raw: head(h), without the norm; its last row is the normed one, as transformers' `hidden_states[-1]` already is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from probekit.errors import InputError, SelfCheckError
from probekit.lens.discovered import check_discovered
from probekit.models.anatomy import Anatomy, anatomy, check_unchanged
from probekit.models.linear_kernels import many_rows

Kind = Literal["final-norm", "raw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WEIGHT_BLOCK_BYTES = 16 * 2**20  # of float32 head rows in one product, made for it where they are of another dtype
CHECK_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Lens:
    """Residual -> logits.

    Parameters
    ----------
    parts: the model's anatomy, or the model, loaded or wrapped or as it is.
    kind: "final-norm" or "raw".
    heads: {exit layer: map}; a map takes a residual (..., width) and returns one, put before norm and head
        (see `probekit.lens.exit_heads`). Only for the final-norm lens.

    Examples
    --------
    >>> import probekit
    >>> model = probekit.load("tales-tied", device="cpu")
    >>> ids = model.tokenizer("Once upon a time", return_tensors="pt").input_ids
    >>> with probekit.Capture(model.model) as capture:
    ...     logits = model.model(ids).logits
    >>> lens = probekit.Lens(model.anatomy)
    >>> lens(capture[6], 6).shape == logits.shape  # after six layers
    True
    >>> bool((lens(capture[12], 12).argmax(-1) == logits.argmax(-1)).all())  # after the last: the model
    True
    """

    def __init__(
        self, parts: Anatomy, kind: Kind = "final-norm", heads: Mapping[int, Callable[[Tensor], Tensor]] | None = None
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"there is no {kind!r} lens; there are {', '.join(KINDS)}.")
        if heads and kind == "raw":
            raise InputError("exit heads belong before the final norm: the raw lens has none.", "Use final-norm.")
        self.anatomy = parts = check_unchanged(anatomy(parts))
        check_discovered(parts)
        self.kind: Kind = kind
        self.heads = {parts.check_exit(layer): head for layer, head in (heads or {}).items()}

    def __call__(self, residual: Tensor, layer: int) -> Tensor:
        """Logits of the residual after `layer` layers. (..., width) -> (..., vocabulary), float32."""
        states = self.states(residual, layer)
        logits = head_logits(self.anatomy, states.reshape(-1, states.shape[-1]))
        return logits.reshape(*states.shape[:-1], -1)

    def states(self, residual: Tensor, layer: int) -> Tensor:
        """What the head reads for the residual after `layer` layers: (..., width), in the model's dtype."""
        self.anatomy.check_site(layer)
        if layer in self.heads:
            residual = self.heads[layer](residual)
        if self.kind == "raw" and layer < self.anatomy.depth:
            return residual
        return self.anatomy.norm(residual)


@torch.no_grad()
def head_logits(parts: Anatomy, states: Tensor, out: Tensor | None = None) -> Tensor:
    """The head's product, accumulated and kept in float32 whatever the dtype of the weights.

    A product in bfloat16 would round its logits to 8 bits and tie 3 % of the rows at the maximum. Weights of a
    smaller dtype are widened block by block, so that no float32 copy of the head is ever made; a CUDA device takes them
    as they are, and adds up in float32 (not yet run on a GPU).

    states: (rows, width), what the head reads. out: (rows, vocabulary), float32, contiguous. Returns it.
    """
    if out is None:
        out = states.new_empty(len(states), parts.vocabulary, dtype=torch.float32)
    if not parts.plain_head:
        out.copy_(parts.family.logits(parts, parts.head(states)))
        return out
    weight = parts.head.weight
    if _at_once(weight):
        wide = {} if weight.dtype == torch.float32 else {"out_dtype": torch.float32}
        torch.mm(states.to(weight.dtype), weight.T, **wide, out=out)
    else:
        states = states.float()
        block = _weight_block(weight)
        for first in range(0, len(weight), block):
            many_rows(states, weight[first : first + block].float(), out[:, first : first + block])
    if parts.family.changes_logits(parts.config):
        out.copy_(parts.family.logits(parts, out))
    return out


def head_scratch_bytes(parts: Anatomy, rows: int) -> int:
    """Most bytes that `head_logits` takes beside its result, for `rows` rows."""
    if not parts.plain_head:
        return 8 * rows * parts.vocabulary
    weight = parts.head.weight
    if _at_once(weight):
        return rows * weight.shape[1] * weight.element_size()
    block = _weight_block(weight)
    widened = 0 if weight.dtype == torch.float32 else (rows + block) * weight.shape[1]
    return 4 * (widened + rows * block)


def _at_once(weight: Tensor) -> bool:
    """Whether the product is one call that leaves float32: on a CUDA device, where tensor cores take half precision."""
    return weight.is_cuda and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _weight_block(weight: Tensor) -> int:
    """Rows of the head in one product."""
    return min(len(weight), max(1, WEIGHT_BLOCK_BYTES // (4 * weight.shape[1])))


def not_finite(kind: Kind, layer: int) -> SelfCheckError:
    """The error for logits with NaN or infinity in them."""
    return SelfCheckError(
        f"the {kind} lens has logits that are not finite (NaN or infinity) at layer {layer}.",
        "Load the model with --dtype float32, or check its weights.",
    )


def check_model_row(parts: Anatomy, logits: Tensor, expected: Tensor, noise: float) -> None:
    """Hold the lens's last row against the model's own logits, (rows, vocabulary) both; SelfCheckError if unequal.

    They may differ by the noise, and by rounding in the model's dtype in proportion to the row's largest logit.
    """
    allowed = CHECK_TOLERANCE[parts.dtype] * expected.float().abs().amax(-1) + noise
    apart = (logits - expected).abs().amax(-1)
    if not (apart <= allowed).all():
        row = int((apart - allowed).argmax())
        raise SelfCheckError(
            f"the last row of the lens is not the model's own logits: they are up to {apart[row]:.3g} apart in row "
            f"{row}, where {allowed[row]:.3g} is allowed.",
            "This model puts something between its last layer and its head that probekit does not know.",
        )
