"""Stop and Resume: end a forward pass at a site, and start one there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import repeat
from typing import Any

from torch import Tensor

from probekit.errors import InputError
from probekit.hooks.components import Component, Site, check_site, depth_of
from probekit.hooks.layer_stack import Turn
from probekit.hooks.sites import HookContext, run_layers
from probekit.models.family import cache_in


class _Reached(InputError):  # noqa: N818 - a signal first
    """How a Stop ends a pass. It is an error only where it meets no Stop that was called."""

    def __init__(self, owner: Stop, residual: Tensor) -> None:
        super().__init__(f"a Stop at site {owner.site} ended the pass.", "Inside its context call the Stop itself.")
        self.owner = owner
        self.residual = residual


class Stop(HookContext):
    """End the forward pass after a site: the draft.

    `stop(**inputs)` runs the model's own forward on `inputs` as far as `site` and returns what stands there, (batch,
    positions, width): the residual, or what a component ("attention:3") adds to it. The layers behind the site
    never run, and their caches stay as they are.

    `stop.direct(embedded, **inputs)` is the same with less overhead, and needs no open context: it calls the layers
    before the site one by one on the embedding output. The caller computes what the model's own forward would:
    `position_embeddings` and the additive 4D `attention_mask` (None where none is needed); where layers take
    different ones, `each` lists the inputs of every layer of the model. Other hooks on the layers fire as usual.

    Examples
    --------
    >>> import probekit
    >>> loaded = probekit.load("tales-tied", device="cpu")
    >>> ids = loaded.tokenizer("Once upon a time", return_tensors="pt").input_ids
    >>> with probekit.Stop(loaded.model, 4) as stop:
    ...     residual = stop(input_ids=ids)  # layers 0..3 ran
    >>> tuple(residual.shape)
    (1, 4, 128)
    """

    turn = Turn.STOP

    def __init__(self, model: Any, site: Site | str) -> None:
        super().__init__(model)
        self.site = check_site(self.anatomy, site)

    def __call__(self, **inputs: Any) -> Tensor:
        self._require_open()
        try:
            self.anatomy.decoder(**inputs)
        except _Reached as reached:
            if reached.owner.site != self.site:
                raise
            return reached.residual
        raise InputError(f"the model finished without passing site {self.site}: another hook replaced its layers.")

    def direct(self, embedded: Tensor, each: Sequence[Mapping[str, Any]] | None = None, **inputs: Any) -> Tensor:
        given = repeat(inputs) if each is None else each
        return run_layers(self.anatomy.layers[: _residual_site(self.site)], embedded, given)

    def _register(self, undo: ExitStack) -> None:
        def end(residual: Tensor) -> None:
            raise _Reached(self, residual)

        self._on_site(undo, self.site, end)


class Resume(HookContext):
    """Start the forward pass at a site from a given residual, skipping the layers before it: the verification.

    `resume(residual, **inputs)` returns the last residual after the final norm, (batch, positions, width). Only its own
    call skips layers: the model called by itself in its context runs as ever.
    At a component site, `resume(residual, added, **inputs)` starts from the residual before its layer, and lets `added`
    stand for what the component adds there; the module itself still runs, with its cache.
    With a cache, give `position_ids` and an additive 4D `attention_mask`: the caches below and above the site
    differ in length at that moment, so the model must not build the mask itself.

    `resume.direct(residual, **inputs)` is the same with less overhead, and needs no open context: it calls the
    layers behind the site one by one, then the final norm. Its inputs are those of `Stop.direct`.

    Examples
    --------
    >>> import probekit
    >>> loaded = probekit.load("tales-tied", device="cpu")
    >>> ids = loaded.tokenizer("Once upon a time", return_tensors="pt").input_ids
    >>> with probekit.Stop(loaded.model, 4) as stop:
    ...     residual = stop(input_ids=ids)
    >>> with probekit.Resume(loaded.model, 4) as resume:
    ...     last = resume(residual)  # layers 4..11, and the norm
    >>> bool((loaded.model.lm_head(last) == loaded.model(ids).logits).all())
    True
    """

    turn = Turn.RESUME

    def __init__(self, model: Any, site: Site | str) -> None:
        super().__init__(model)
        self.site = check_site(self.anatomy, site)
        self._start = depth_of(self.site)
        self._given: Tensor | None = None  # while it is called
        self._added: Tensor | None = None

    def __call__(self, residual: Tensor, added: Tensor | None = None, **inputs: Any) -> Tensor:
        self._require_open()
        if (added is None) != isinstance(self.site, int):
            raise InputError(
                f"a Resume at site {self.site} takes the residual"
                + (" alone." if added is not None else " before its layer, and what the component adds to it.")
            )
        mask = inputs.get("attention_mask")
        explicit = inputs.get("position_ids") is not None and isinstance(mask, Tensor) and mask.dim() == 4
        if cache_in(inputs) is not None and not explicit:
            raise InputError(
                "a Resume with a cache needs position_ids and an additive attention mask of "
                "(batch, 1, positions, keys): the caches of the layers may differ in length."
            )
        self._given, self._added = residual, added  # and a copy for what a model may scale in place
        try:
            return self.anatomy.decoder(inputs_embeds=residual.clone(), **inputs).last_hidden_state
        finally:
            self._given = self._added = None

    def direct(self, residual: Tensor, each: Sequence[Mapping[str, Any]] | None = None, **inputs: Any) -> Tensor:
        start = _residual_site(self.site)
        given = repeat(inputs) if each is None else each[start:]
        return self.anatomy.norm(run_layers(self.anatomy.layers[start:], residual, given))

    def _register(self, undo: ExitStack) -> None:
        # The residual takes the first layer's input: a model may scale its inputs_embeds, or add positions to them.
        self._act(undo, 0, before=lambda given: given if self._given is None else self._given)
        for layer in range(self._start):
            self._skip(undo, layer, lambda: self._given is not None)
        if isinstance(self.site, Component):
            self._change(undo, self.site, lambda value: value if self._added is None else self._added)


def _residual_site(site: Site) -> int:
    if isinstance(site, Component):
        raise InputError(f"layers are called one by one up to a residual site, or from one, not {site}.")
    return site
