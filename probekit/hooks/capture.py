"""Capture: read the residual stream while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from probekit.errors import InputError
from probekit.hooks.components import Site, check_site
from probekit.hooks.layer_stack import Turn
from probekit.hooks.sites import HookContext


class Capture(HookContext):
    """Read the residual stream at named sites while the model runs.

    Without `reduce` and `into`, the residuals of every pass are kept: `capture[site]` is the latest,
    (batch, positions, width), and `capture.passes` a list with one {site: residual} for each pass. A site that a
    Stop ends at is still read; the sites that a Resume skips show the residual that it started from; a site shows what
    the Edits of its layer wrote, whichever was opened first (`probekit.hooks.layer_stack`).

    Parameters
    ----------
    model: a causal language model, or its Anatomy.
    sites: the sites to read: residual ones by their numbers, or by name as in `probekit.hooks.components`
        ("attention:3", "mlp:3": what layer 3 adds); all of 0..L by default. A component of a layer that is skipped is
        not reached.
    reduce: called as `reduce(site, residual)` while the model runs; nothing is then kept here.
    into: a preallocated buffer, (sites, batch, positions, width); each pass is copied into its first
        `positions` places. Only device work happens in the hook, so that it can be recorded into a CUDA graph.

    Examples
    --------
    >>> import probekit
    >>> loaded = probekit.load("tales-tied", device="cpu")
    >>> ids = loaded.tokenizer("Once upon a time", return_tensors="pt").input_ids
    >>> with probekit.Capture(loaded.model, [0, 6, 12]) as capture:
    ...     _ = loaded.model(ids)
    >>> tuple(capture[6].shape)  # batch, positions, width
    (1, 4, 128)
    >>> with probekit.Capture(loaded.model, [3, "attention:3", "mlp:3", 4]) as capture:
    ...     _ = loaded.model(ids)
    >>> added = capture["attention:3"] + capture["mlp:3"]
    >>> bool((capture[3] + added - capture[4]).abs().max() < 1e-5)
    True
    """

    turn = Turn.CAPTURE

    def __init__(
        self,
        model: Any,
        sites: Iterable[Site | str] | None = None,
        *,
        reduce: Callable[[Any, Tensor], None] | None = None,
        into: Tensor | None = None,
    ) -> None:
        super().__init__(model)
        named = self.anatomy.sites if sites is None else (check_site(self.anatomy, site) for site in sites)
        self.sites: tuple[Site, ...] = tuple(named)
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise InputError(f"sites must be distinct and at least one, not {self.sites}.")
        if reduce is not None and into is not None:
            raise InputError("a Capture hands residuals to `reduce` or copies them `into` a buffer, not both.")
        if into is not None and (into.dim() != 4 or into.shape[0] != len(self.sites)):
            raise InputError(
                f"the buffer has shape {tuple(into.shape)}; expected ({len(self.sites)}, batch, positions, width)."
            )
        self.passes: list[dict[Site, Tensor]] = []
        self._reduce = reduce
        self._into = into
        self.replays = into is not None

    def __getitem__(self, site: Site | str) -> Tensor:
        site = check_site(self.anatomy, site) if isinstance(site, str) else site
        if site not in self.sites:
            sites = ", ".join(map(str, self.sites))
            raise InputError(f"site {site} is not captured: this Capture reads sites [{sites}].")
        if not self.passes or site not in self.passes[-1]:
            raise InputError(f"site {site} has not been reached: run the model inside the context first.")
        return self.passes[-1][site]

    def _register(self, undo: ExitStack) -> None:
        for index, site in enumerate(self.sites):
            self._on_site(undo, site, self._reader(index, site))

    def _reader(self, index: int, site: Site) -> Callable[[Tensor], None]:
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
