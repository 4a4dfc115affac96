"""Geometry of embedding and unembedding: a token's two vectors, and the subspaces that both sets of vectors fill.

A token has a row in the embedding, which writes it into the residual stream, and a row in the head, which reads it. The
lens reads head(norm(h)), so the head's rows are compared as they read: multiplied by the final norm's gain.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.errors import InputError
from probekit.models.anatomy import Anatomy, check_unchanged
from probekit.prediction.intervals import Estimate

if TYPE_CHECKING:
    from probekit.traces.trace import Trace

FREQUENT = (64, 256)
"""Ranks that part the frequent tokens from the less frequent ones."""
ECHO_TOKENS = 4096
_BLOCK = 512


@torch.no_grad()
def reading_rows(parts: Anatomy) -> Tensor:
    """(vocabulary, width) float32: the head's rows times the final norm's gain: what each token reads of h / rms(h)."""
    return parts.head_rows.float() * parts.family.gain(parts.norm)


def row_cosines(one: Tensor, other: Tensor) -> Tensor:
    """(rows,): cosine of each row with the row of the same number. one, other: (rows, width)."""
    return torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)


def principal_cosines(one: Tensor, other: Tensor, dimensions: int) -> Tensor:
    """(dimensions,), falling: cosines of the principal angles between the principal subspaces of two sets of rows.

    The subspace of a set is spanned by its first `dimensions` principal directions, about its mean. Angles as in
    Bjorck and Golub, Math. Comp. 27 (1973), 579-594: singular values of the product of two orthonormal bases.
    """
    if not 1 <= dimensions <= min(one.shape[-1], len(one), len(other)):
        raise InputError(f"{dimensions} dimensions do not fit rows of shapes {tuple(one.shape)}, {tuple(other.shape)}.")
    bases = []
    for rows in (one, other):
        centred = rows.double() - rows.double().mean(dim=0)
        _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
        bases.append(directions[:, -dimensions:])
    return torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1.0).float()


def alignment(one: Tensor, other: Tensor, dimensions: int) -> float:
    """Mean squared cosine of the principal angles, 0..1: how far the two subspaces overlap."""
    return float(principal_cosines(one, other, dimensions).square().mean())


def alignment_by_chance(dimensions: int, width: int) -> Estimate:
    """The alignment of two random subspaces: its mean, and the 95 % that a normal law about it holds.

    With P, Q the projections, it is tr(P Q) / d, of mean d / D and variance 2 (D - d)^2 / (D^2 (D - 1) (D + 2)): the
    second moments of a uniformly random rotation (Collins and Sniady, arXiv math-ph/0402073). For lines, d = 1, it is a
    squared coordinate of a random unit vector, which follows a beta law.
    """
    mean = dimensions / width
    half = 1.96 * (width - dimensions) / width * math.sqrt(2 / ((width - 1) * (width + 2)))
    return Estimate(mean, mean - half, mean + half)


@torch.no_grad()
def echo_of_embedding(parts: Anatomy, ids: Tensor) -> Tensor:
    """(ids,) bool: read with norm and head, a token's own embedding says that token: the lens at layer 0 echoes."""
    rows = []
    for block in ids.split(_BLOCK):
        logits = parts.head(parts.norm(parts.embedding(block.to(parts.device)))).float()
        rows.append(logits.argmax(dim=-1).cpu() == block)
    return torch.cat(rows)


def token_counts(trace: Trace) -> np.ndarray:
    """(vocabulary,) int64: how often each token stands in a trace's texts, prompts and continuations."""
    ids = [np.concatenate([trace.prompt_ids(prompt), trace.outputs(prompt)]) for prompt in trace.prompts]
    return np.bincount(np.concatenate(ids), minlength=trace.manifest.model.vocabulary)


def frequency_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """{name: token ids}: the most frequent tokens, the next, the other ones that were seen, those that were not."""
    order = np.argsort(-counts, kind="stable")
    seen = int((counts > 0).sum())
    first, second = (min(rank, seen) for rank in FREQUENT)
    groups = {
        f"{FREQUENT[0]} most frequent": order[:first],
        f"next {FREQUENT[1] - FREQUENT[0]}": order[first:second],
        "seen less": order[second:seen],
        "not seen": order[seen:],
    }
    return {"all": order, **{name: ids for name, ids in groups.items() if len(ids)}}


@torch.no_grad()
def geometry_table(parts: Anatomy, name: str, counts: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Geometry of one model, a row for each group of tokens by frequency.

    Columns: model, tied, tokens (group), count, cosine (mean cosine of a token's embedding and its head row as it
    reads), cosine_lowest_tenth, cosine_highest_tenth (its 10 % and 90 % quantiles over tokens), cosine_of_others (the
    same for another token's row: the baseline), echo (share of the tokens whose embedding alone says them), dimensions,
    alignment (mean squared cosine of principal angles), and alignment_by_chance with _low and _high.
    """
    check_unchanged(parts)
    embedding, head = parts.embedding.weight.detach().float().cpu(), reading_rows(parts).cpu()
    if len(counts) != len(embedding):
        raise InputError(f"{len(counts)} counts were given for a vocabulary of {len(embedding)}.")
    random = np.random.default_rng(seed)
    cosines = row_cosines(embedding, head).numpy()
    others = row_cosines(embedding, head.roll(1, dims=0)).numpy()
    rows = []
    for group, ids in frequency_groups(counts).items():
        chosen = torch.from_numpy(np.ascontiguousarray(ids))
        low, high = np.quantile(cosines[ids], [0.1, 0.9])
        dimensions = min(math.ceil(parts.width / 8), len(ids) // 2)
        chance = alignment_by_chance(dimensions, parts.width)
        sampled = ids if len(ids) <= ECHO_TOKENS else random.choice(ids, ECHO_TOKENS, replace=False)
        rows.append(
            {
                "model": name,
                "tied": parts.tied,
                "tokens": group,
                "count": len(ids),
                "cosine": cosines[ids].mean(),
                "cosine_lowest_tenth": low,
                "cosine_highest_tenth": high,
                "cosine_of_others": others[ids].mean(),
                "echo": float(echo_of_embedding(parts, torch.from_numpy(np.ascontiguousarray(sampled))).float().mean()),
                "dimensions": dimensions,
                "alignment": alignment(embedding[chosen], head[chosen], dimensions) if dimensions else np.nan,
                "alignment_by_chance": chance.value,
                "alignment_by_chance_low": chance.low,
                "alignment_by_chance_high": chance.high,
            }
        )
    return pd.DataFrame(rows)
