"""Attribution patching: activation patching to first order, by one gradient.

(Nanda, "Attribution patching", 2023; Syed et al., arXiv 2310.10348.) What a patch changes of the logit difference is
estimated as the sum over the width of (clean - corrupted) times its gradient on the corrupted run: three passes for
every site and position together. It is exact where the model is linear between the two runs, and can be far off where
it is not: hold it against `patch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.hooks.capture import Capture
from probekit.hooks.components import Site
from probekit.hooks.edit import Edit
from probekit.probing.patch_plan import Text, plan_patches
from probekit.probing.patching import Outcome, Patching, result_of, two_answers


def attribution_patch(
    model: Any,
    clean: Text,
    corrupted: Text,
    sites: Any = None,
    positions: Iterable[int] | None = None,
    *,
    answers: Sequence[Any] | None = None,
) -> Patching:
    """Estimate `patch(model, clean, corrupted, sites, positions)` from one gradient: its logit differences only.

    The parameters are those of `probekit.patch`. The other outcomes of the patches are NaN, or False.
    """
    plan = plan_patches(model, clean, corrupted, sites, positions, how="patch", answers=answers, exits=(), seed=0)
    parts, device = plan.parts, plan.parts.device
    values: dict[Site, Tensor] = {}
    with torch.no_grad(), Capture(parts, plan.sites) as capture:
        clean_logits = plan.loaded.model(plan.clean[None].to(device), use_cache=False).logits[0, -1].float()
    with torch.inference_mode(False), torch.enable_grad():
        probes: dict[Site, Tensor] = {}
        with Edit(parts, at={site: _probe(site, probes, values) for site in plan.sites}):
            logits = plan.loaded.model(plan.base[None].to(device), use_cache=False).logits[0, -1].float()
        right, wrong = pair = plan.answers or two_answers(clean_logits, logits.detach())
        gradients = torch.autograd.grad(logits[right] - logits[wrong], [probes[site] for site in plan.sites])
    logits = logits.detach()
    base = float(logits[right] - logits[wrong])
    changes = []
    for site, gradient in zip(plan.sites, gradients, strict=True):
        change = ((capture[site][0] - values[site][0]).double() * gradient[0].double()).sum(-1)
        changes.append(change[list(plan.positions)].cpu().numpy())
    estimated = base + np.stack(changes)
    clean_run = _outcome(np.array([float(clean_logits[right] - clean_logits[wrong])]), 0.0)
    base_run = _outcome(np.array([base]), _kl(clean_logits, logits))
    return result_of(plan, pair, clean_run, base_run, _outcome(estimated, np.nan), how="gradient")


def _probe(site: Site, probes: dict[Site, Tensor], values: dict[Site, Tensor]) -> Any:
    """Add zeros that ask for a gradient: that of what stands at the site."""

    def function(value: Tensor) -> Tensor:
        values[site] = value.detach()
        probes[site] = torch.zeros_like(value, requires_grad=True)
        return value + probes[site]

    return function


def _kl(clean: Tensor, other: Tensor) -> float:
    one, two = clean.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((one.exp() * (one - two)).sum())


def _outcome(difference: np.ndarray, kl: float) -> Outcome:
    none = np.zeros((*difference.shape, 0))
    return Outcome(difference, np.full(difference.shape, kl), np.zeros(difference.shape, bool), none > 0, none)
