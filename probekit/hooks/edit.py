"""Edit: skip layers, or replace what they write, or what stands at a site, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from probekit.errors import InputError
from probekit.hooks.components import check_site
from probekit.hooks.layer_stack import Turn
from probekit.hooks.sites import HookContext


class Edit(HookContext):
    """Skip layers, or replace what they write, within one context; gradients flow through.

    Edits of one layer rewrite in the order in which they were opened, each what the one before it left; what a skipped
    layer hands on is rewritten too. A layer that a Resume skips is not edited: the residual is given from there on.

    Parameters
    ----------
    skip: numbers of layers (0..L-1) that hand their input on unchanged.
    replace: {layer: function}; `function(residual_in, residual_out)` returns the residual that the layer
        shall write instead, (batch, positions, width).
    at: {site: function}; `function(value)` returns what shall stand at the site instead, (batch, positions, width).
        Sites as a Capture has them: 0 is the embedding, "attention:3" what the attention of layer 3 adds. What replaces
        a layer's residual comes before what stands at the site behind it.

    Examples
    --------
    >>> import probekit
    >>> loaded = probekit.load("tales-tied", device="cpu")
    >>> ids = loaded.tokenizer("Once upon a time", return_tensors="pt").input_ids
    >>> before = loaded.model(ids).logits
    >>> with probekit.Edit(loaded.model, skip=[5], replace={7: lambda was, written: was + 0.5 * (written - was)}):
    ...     edited = loaded.model(ids).logits
    >>> bool((edited != before).any()), bool((loaded.model(ids).logits == before).all())
    (True, True)
    >>> with probekit.Edit(loaded.model, at={"mlp:5": lambda added: added * 0}):  # ablation of an MLP
    ...     ablated = loaded.model(ids).logits
    >>> bool((ablated != before).any())
    True
    """

    turn = Turn.EDIT

    def __init__(
        self,
        model: Any,
        *,
        skip: Iterable[int] = (),
        replace: Mapping[int, Callable[[Tensor, Tensor], Tensor]] | None = None,
        at: Mapping[Any, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__(model)
        self.skip = tuple(dict.fromkeys(skip))
        self.replace = dict(replace or {})
        self.at = {check_site(self.anatomy, site): function for site, function in (at or {}).items()}
        for layer in (*self.skip, *self.replace):
            if isinstance(layer, bool) or layer not in range(self.anatomy.depth):
                raise InputError(f"layer {layer!r} does not exist: this model has layers 0..{self.anatomy.depth - 1}.")

    def _register(self, undo: ExitStack) -> None:
        for number in self.skip:
            self._skip(undo, number)
        for number, function in self.replace.items():
            self._act(undo, number, after=function)
        for site, change in self.at.items():
            self._change(undo, site, change)
