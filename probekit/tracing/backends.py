"""Where residuals come from: probekit's own hooks, or nnsight; one interface, equal numbers; and how far to trust them.

A backend is a context manager: outside of it the model, its tokenizer and Python itself are as they were.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from probekit.errors import InputError
from probekit.hooks import Capture
from probekit.lens.lens import Lens, check_model_row
from probekit.models.anatomy import Anatomy
from probekit.models.loading import Loaded

NOISE_TOKENS = 256  # of a text, to measure the noise
NOISE_ROWS = 8  # of them, the rows that are computed alone
NOISE_SAFETY = 4
_ABSENT = object()


@dataclass(frozen=True, eq=False)
class Reading:
    """What one forward pass gave. It holds until the same backend reads again, which may write over the residuals.

    residuals: (L+1, rows, width), the residual stream at sites 0..L; rows in the order of the mask that chose them.
    logits: (batch, vocabulary), the model's own logits at the last place of each text.
    """

    residuals: Tensor
    logits: Tensor


class Backend(AbstractContextManager, Protocol):
    """Runs a model on a batch and reads every residual."""

    def read(self, inputs: Mapping[str, Any], rows: Tensor) -> Reading:
        """One forward pass.

        inputs: what the model's forward takes, `input_ids` (batch, places) among them.
        rows: (batch, places), bool: the places to keep, which leaves out padding.
        """
        ...


class HooksBackend:
    """Probekit's own hooks: each residual is copied into place while the model runs, and nothing else is kept.

    The place is the same for all passes: new memory for each would cost ten times as much as the copies.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._anatomy = loaded.anatomy
        self._place = torch.empty(0, dtype=loaded.anatomy.dtype, device=loaded.anatomy.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._place = self._place.new_empty(0)

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Any], rows: Tensor) -> Reading:
        parts = self._anatomy
        wanted = rows.flatten().nonzero()[:, 0]
        shape = (parts.depth + 1, len(wanted), parts.width)
        if self._place.numel() < math.prod(shape):
            self._place = torch.empty(math.prod(shape), dtype=parts.dtype, device=parts.device)
        residuals = self._place[: math.prod(shape)].view(shape)

        def keep(site: int, residual: Tensor) -> None:
            torch.index_select(residual.flatten(0, 1), 0, wanted, out=residuals[site])

        with Capture(parts, reduce=keep):
            logits = parts.model(**inputs, logits_to_keep=1).logits
        return Reading(residuals, logits[:, -1])


class NnsightBackend:
    """nnsight, for models that run elsewhere too; imported here, on entry, and undone on exit.

    nnsight gives each module a `forward` of its own, turns the tokenizer's padding side, mounts `.save` on every
    Python object and wraps `Tensor.backward`. All of it goes when the context ends (`nnsight.save` stays usable).
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._undo = ExitStack()
        self._wrapped: Any = None

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(_as_before(self._loaded))
            try:
                import nnsight
            except ImportError as error:
                raise InputError(f"nnsight cannot be imported: {error}.", "pip install nnsight") from None
            model, tokenizer = self._loaded.model, self._loaded.tokenizer
            if tokenizer is None:
                self._wrapped = nnsight.NNsight(model)
            else:
                self._wrapped = nnsight.TransformersModel(model, tokenizer=tokenizer)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._wrapped = None
        self._undo.close()

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Any], rows: Tensor) -> Reading:
        import nnsight

        wrapped, keywords = self._wrapped, dict(inputs)
        ids = keywords.pop("input_ids")
        layers = wrapped.model.layers
        # The values are read in the order in which the model computes them.
        with wrapped.trace(ids, **keywords, logits_to_keep=1):
            read = nnsight.save(
                [layers[0].input[rows], *(layer.output[rows] for layer in layers), wrapped.lm_head.output[:, -1]]
            )
        return Reading(torch.stack(read[:-1]), read[-1])


@contextmanager
def _as_before(loaded: Loaded) -> Iterator[None]:
    """Put back what nnsight changes: modules' own entries, the padding side, `object.save`, `Tensor.backward`."""
    names = ("forward", "__nnsight__")
    modules = [
        (module, {name: module.__dict__.get(name, _ABSENT) for name in names}) for module in loaded.model.modules()
    ]
    side = getattr(loaded.tokenizer, "padding_side", None)
    backward = torch.Tensor.backward
    mounted = "save" in vars(object)
    try:
        yield
    finally:
        for module, entries in modules:
            for name, value in entries.items():
                if value is _ABSENT:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = value
        if side is not None:
            loaded.tokenizer.padding_side = side
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        if not mounted and "save" in vars(object):
            sys.modules["nnsight._c"].unmount("save")


