"""Capture, Stop, Resume, Edit: the only place that registers a hook or replaces a `forward`.

Each is a context manager. It checks its sites first, registers all of its hooks or none, and restores the
model exactly, also after an exception. No model's forward is copied: the layers run as transformers wrote them.

Sites: site 0 is the embedding output, site l the residual stream after l layers, site L the last residual,
before the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from probekit.errors import InputError
from probekit.models.anatomy import Anatomy, anatomy

_ABSENT = object()


class _Hooked:
    """What the four primitives share: everything undone in reverse order on the way out."""

    def __init__(self, model: Any) -> None:
        self.anatomy: Anatomy = model if isinstance(model, Anatomy) else anatomy(model)
        self._undo: ExitStack | None = None

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise InputError(f"this {type(self).__name__} is already open.", "Make a new one for a nested context.")
        with ExitStack() as undo:  # an exception half-way through undoes what was registered so far
            self._register(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def _register(self, undo: ExitStack) -> None:
        raise NotImplementedError

    def _require_open(self) -> None:
        if self._undo is None:
            name = type(self).__name__
            raise InputError(f"{name} was used outside its context.", f"Write `with {name}(...) as ...:`.")

    def _on_residual(self, undo: ExitStack, site: int, read: Callable[[Tensor], None]) -> None:
        """Call `read(residual)` whenever the model passes `site`."""
        layers = self.anatomy.layers
        if site == 0:

            def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
                read(args[0] if args else kwargs["hidden_states"])

            handle = layers[0].register_forward_pre_hook(before, with_kwargs=True)
            self._mark(before)
            _stops_last(layers[0]._forward_pre_hooks)
        else:

            def after(module: nn.Module, args: tuple, output: Any) -> None:
                read(_residual(output))

            handle = layers[site - 1].register_forward_hook(after)
            self._mark(after)
            _stops_last(layers[site - 1]._forward_hooks)
        undo.callback(handle.remove)

    def _mark(self, hook: Any) -> None:
        """Say on a hook what others need to know of it."""
        hook.ends_pass = isinstance(self, Stop)
        hook.replays = isinstance(self, Capture) and self._into is not None


class Capture(_Hooked):
    """Read the residual stream at named sites while the model runs.

    Without `reduce` and `into`, the residuals of every pass are kept: `capture[site]` is the latest,
    (batch, positions, width), and `capture.passes` a list with one {site: residual} for each pass. A site that a
    Stop ends at is still read; the sites that a Resume skips show the residual that it started from.

    Parameters
    ----------
    model: a causal language model, or its Anatomy.
    sites: the sites to read; all of 0..L by default.
    reduce: called as `reduce(site, residual)` while the model runs; nothing is then kept here.
    into: a preallocated buffer, (sites, batch, positions, width); each pass is copied into its first
        `positions` places. Only device work happens in the hook, so that it can be recorded into a CUDA graph.
    """

    def __init__(
        self,
        model: Any,
        sites: Iterable[int] | None = None,
        *,
        reduce: Callable[[int, Tensor], None] | None = None,
        into: Tensor | None = None,
    ) -> None:
        super().__init__(model)
        self.sites = tuple(self.anatomy.sites if sites is None else map(self.anatomy.check_site, sites))
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise InputError(f"sites must be distinct and at least one, not {self.sites}.")
        if reduce is not None and into is not None:
            raise InputError("a Capture hands residuals to `reduce` or copies them `into` a buffer, not both.")
        if into is not None and (into.dim() != 4 or into.shape[0] != len(self.sites)):
            raise InputError(
                f"the buffer has shape {tuple(into.shape)}; expected ({len(self.sites)}, batch, positions, width)."
            )
        self.passes: list[dict[int, Tensor]] = []
        self._reduce = reduce
        self._into = into

    def __getitem__(self, site: int) -> Tensor:
        if site not in self.sites:
            raise InputError(f"site {site!r} is not captured: this Capture reads sites {list(self.sites)}.")
        if not self.passes or site not in self.passes[-1]:
            raise InputError(f"site {site} has not been reached: run the model inside the context first.")
        return self.passes[-1][site]

    def _register(self, undo: ExitStack) -> None:
        for index, site in enumerate(self.sites):
            self._on_residual(undo, site, self._reader(index, site))

    def _reader(self, index: int, site: int) -> Callable[[Tensor], None]:
        if self._reduce is not None:
            reduce = self._reduce
            return lambda residual: reduce(site, residual)
        if self._into is not None:
            buffer = self._into[index]

            def copy(residual: Tensor) -> None:
                if any(have < need for have, need in zip(buffer.shape, residual.shape, strict=True)):
                    raise InputError(
                        f"a residual of shape {tuple(residual.shape)} does not fit the buffer's {tuple(buffer.shape)}."
                    )
                buffer[: residual.shape[0], : residual.shape[1]].copy_(residual)

            return copy

        def keep(residual: Tensor) -> None:
            if not self.passes or site in self.passes[-1]:
                self.passes.append({})
            self.passes[-1][site] = residual

        return keep


class _Reached(InputError):  # noqa: N818 - a signal first
    """How a Stop ends a pass. It is an error only where it meets no Stop that was called."""

    def __init__(self, owner: Stop, residual: Tensor) -> None:
        super().__init__(f"a Stop at site {owner.site} ended the pass.", "Inside its context call the Stop itself.")
        self.owner = owner
        self.residual = residual


class Stop(_Hooked):
    """End the forward pass after a site: the draft.

    `stop(**inputs)` runs the model's own forward on `inputs` as far as `site` and returns the residual there,
    (batch, positions, width). The layers behind the site never run, and their caches stay as they are.

    `stop.direct(embedded, **inputs)` is the same with less overhead, and needs no open context: it calls the layers
    before the site one by one on the embedding output. The caller computes what the model's own forward would:
    `position_embeddings` and the additive 4D `attention_mask` (None where none is needed). Other hooks on the
    layers fire as usual.
    """

    def __init__(self, model: Any, site: int) -> None:
        super().__init__(model)
        self.site = self.anatomy.check_site(site)

    def __call__(self, **inputs: Any) -> Tensor:
        self._require_open()
        try:
            self.anatomy.decoder(**inputs)
        except _Reached as reached:
            if reached.owner.site != self.site:
                raise
            return reached.residual
        raise InputError(f"the model finished without passing site {self.site}: another hook replaced its layers.")

    def direct(self, embedded: Tensor, **inputs: Any) -> Tensor:
        return _through(self.anatomy.layers[: self.site], embedded, inputs)

    def _register(self, undo: ExitStack) -> None:
        def end(residual: Tensor) -> None:
            raise _Reached(self, residual)

        self._on_residual(undo, self.site, end)


class Resume(_Hooked):
    """Start the forward pass at a site from a given residual, skipping the layers before it: the verification.

    `resume(residual, **inputs)` returns the last residual after the final norm, (batch, positions, width).
    With a cache, give `position_ids` and an additive 4D `attention_mask`: the caches below and above the site
    differ in length at that moment, so the model must not build the mask itself.

    `resume.direct(residual, **inputs)` is the same with less overhead, and needs no open context: it calls the
    layers behind the site one by one, then the final norm. Its inputs are those of `Stop.direct`.
    """

    def __init__(self, model: Any, site: int) -> None:
        super().__init__(model)
        self.site = self.anatomy.check_site(site)

    def __call__(self, residual: Tensor, **inputs: Any) -> Tensor:
        self._require_open()
        mask = inputs.get("attention_mask")
        explicit = inputs.get("position_ids") is not None and isinstance(mask, Tensor) and mask.dim() == 4
        if inputs.get("past_key_values") is not None and not explicit:
            raise InputError(
                "a Resume with a cache needs position_ids and an additive attention mask of "
                "(batch, 1, positions, keys): the caches of the layers may differ in length."
            )
        return self.anatomy.decoder(inputs_embeds=residual, **inputs).last_hidden_state

    def direct(self, residual: Tensor, **inputs: Any) -> Tensor:
        return self.anatomy.norm(_through(self.anatomy.layers[self.site :], residual, inputs))

    def _register(self, undo: ExitStack) -> None:
        for layer in self.anatomy.layers[: self.site]:
            _replace_forward(undo, layer, _identity)


class Edit(_Hooked):
    """Skip layers, or replace what they write, within one context; gradients flow through.

    Parameters
    ----------
    skip: numbers of layers (0..L-1) that hand their input on unchanged.
    replace: {layer: function}; `function(residual_in, residual_out)` returns the residual that the layer
        shall write instead, (batch, positions, width).
    """

    def __init__(
        self,
        model: Any,
        *,
        skip: Iterable[int] = (),
        replace: Mapping[int, Callable[[Tensor, Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__(model)
        self.skip = tuple(dict.fromkeys(skip))
        self.replace = dict(replace or {})
        for layer in (*self.skip, *self.replace):
            if isinstance(layer, bool) or layer not in range(self.anatomy.depth):
                raise InputError(f"layer {layer!r} does not exist: this model has layers 0..{self.anatomy.depth - 1}.")

    def _register(self, undo: ExitStack) -> None:
        for number in self.skip:
            _replace_forward(undo, self.anatomy.layers[number], _identity)
        for number, function in self.replace.items():

            def rewrite(
                module: nn.Module, args: tuple, kwargs: dict, output: Any, function: Callable = function
            ) -> Any:
                written = function(args[0] if args else kwargs["hidden_states"], _residual(output))
                return (written, *output[1:]) if isinstance(output, tuple) else written

            handle = self.anatomy.layers[number].register_forward_hook(rewrite, with_kwargs=True)
            undo.callback(handle.remove)
            _stops_last(self.anatomy.layers[number]._forward_hooks)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module carries hooks or an instance-level forward, beside what transformers leaves on its layers."""
    return bool(_foreign_hooks(module) or "forward" in module.__dict__)


