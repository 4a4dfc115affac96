"""Direct logit attribution: which layer's attention and MLP wrote the logit of a token.

The last residual is the sum of the embedding and of what every component added, and the head is linear. With the scale
of the final norm held as it is for that residual (as TransformerLens's `apply_ln_to_stack` does), each of them has a
share of the logit, and the shares add up to it: with the norm's bias, the head's, a logit scale and, as a share of its
own, what a soft cap takes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.errors import InputError, SelfCheckError
from probekit.hooks.capture import Capture
from probekit.hooks.components import BRANCHES, Site, all_sites
from probekit.lens.lens import CHECK_TOLERANCE, head_logits
from probekit.models.anatomy import Anatomy
from probekit.models.loaded import as_loaded
from probekit.probing.patch_plan import Text, read_text

NORM_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, eq=False)
class Attribution:
    """Shares of logits.

    terms: "embedding", "attention:0", "mlp:0", .., then "norm bias", "head bias" and "soft cap". values: (positions,
    terms); each row adds up to `logits`, (positions,), those of `tokens`, (positions,).
    """

    model: str
    inputs: tuple[str, ...]
    tokens: tuple[int, ...]
    token_texts: tuple[str, ...]
    terms: tuple[str, ...]
    values: np.ndarray
    logits: np.ndarray

    def table(self) -> pd.DataFrame:
        """A row for each position and term: position, input, token, term, kind, logit."""
        count = len(self.terms)
        return pd.DataFrame(
            {
                "position": np.repeat(np.arange(len(self.tokens)), count),
                "input": np.repeat(self.inputs, count),
                "token": np.repeat(self.token_texts, count),
                "term": np.tile(self.terms, len(self.tokens)),
                "kind": np.tile([term.partition(":")[0] for term in self.terms], len(self.tokens)),
                "logit": self.values.ravel(),
            }
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": list(self.tokens), "token_texts": list(self.token_texts), "terms": list(self.terms),
            "values": self.values.tolist(), "logits": self.logits.tolist(),
        }  # fmt: skip


@torch.no_grad()
def attribute(model: Any, text: Text, tokens: Sequence[int] | None = None) -> Attribution:
    """The shares that the embedding and every component have in the logit of a token, after each token of a text.

    tokens: one for each position; by default the model's own most probable ones.

    Raises InputError for a family whose components are not known, a head without rows or a norm that is no scaled
    linear map; SelfCheckError where the shares do not add up to the model's logits.
    """
    loaded = as_loaded(model)
    parts, ids = loaded.anatomy, read_text(loaded, text, "the text")
    rows = parts.head_rows
    sites: list[Site] = [
        site for pair in zip(*(all_sites(parts, branch) for branch in BRANCHES), strict=True) for site in pair
    ]
    with Capture(parts, [0, *sites, parts.depth]) as capture:
        normed = parts.decoder(input_ids=ids[None].to(parts.device), use_cache=False).last_hidden_state[0]
    logits = head_logits(parts, normed)
    wanted = logits.argmax(-1) if tokens is None else _wanted(parts, tokens, len(ids)).to(logits.device)
    last = capture[parts.depth][0]
    scale, centred, bias = held_norm(parts, last)
    reads = rows[wanted].double() * scale_of_logits(parts)  # (positions, width)
    gained = reads * parts.family.gain(parts.norm).double()
    if centred:
        gained = gained - gained.mean(-1, keepdim=True)
    shares = [(capture[site][0].double() * gained).sum(-1) * scale for site in (0, *sites)]
    terms = ["embedding", *map(str, sites)]
    if bool(bias.any()):
        terms.append("norm bias")
        shares.append((reads * bias).sum(-1))
    if parts.head.bias is not None:
        terms.append("head bias")
        shares.append(parts.head.bias.double()[wanted] * scale_of_logits(parts))
    at = torch.arange(len(ids), device=logits.device)
    found = logits[at, wanted].double()
    cap = parts.family.logit_cap(parts.config)
    if cap is not None:
        whole = torch.stack(shares).sum(0)
        terms.append("soft cap")
        shares.append(torch.tanh(whole / cap) * cap - whole)
    values = torch.stack(shares, -1)
    apart = (values.sum(-1) - found).abs()
    allowed = CHECK_TOLERANCE[parts.dtype] * (1 + values.abs().sum(-1))
    if not bool((apart <= allowed).all()):
        raise SelfCheckError(
            f"the shares of a logit add up to {float(apart.max()):.3g} more or less than it.",
            f"The layers of this {parts.family.model_type!r} model add something that probekit does not know.",
        )
    show = loaded.tokenizer.decode if loaded.tokenizer is not None else lambda ids: str(ids[0])
    named = wanted.tolist()
    return Attribution(
        loaded.name, tuple(show([int(token)]) for token in ids), tuple(named), tuple(show([each]) for each in named),
        tuple(terms), values.cpu().numpy(), found.cpu().numpy(),
    )  # fmt: skip


def scale_of_logits(parts: Anatomy) -> float:
    """What the model multiplies the head's products with."""
    factor, divisor = parts.family.logit_factor(parts.config), parts.family.logit_divisor(parts.config)
    return (1.0 if factor is None else factor) / (1.0 if divisor is None else divisor)


def held_norm(parts: Anatomy, residual: Tensor) -> tuple[Tensor, bool, Tensor]:
    """The final norm as a linear map of these residuals: (scale of each row, whether it takes the mean away, its bias).

    Found from what the norm gives: norm(h) = gain * h * scale + bias, or with h less its mean.
    Raises InputError for a norm that is neither.
    """
    bias = parts.norm(torch.zeros_like(residual[:1]))[0].double()
    given = parts.norm(residual).double() - bias
    gain, wide = parts.family.gain(parts.norm).double(), residual.double()
    for centred in (False, True):
        plain = gain * (wide - wide.mean(-1, keepdim=True) if centred else wide)
        scale = (given * plain).sum(-1) / plain.square().sum(-1)
        apart = (given - plain * scale[:, None]).norm(dim=-1) / given.norm(dim=-1)
        if float(apart.max()) <= NORM_TOLERANCE[parts.dtype]:
            return scale, centred, bias
    raise InputError(
        f"the final norm of this {parts.family.model_type!r} model ({type(parts.norm).__name__}) is no scaled linear "
        "map: its logits cannot be shared out.",
        "Read them with patches instead: probekit.patch.",
    )


def _wanted(parts: Anatomy, tokens: Sequence[int], length: int) -> Tensor:
    if len(tokens) != length:
        raise InputError(f"{len(tokens)} tokens were named for a text of {length}.", "Name one for each position.")
    if strange := [each for each in tokens if each not in range(parts.vocabulary)]:
        raise InputError(f"{strange[0]} is no token of this model: it has 0..{parts.vocabulary - 1}.")
    return torch.tensor([int(each) for each in tokens])
