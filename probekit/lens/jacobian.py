"""The Jacobian lens: an exit's residual, moved to the last layer by the model's own average derivative.

    J[l] = mean over texts of  mean over places p of a text of  sum over its places p' >= p of  dh[L](p') / dh[l](p)

and the lens is head(norm(J[l] h[l])). A text's places are those from the 17th token on (the first ones draw attention
whatever they say), less the last. This is the estimator of Gurnee, Sofroniew, Lindsey et al., "Verbalizable
Representations Form a Global Workspace in Language Models" (Transformer Circuits Thread, 2026), as their package
`jlens` documents and computes it (github.com/anthropics/jacobian-lens, jlens/fitting.py); the paper itself could not be
read here. `jlens` counts layers by blocks: its h_l is h[l + 1] here.

Two departures are for drafts. With `same_position` the sum has its first term only, dh[L](p) / dh[l](p): what the
residual does to the token that is drafted from it, and not to later ones. `centred` expands h[L] to first order about
the mean, mean h[L] + J[l] (h[l] - mean h[l]), which gives the head an offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.edit import Edit
from probekit.lens.exit_heads import ExitHead, check_heads
from probekit.lens.jacobian_lens import write_jacobian_lens
from probekit.models.anatomy import Anatomy, anatomy
from probekit.models.states import in_training

SKIP = 16  # tokens; these numbers are `jlens`'s
LONGEST = 128  # tokens
AT_ONCE = 8  # rows of a Jacobian


@torch.inference_mode(False)
def fit_jacobian(
    parts: Anatomy,
    batches: Iterable[Tensor],
    exits: Iterable[int] | None = None,
    *,
    skip: int = SKIP,
    longest: int = LONGEST,
    at_once: int = AT_ONCE,
    same_position: bool = False,
    centred: bool = False,
    seed: int = 0,
) -> dict[int, ExitHead]:
    """The Jacobian lens as exit heads, {exit: head}: change J - 1, and no offset unless it is `centred`.

    A text costs one forward pass of `at_once` copies of it, and width / at_once backward passes from the last layer to
    the lowest exit: about width / 2 times what reading it costs. The model's parameters get no gradients.

    Parameters
    ----------
    batches: token ids, (texts, positions), int64, without padding; every text counts the same. Texts of fewer than
        skip + 2 tokens have no place, and are left out.
    exits: the exits to fit; all by default.
    skip, longest: tokens at a text's beginning that are no places; tokens after which it is cut.
    at_once: rows of the Jacobian that one backward pass finds: memory against speed, the same numbers.
    same_position: count what a place does to itself only. Found with signs that are drawn for each place and row
        (`seed`), which cancel between places on the average: exact in the mean, with noise.
    centred: expand about the mean residual of the same places.

    Raises InputError where no text is long enough, or the model is in training mode.
    """
    parts = anatomy(parts)
    if (training := in_training(parts.model)) is not None:
        raise InputError(f"{training} is in training mode: its derivative is not that of its drafts.", "Call .eval().")
    chosen = tuple(sorted(set(parts.exits if exits is None else map(parts.check_exit, exits))))
    if not chosen:
        raise InputError("there is no exit to fit a head for.")
    if skip < 0 or longest < skip + 2 or at_once < 1:
        raise InputError(
            f"a Jacobian lens reads places from {skip} on of texts cut at {longest} tokens, {at_once} rows at once.",
            "Skip 0 tokens or more, cut at skip + 2 or more, and take 1 row or more.",
        )
    generator = torch.Generator().manual_seed(seed) if same_position else None
    width, depth, texts = parts.width, parts.depth, 0
    sums = {layer: torch.zeros(width, width, dtype=torch.float64) for layer in chosen}
    means = {layer: torch.zeros(width, dtype=torch.float64) for layer in (*chosen, depth)}
    for ids in batches:
        for text in ids[:, :longest] if ids.shape[1] >= skip + 2 else ():
            jacobians, residuals = _of_text(parts, text, chosen, skip, at_once, generator)
            for layer in chosen:
                sums[layer] += jacobians[layer]
            for layer, mean in residuals.items():
                means[layer] += mean
            texts += 1
    if not texts:
        raise InputError(f"no text has {skip + 2} tokens, so there is nothing to fit on.", "Give longer texts.")
    heads = {}
    for layer in chosen:
        offset = means[depth] - sums[layer] / texts @ means[layer] if centred else torch.zeros(width)
        change = sums[layer] / texts - torch.eye(width, dtype=torch.float64)
        heads[layer] = ExitHead(change.float(), offset.float() / texts)
    return check_heads(heads, parts)


def save_jacobian_lens(path: str | Path, heads: Mapping[int, ExitHead], parts: Anatomy, texts: int = 1) -> None:
    """Write fitted heads, {exit: head}, as a file of the package `jlens`, for it and for `load_heads`.

    Raises InputError for heads with an offset, which that format has no place for.
    """
    for layer, head in check_heads(heads, parts).items():
        if head.offset.any():
            raise InputError(
                f"the head of exit {layer} has an offset, and a Jacobian lens has none.",
                "Write it with save_heads or save_tuned_lens.",
            )
    plain = torch.eye(anatomy(parts).width)
    write_jacobian_lens(path, {layer: head.change.float().cpu() + plain for layer, head in heads.items()}, texts)


def _of_text(
    parts: Anatomy, text: Tensor, exits: Sequence[int], skip: int, at_once: int, generator: torch.Generator | None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Of one text, (positions,), averaged over its places, on the CPU: {exit: (width, width)}, the Jacobian, and
    {site: (width,)}, the residual at each exit and at L."""
    width, places = parts.width, torch.arange(skip, len(text) - 1, device=parts.device)
    found = {layer: torch.empty(width, width) for layer in exits}
    signs = torch.ones(width, len(places))
    if generator is not None:
        signs = torch.randint(2, signs.shape, generator=generator).float() * 2 - 1
    with (
        torch.enable_grad(),
        Edit(parts, at={exits[0]: lambda value: value.detach().requires_grad_()}),  # nothing below it is needed
        Capture(parts, [*exits, parts.depth]) as capture,
    ):
        parts.decoder(input_ids=text.clone().to(parts.device).expand(at_once, -1), use_cache=False)
        last, sources = capture[parts.depth], [capture[layer] for layer in exits]
        for start in range(0, width, at_once):  # rows of the Jacobian: a copy of the text for each
            rows = torch.arange(start, min(start + at_once, width), device=last.device)
            copies, sign = (rows - start)[:, None], signs[rows.cpu()].to(last)
            cotangent = torch.zeros_like(last)
            cotangent[copies, places.to(last.device), rows[:, None]] = sign
            more = start + at_once < width
            for layer, gradient in zip(
                exits, torch.autograd.grad(last, sources, cotangent, retain_graph=more), strict=True
            ):
                own = gradient[: len(rows), places.to(gradient.device)].float() * sign.to(gradient.device)[..., None]
                found[layer][start : start + len(rows)] = own.mean(1).cpu()
        residuals = {
            layer: capture[layer][0].detach()[skip:-1].float().mean(0).cpu() for layer in (*exits, parts.depth)
        }
    return found, residuals