BACKENDS: dict[str, Callable[[Loaded], Backend]] = {"hooks": HooksBackend, "nnsight": NnsightBackend}


def open_backend(name: str, loaded: Loaded) -> Backend:
    """The backend of that name, not entered yet. Raises InputError with the names that there are."""
    return BACKENDS[check_backend(name)](loaded)


def check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}.")
    return name


@torch.inference_mode()
def self_check(parts: Anatomy, reading: Reading) -> None:
    """The lens at layer L must reproduce the model's own logits, and every residual must be finite.

    reading: of one text, whose last row gave `reading.logits`.
    Raises InputError for weights that give NaN or infinite numbers (naming the layer), and SelfCheckError where the
    last row is not the model's.
    """
    for site, residual in enumerate(reading.residuals):
        if not residual.isfinite().all():
            raise InputError(
                f"the model gives numbers that are not finite (NaN) from layer {site} on.",
                "Its weights are damaged, or too large for this dtype: try --dtype float32.",
            )
    own = reading.logits.float()
    seen = Lens(parts)(reading.residuals[-1, -len(own) :], parts.depth)
    if not own.isfinite().all():
        raise InputError(f"the model gives logits that are not finite (NaN) at layer {parts.depth}, in norm or head.")
    check_model_row(parts, seen, own, noise=0.0)


@torch.inference_mode()
def row_noise(
    loaded: Loaded,
    ids: Sequence[int],
    sites: Iterable[int],
    heads: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
) -> float:
    """How far logits of a row computed alone may lie from those of the same row among others.

    The last rows of a text (of its beginning, where it is long) are computed among all of its rows, and again one by
    one with a cache, as a decoder does. The largest difference of their final-norm logits over `sites`, times a
    safety factor; where the dtype is smaller than float32, plus the spacing of numbers as large as the largest logit,
    to which a decoder rounds. heads: {exit layer: map} put before the norm, as in Lens.
    """
    parts = loaded.anatomy
    text = torch.tensor([list(ids)[:NOISE_TOKENS]], device=parts.device)
    alone = min(NOISE_ROWS, text.shape[1])
    sites = list(sites)
    with Capture(parts, sites) as among:
        parts.decoder(input_ids=text, use_cache=False)
    cache = DynamicCache(config=parts.model.config)
    if alone < text.shape[1]:
        parts.decoder(input_ids=text[:, :-alone], past_key_values=cache, use_cache=True)
    with Capture(parts, sites) as single:
        for column in text[:, -alone:].split(1, dim=1):
            parts.decoder(input_ids=column, past_key_values=cache, use_cache=True)
    lens, difference, largest = Lens(parts, heads=heads), 0.0, 0.0
    for site in sites:
        together = lens(among[site][0, -2 * alone :], site)[-alone:]
        apart = torch.cat([lens(step[site][0], site) for step in single.passes])
        difference = max(difference, float((together - apart).abs().max()))
        largest = max(largest, float(together.abs().max()))
    spacing = 0.0 if parts.dtype == torch.float32 else torch.finfo(parts.dtype).eps * largest
    return NOISE_SAFETY * difference + spacing
