"""What the four primitives share: the residual sites, and how a model comes back as it was.

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
from probekit.models.states import only_placed

_ABSENT = object()


class HookContext:
    """What the four primitives share: everything undone in reverse order on the way out."""

    ends_pass = False  # whether its hooks end the forward pass
    replays = False  # whether its hooks do device work only, which a recorded graph replays

    def __init__(self, model: Any) -> None:
        refuse_compiled(model if isinstance(model, nn.Module) else getattr(model, "model", None))
        self.anatomy: Anatomy = anatomy(model)
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
            let_stops_run_last(layers[0]._forward_pre_hooks)
        else:

            def after(module: nn.Module, args: tuple, output: Any) -> None:
                read(residual_of(output))

            handle = layers[site - 1].register_forward_hook(after)
            self._mark(after)
            let_stops_run_last(layers[site - 1]._forward_hooks)
        undo.callback(handle.remove)

    def _mark(self, hook: Any) -> None:
        """Say on a hook what others need to know of it."""
        hook.ends_pass = self.ends_pass
        hook.replays = self.replays


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


def residual_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def let_stops_run_last(hooks: dict[int, Callable]) -> None:
    """Let a Stop that was opened earlier end the pass only after the newer hooks of its site have run."""
    for number in [number for number, hook in hooks.items() if getattr(hook, "ends_pass", False)]:
        hooks[number] = hooks.pop(number)


def replace_forward(undo: ExitStack, module: nn.Module, forward: Callable) -> None:
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