def _through(layers: Iterable[Callable], residual: Tensor, inputs: dict[str, Any]) -> Tensor:
    for layer in layers:
        residual = _residual(layer(residual, **inputs))
    return residual


def _residual(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _stops_last(hooks: dict[int, Callable]) -> None:
    """Let a Stop that was opened earlier end the pass only after the newer hooks of its site have run."""
    for number in [number for number, hook in hooks.items() if getattr(hook, "ends_pass", False)]:
        hooks[number] = hooks.pop(number)


def _replace_forward(undo: ExitStack, module: nn.Module, forward: Callable) -> None:
    """Replace one instance's forward until `undo`; an instance-level forward that was there comes back."""
    before = module.__dict__.get("forward", _ABSENT)

    def restore() -> None:
        if before is _ABSENT:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before

    undo.callback(restore)
    module.__dict__["forward"] = forward


def open_hooks(model: torch.nn.Module) -> list[str]:
    """Names of the modules of `model` that carry hooks or an instance-level forward: empty for a clean model.

    The hooks that transformers leaves on its own layers after `output_hidden_states=True` are not counted.
    """
    return [name for name, module in model.named_modules() if _foreign_hooks(module) or "forward" in module.__dict__]


def unreplayable_hooks(model: torch.nn.Module) -> list[str]:
    """Names of the modules of `model` whose hooks would fire while a graph is recorded and not when it is replayed.

    Those of a Capture into a buffer do device work only, which replays.
    """
    return [
        name
        for name, module in model.named_modules()
        if "forward" in module.__dict__ or not all(getattr(hook, "replays", False) for hook in _foreign_hooks(module))
    ]


def _foreign_hooks(module: nn.Module) -> list[Callable]:
    """A module's forward hooks, less those that transformers leaves on its own layers."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]
