"""A decoder whose logits can be written down: its head and its norm change nothing, so that a residual is a row of
logits, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from probekit.models.anatomy import Anatomy
from probekit.models.families import FAMILIES


def spelled(vocabulary: int, depth: int) -> Anatomy:
    """An anatomy with width = vocabulary. Only the lens can use it: there is no model behind."""
    head = nn.Linear(vocabulary, vocabulary, bias=False)
    head.weight = nn.Parameter(torch.eye(vocabulary), requires_grad=False)
    embedding = nn.Embedding(vocabulary, vocabulary).requires_grad_(False)
    layers = nn.ModuleList(nn.Identity() for _ in range(depth))
    nothing = nn.Identity()
    nothing.config = None  # a Llama's logits ask nothing of it
    return Anatomy(
        model=nothing,
        decoder=nothing,
        embedding=embedding,
        layers=layers,
        norm=nothing,
        head=head,
        rotary=nothing,
        tied=False,
        family=FAMILIES["llama"],
    )


def read(loaded, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residuals (layers + 1, rows, width), input ids, text ids, the model's logits) of texts (texts, positions)."""
    from probekit.hooks.capture import Capture

    with torch.no_grad(), Capture(loaded.model) as capture:
        logits = loaded.model(ids[:, :-1], use_cache=False).logits
    residuals = torch.stack([capture[site].flatten(0, 1) for site in loaded.anatomy.sites])
    return residuals, ids[:, :-1].flatten(), ids[:, 1:].flatten(), logits.flatten(0, 1)


def random_texts(loaded, texts: int, positions: int, seed: int = 0) -> Tensor:
    """Token ids, (texts, positions)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, loaded.anatomy.vocabulary, (texts, positions), generator=generator)
