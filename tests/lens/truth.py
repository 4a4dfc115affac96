"""The slow, obvious reductions: what the engine is judged against. One layer at a time, whole rows of logits."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from probekit.lens.chunked import StatisticsPlan
from probekit.lens.lens import Lens
from probekit.lens.noise import Noise


def first_argmax(logits: Tensor) -> Tensor:
    """The lowest id among the largest logits."""
    return torch.stack([row.eq(row.max()).nonzero()[0, 0] for row in logits.flatten(0, -2)]).view(logits.shape[:-1])


def rank(logits: Tensor, ids: Tensor) -> Tensor:
    """Tokens that come before each id: larger, or equal with a lower id. (rows, vocabulary), (rows,) -> (rows,)."""
    own = logits.gather(-1, ids[:, None])
    lower = torch.arange(logits.shape[-1]) < ids[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(-1)


def check_interpreter() -> None:
    """Skip where Triton's interpreter cannot run these kernels: 3.6 reads one-element arrays as numbers."""
    import numpy
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    new = tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
    if old and new and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with numpy {numpy.__version__}")


def row_statistics(
    logits: Tensor, model: Tensor, input_ids: Tensor, text_ids: Tensor, plan: StatisticsPlan, site: int = 0
) -> dict[str, Tensor]:
    """Every figure of one lens at one layer. logits, model: (rows, vocabulary), float32; ids: (rows,)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    argmax, target = first_argmax(logits), first_argmax(model)
    own = logits.gather(-1, target[:, None])[:, 0]
    others = logits.scatter(-1, target[:, None], -torch.inf).amax(-1)
    log_q, log_p = logits.double().log_softmax(-1), model.double().log_softmax(-1)
    noise = Noise.of(plan.noise)
    tolerance = noise.by_site[site if len(noise.by_site) > 1 else 0] + noise.rounding * own.abs().nan_to_num()
    found = {
        "argmax": argmax,
        "probability": log_q.amax(-1).exp(),
        "margin": ordered[:, 0] - ordered[:, 1],
        "agrees": argmax == target,
        "log_probability": log_q.gather(-1, text_ids[:, None])[:, 0],
        "rank": rank(logits, text_ids),
        "model_rank": rank(model, argmax),
        "entropy": torch.special.entr(log_q.exp()).sum(-1),  # 0 log 0 is 0
        "kl": torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1),
        "overlap": torch.minimum(log_q.exp(), log_p.exp()).sum(-1),
        "echo": argmax == input_ids,
        "near_tie": (own - others).abs() < tolerance,
    }
    if plan.warp is not None:
        warped_q, warped_p = plan.warp(logits).double(), plan.warp(model).double()
        text_q, text_p = (log.gather(-1, text_ids[:, None])[:, 0].exp() for log in (warped_q, warped_p))
        found["accept_probability"] = torch.where(text_q == 0, 0.0, (text_q / text_p).clamp(max=1))  # q / 0 is 1
        found["overlap"] = torch.minimum(warped_q.exp(), warped_p.exp()).sum(-1)
    if plan.rounded_dtype is not None:
        rounded, rounded_model = (first_argmax(x.to(plan.rounded_dtype).float()) for x in (logits, model))
        found["argmax_rounded"] = rounded
        found["agrees_rounded"] = rounded == rounded_model
    if plan.top:
        found["top_ids"] = order[:, : plan.top]
        found["top_probabilities"] = log_q.gather(-1, order[:, : plan.top]).exp()
    return found


def layer_statistics(parts, residuals: Tensor, input_ids: Tensor, text_ids: Tensor, plan: StatisticsPlan):
    """{name: (lenses, layers + 1, rows)}."""
    model = Lens(parts)(residuals[-1], parts.depth)
    lenses = [Lens(parts, kind, plan.heads if kind == "final-norm" else None) for kind in plan.lenses]
    rows = [
        [
            row_statistics(lens(residual, layer), model, input_ids, text_ids, plan, layer)
            for layer, residual in enumerate(residuals)
        ]
        for lens in lenses
    ]
    return {name: torch.stack([torch.stack([row[name] for row in layers]) for layers in rows]) for name in rows[0][0]}


def agreement(parts, residuals: Tensor, input_ids: Tensor, text_ids: Tensor, plan: StatisticsPlan):
    """The bits of mode "agreement" from the full products."""
    found = layer_statistics(parts, residuals, input_ids, text_ids, replace(plan, lenses=("final-norm",)))
    return {name: found[name] for name in ("agrees", "near_tie", "agrees_rounded") if name in found}
