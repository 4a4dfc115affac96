"""Edit: skip layers, or replace what they write, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from probekit.errors import InputError
from probekit.hooks.sites import HookContext, hand_on, let_stops_run_last, replace_forward, residual_of


class Edit(HookContext):
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
            replace_forward(undo, self.anatomy.layers[number], hand_on)
        for number, function in self.replace.items():

            def rewrite(
                module: nn.Module, args: tuple, kwargs: dict, output: Any, function: Callable = function
            ) -> Any:
                written = function(args[0] if args else kwargs["hidden_states"], residual_of(output))
                return (written, *output[1:]) if isinstance(output, tuple) else written

            handle = self.anatomy.layers[number].register_forward_hook(rewrite, with_kwargs=True)
            undo.callback(handle.remove)
            let_stops_run_last(self.anatomy.layers[number]._forward_hooks)
