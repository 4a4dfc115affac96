"""nnsight as a second way to read residuals, for models that run elsewhere too."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.models.loaded import Loaded
from probekit.tracing.backend import Reading

_ABSENT = object()


class NnsightBackend:
    """nnsight, for models that run elsewhere too; imported here, on entry, and undone on exit.

    nnsight gives each module a `forward` of its own, turns the tokenizer's padding side, mounts `.save` on every
    Python object and wraps `Tensor.backward`. All of it goes when the context ends (`nnsight.save` stays usable).
    """

    def __init__(self, loaded: Loaded) -> None:
        if any(weight.device.type == "meta" for weight in loaded.model.parameters()):
            raise InputError(
                f"nnsight does not read {loaded.name}, whose weights are offloaded.", "Use --backend hooks."
            )
        if not loaded.anatomy.family.decodes:
            raise InputError(
                f"nnsight reads models of known families only, and {loaded.name} is a "
                f"{loaded.anatomy.family.model_type!r} model.",
                "Take the backend 'hooks'.",
            )
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
        names = self._loaded.anatomy.family.names
        layers = getattr(getattr(wrapped, names.decoder), names.layers)
        # The values are read in the order in which the model computes them.
        with wrapped.trace(ids, **keywords, logits_to_keep=1):
            read = nnsight.save(
                [layers[0].input[rows], *(layer.output[rows] for layer in layers), wrapped.output.logits[:, -1]]
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
