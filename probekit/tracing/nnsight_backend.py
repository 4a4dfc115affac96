"""nnsight as a second way to read residuals, here or where a service runs the model (NDIF)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.models.family import cache_in
from probekit.models.loaded import Loaded
from probekit.tracing.backend import Reading
from probekit.tracing.remote_service import Service, asked_again

_ABSENT = object()


class NnsightBackend:
    """nnsight, for models that run elsewhere too; imported here, on entry, and undone on exit.

    nnsight gives each module a `forward` of its own, turns the tokenizer's padding side, mounts `.save` on every
    Python object and wraps `Tensor.backward`. All of it goes when the context ends (`nnsight.save` stays usable).

    where: the service that runs the passes ("local", "ndif", an address); here without one. What comes back is all
    residuals of a batch; norm and head, which read them, are this machine's.
    """

    def __init__(self, loaded: Loaded, where: str = "") -> None:
        self._service = Service.of(where) if where else None
        self._identity: tuple[str, str | None] | None = None
        if self._service is not None and self._service.remote != "local":
            self._identity = self._service.identity(loaded)
        elif any(weight.device.type == "meta" for weight in loaded.model.parameters()):
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
            if self._identity is not None:
                self._wrapped.repo_id, self._wrapped.revision = self._identity
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._wrapped = None
        self._undo.close()

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Any], rows: Tensor) -> Reading:
        if self._service is None:
            return _stacked(self._pass(inputs, rows))
        if cache_in(inputs) is not None:
            raise InputError(
                f"a text is longer than the rows that are read at once ({rows.shape[1]}), and a service keeps no cache "
                "from one pass to the next.",
                "Leave long prompts out, or read them here (--backend hooks).",
            )
        read = asked_again(partial(self._pass, inputs, rows, remote=self._service.remote), self._loaded.name)
        parts = self._loaded.anatomy
        return _stacked([each.to(parts.device, parts.dtype) for each in read])

    def _pass(self, inputs: Mapping[str, Any], rows: Tensor, **where: Any) -> list[Tensor]:
        """Every residual site's rows, and the last logits. where: nnsight's own argument that sends it elsewhere."""
        import nnsight

        wrapped, keywords = self._wrapped, dict(inputs)
        ids = keywords.pop("input_ids")
        names = self._loaded.anatomy.family.names
        layers = getattr(getattr(wrapped, names.decoder), names.layers)
        # The values are read in the order in which the model computes them.
        with wrapped.trace(ids, **keywords, logits_to_keep=1, **where):
            read = nnsight.save(
                [layers[0].input[rows], *(layer.output[rows] for layer in layers), wrapped.output.logits[:, -1]]
            )
        return read


def _stacked(read: list[Tensor]) -> Reading:
    return Reading(torch.stack(read[:-1]), read[-1])


@contextmanager
def _as_before(loaded: Loaded) -> Iterator[None]:
    """Put back what nnsight changes: modules' own entries, the padding side, `object.save`, `Tensor.backward`, and the
    order of the import path, in which its simulation of a service leaves the working tree last."""
    names = ("forward", "__nnsight__", "_persistent_id")
    modules = [
        (module, {name: module.__dict__.get(name, _ABSENT) for name in names}) for module in loaded.model.modules()
    ]
    side = getattr(loaded.tokenizer, "padding_side", None)
    backward = torch.Tensor.backward
    mounted, path = "save" in vars(object), list(sys.path)
    try:
        yield
    finally:
        for module, entries in modules:
            for name, value in entries.items():
                if value is _ABSENT:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = value
        sys.path[:] = path
        if side is not None:
            loaded.tokenizer.padding_side = side
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        if not mounted and "save" in vars(object):
            sys.modules["nnsight._c"].unmount("save")
