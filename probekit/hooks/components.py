"""Component sites: what the attention and the MLP of a layer add to the residual stream.

`attention:n` and `mlp:n` are the two things that layer n (0..L-1) adds, (batch, positions, width), so that

    h[n + 1] = h[n] + attention:n + mlp:n

in every family. A norm that stands behind a branch (Gemma 2 and 3, OLMo 2 and 3, EXAONE 4, GLM-4) and a multiplier of
the stream (Granite, HyperCLOVA X) belong to it. Where layers are parallel (GPT-NeoX, Cohere, Phi, StableLM by its
configuration) both branches read h[n]; elsewhere the MLP reads h[n] + attention:n.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from probekit.errors import InputError
from probekit.models.anatomy import Anatomy

Branch = Literal["attention", "mlp"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)


class Component(NamedTuple):
    """A component site: what one branch of one layer adds to the stream."""

    branch: Branch
    layer: int

    def __str__(self) -> str:
        return f"{self.branch}:{self.layer}"


Site = int | Component
"""A residual site 0..L, or a component site."""


def check_site(parts: Anatomy, site: Any) -> Site:
    """The site that a number, a name or a Component means.

    Names: "attention:3", "mlp:3", "residual:3", and "embedding" for residual site 0. Raises InputError with the sites
    that exist, or where it is not known what the layers of this family add.
    """
    if isinstance(site, Component):
        return _check_component(parts, *site)
    if not isinstance(site, str):
        return parts.check_site(site)
    if site == "embedding":
        return 0
    kind, _, number = site.partition(":")
    if kind not in ("residual", *BRANCHES) or not number.isdecimal() or not number.isascii():
        raise InputError(
            f"residual site {site!r} does not exist: this model has sites 0..{parts.depth}.",
            'Give its number, or the name of a site: "embedding", "residual:N", "attention:N", "mlp:N".',
        )
    return parts.check_site(int(number)) if kind == "residual" else _check_component(parts, kind, int(number))


def all_sites(parts: Anatomy, kind: str) -> list[Site]:
    """Every site of a kind: "residual", "attention" or "mlp"."""
    if kind == "residual":
        return list(parts.sites)
    return [_check_component(parts, kind, layer) for layer in range(parts.depth)]


def depth_of(site: Site) -> int:
    """The last residual site that what stands at a site does not change."""
    return site.layer if isinstance(site, Component) else site


def component_module(parts: Anatomy, site: Component) -> tuple[nn.Module, float | None]:
    """The module that writes a component, and what the layer multiplies its output with."""
    branches = parts.family.branches
    path = getattr(branches, site.branch)
    try:
        module = parts.layers[site.layer].get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"layer {site.layer} of this {parts.family.model_type!r} model has no {path!r}, where its family has its "
            f"{site.branch}.",
            "Give the family's branches: docs/how-to/extend.md.",
        ) from error
    return module, parts.family.branch_factor(parts.config)


def _check_component(parts: Anatomy, branch: Any, layer: Any) -> Component:
    family = parts.family
    if family.branches is None or not family.decodes:
        raise InputError(
            f"what the layers of a {family.model_type!r} model add to the stream is not known: it has residual sites "
            f"0..{parts.depth} only.",
            "Describe the family: docs/how-to/extend.md.",
        )
    if branch not in BRANCHES or isinstance(layer, bool) or layer not in range(parts.depth):
        raise InputError(
            f"site {branch}:{layer} does not exist: this model has attention:N and mlp:N of layers "
            f"0..{parts.depth - 1}."
        )
    return Component(branch, layer)
