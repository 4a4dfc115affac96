"""What the four primitives share: the sites, and how a model comes back as it was.

Residual sites: site 0 is the embedding output, site l the residual stream after l layers, site L the last residual,
before the final norm. Component sites: `probekit.hooks.components`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from probekit.errors import InputError
from probekit.hooks.components import Component, Site, component_module
from probekit.hooks.layer_stack import Entry, Turn, residual_of, stack_of
from probekit.models.anatomy import Anatomy, anatomy, check_unchanged
from probekit.models.states import only_placed


class HookContext:
    """What the four primitives share: everything undone in reverse order on the way out."""

    turn: Turn  # when its hooks act at a layer
    replays = False  # whether its hooks do device work only, which a recorded graph replays

    def __init__(self, model: Any) -> None:
        refuse_compiled(model if isinstance(model, nn.Module) else getattr(model, "model", None))
        self.anatomy: Anatomy = check_unchanged(anatomy(model))
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

    def _act(self, undo: ExitStack, layer: int, **acts: Any) -> None:
        """Put an entry on the stack of layer number `layer`."""
        self._act_on(undo, self.anatomy.layers[layer], **acts)

    def _act_on(self, undo: ExitStack, module: nn.Module, **acts: Any) -> None:
        stack, entry = stack_of(module), Entry(self.turn, replays=self.replays, **acts)
        undo.callback(stack.remove, entry)  # before it is there: an interrupt in between must not leave it
        stack.add(entry)

    def _on_site(self, undo: ExitStack, site: Site, read: Callable[[Tensor], None]) -> None:
        """Call `read(value)` whenever the model passes `site`."""

        def look(value: Tensor) -> Tensor:
            read(value)
            return value

        self._change(undo, site, look)

    def _change(self, undo: ExitStack, site: Site, function: Callable[[Tensor], Tensor]) -> None:
        """Let `function(value)` stand where the model has `value`, whenever it passes `site`."""
        if isinstance(site, Component):
            module, factor = component_module(self.anatomy, site)
            self._act_on(undo, module, after=lambda _, written: _scaled(function, written, factor))
        elif site == 0:
            self._act(undo, 0, before=function)
        else:
            self._act(undo, site - 1, after=lambda _, written: function(written))

    def _skip(self, undo: ExitStack, layer: int, when: Callable[[], bool] = lambda: True) -> None:
        """Let a layer hand its input on."""
        self._act(undo, layer, skips=when, runs=not self.anatomy.family.decodes)


def _scaled(function: Callable[[Tensor], Tensor], written: Tensor, factor: float | None) -> Tensor:
    """`function` of what a layer adds, where it adds `written` times a factor; as the module shall write it."""
    if factor is None:
        return function(written)
    added = written * factor
    changed = function(added)
    return written if changed is added else changed / factor


def refuse_compiled(model: Any) -> None:
    """Raise InputError for a model whose compiled code would not see a hook: that must not be silent."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if hasattr(model, "_orig_mod") or any(map(_hides_layers, modules)):
        raise InputError(
            "this model is compiled, and compiled code does not see hooks that come later.",
            "Open them on the model that was compiled (`compiled._orig_mod`), or compile afterwards.",
        )


def _hides_layers(module: nn.Module) -> bool:
    """Whether a module is compiled with the layers in it. A layer compiled alone still shows what it returns."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return "_orig_mod" in module._modules and any(isinstance(part, nn.ModuleList) for part in module.modules())


def is_hooked(module: nn.Module) -> bool:
    """Whether a module carries hooks or an instance-level forward, beside what transformers leaves on its layers."""
    return bool(_foreign_hooks(module) or "forward" in module.__dict__)


def is_intercepted(module: nn.Module) -> bool:
    """Whether hooks, or an instance-level forward, do anything but bring a module's inputs and weights together."""
    return bool(_foreign_hooks(module) or ("forward" in module.__dict__ and not only_placed(module)))


def run_layers(layers: Iterable[Callable], residual: Tensor, inputs: Iterable[Mapping[str, Any]]) -> Tensor:
    """Call layers one after the other, each with inputs of its own."""
    for layer, given in zip(layers, inputs, strict=False):
        residual = residual_of(layer(residual, **given))
    return residual


def open_hooks(model: torch.nn.Module) -> list[str]:
    """Names of the modules of `model` that carry hooks or an instance-level forward: empty for a clean model.

    The hooks that transformers leaves on its own layers after `output_hidden_states=True` are not counted, nor
    accelerate's, which only move inputs and weights.
    """
    return [name for name, module in model.named_modules() if is_intercepted(module)]


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
