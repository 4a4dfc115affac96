"""The geometry of the residual stream, layer by layer: how long it is, who wrote it, and how near it is to its end.

Over the positions that predict a token of a trace's texts. What a branch wrote is measured by its projection: the sum
of all that attention has added to h[l], times h[l], over |h[l]|^2, and so for the MLPs and the embedding. These three
shares add up to 1 at every layer, also where some are negative. CKA (linear centred kernel alignment; Kornblith et al.,
arXiv 1905.00414) tells how far the rows of two layers are alike but for a rotation and a scale, the overlap of their
principal subspaces how far they vary in the same directions. CKA is the debiased one (Song et al., JMLR 13, 2012): 0
for unrelated rows even where the width is no less than their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.hooks.components import BRANCHES, Component, Site, all_sites
from probekit.html_tables import HtmlCell, html_table
from probekit.models.anatomy import Anatomy, check_unchanged
from probekit.models.loaded import as_loaded
from probekit.prediction.intervals import Share
from probekit.progress import Progress, usual_progress
from probekit.settings import whole_number
from probekit.traces.trace import Trace, as_trace

ROWS = 1024
"""Positions that CKA and principal angles are of, drawn evenly; the other figures are of all."""
DIRECTIONS = 16
SHARES = ("embedding", *BRANCHES)
QUANTITIES = ("norm", *SHARES, "step", "cosine", "final_cosine", "cka", "overlap")


@dataclass(frozen=True, eq=False)
class StreamGeometry:
    """A row a layer and a quantity, h being the stream after that layer and H the last, before the final norm.

    table: columns model, lens, layer, quantity, value, low, high (95 % over prompts; NaN of cka and overlap, which are
    of all rows at once). Quantities:
        norm: mean length of h.
        embedding, attention, mlp: what they wrote of h so far; the three add up to 1. None of a family whose
            components are not known.
        step: mean of |h - h before| / |h before|. cosine: mean cosine of h with the layer before.
        final_cosine: mean cosine of h with H, position by position.
        cka: of h with H, 1 where they differ by a rotation and a scale. overlap: mean squared cosine of the principal
            angles between the first directions of h and of H.
        agreement: share of positions where the lens says the model's token: greedy acceptance, if drafted.
    directions: of the overlap. chance: the overlap of unrelated subspaces.
    """

    model: str
    depth: int
    positions: int
    directions: int
    chance: float
    table: pd.DataFrame

    def of(self, quantity: str) -> pd.DataFrame:
        """layer, value, low, high of a quantity; layer by layer."""
        rows = self.table[self.table["quantity"] == quantity]
        if rows.empty:
            known = ", ".join(dict.fromkeys(self.table["quantity"]))
            raise InputError(f"there is no {quantity!r} in this geometry; there are {known}.")
        return rows[["layer", "value", "low", "high"]].reset_index(drop=True)

    def to_pandas(self) -> pd.DataFrame:
        """A row a layer: model, lens, layer, and each quantity with its _low and _high; as `plots.by_layer` asks."""
        wide = self.table.pivot(index="layer", columns="quantity", values=["value", "low", "high"])
        names = list(dict.fromkeys(self.table["quantity"]))
        columns = {
            f"{name}{end}": wide[kind, name].to_numpy()
            for name in names
            for kind, end in (("value", ""), ("low", "_low"), ("high", "_high"))
        }
        return pd.DataFrame({"model": self.model, "lens": "stream", "layer": wide.index.to_numpy(), **columns})

    def with_acceptance(self) -> pd.DataFrame:
        """How each quantity goes with acceptance over the exits: a row a quantity: quantity, correlation, of_steps.

        correlation: Spearman's, of the quantity and of agreement at exits 1..L-1. of_steps: of what both change from
        one exit to the next, so that it is not enough that both rise with depth. NaN where one of them never changes.
        """
        accepted = self.of("agreement")["value"].to_numpy()[1:-1]
        rows = []
        for name in QUANTITIES:
            if name in set(self.table["quantity"]):
                mine = self.of(name)["value"].to_numpy()[1:-1]
                rows.append(
                    {
                        "model": self.model, "quantity": name, "correlation": spearman(mine, accepted),
                        "of_steps": spearman(np.diff(mine), np.diff(accepted)),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        layers: list[dict[str, Any]] = [{"layer": layer} for layer in range(self.depth + 1)]
        for row in self.table.to_dict("records"):
            found, name = layers[row["layer"]], row["quantity"]
            found[name] = None if np.isnan(row["value"]) else row["value"]
            if not np.isnan(row["low"]):
                found[f"{name}_interval"] = [row["low"], row["high"]]
        known = self.with_acceptance()
        related = known[["quantity", "correlation", "of_steps"]].astype(object)
        return {
            "schema": "probekit/geometry/1", "model": self.model, "positions": self.positions,
            "directions": self.directions, "overlap_by_chance": self.chance, "layers": layers,
            "with_acceptance": related.where(related.notna(), None).to_dict("records"),
        }  # fmt: skip

    def _repr_html_(self) -> str:
        wide = self.to_pandas()
        names = [name for name in (*QUANTITIES, "agreement") if name in wide]
        rows = [
            (str(layer), [HtmlCell("-" if np.isnan(each) else f"{each:.3g}", 0.0) for each in values])
            for layer, values in zip(wide["layer"], wide[names].to_numpy(float), strict=True)
        ]
        return html_table(f"the stream of {self.model}, over {self.positions} positions", "layer", names, rows)


@torch.no_grad()
def stream_geometry(
    model: Any,
    trace: Trace | str,
    *,
    rows: int = ROWS,
    directions: int = DIRECTIONS,
    progress: Progress | None = None,
) -> StreamGeometry:
    """Read a trace's texts once more, and measure the stream at every layer.

    Parameters
    ----------
    model: the one that was traced: loaded, wrapped, or its name.
    rows: positions that CKA and principal angles are computed of. directions: of each principal subspace.
    progress: called as `progress("geometry", done, total)`.

    Raises InputError for another model than the traced one, and for fewer rows than directions.

    Examples
    --------
    >>> import probekit
    >>> model = probekit.load("tales-tied", device="cpu")
    >>> trace = probekit.trace(model, ["Once upon a time", "The king"], max_new_tokens=16)
    >>> found = probekit.stream_geometry(model, trace, directions=4)
    >>> written = found.to_pandas()[["embedding", "attention", "mlp"]].sum(axis=1)
    >>> bool((abs(written - 1) < 1e-3).all())
    True
    """
    loaded, trace = as_loaded(model), as_trace(trace)
    parts = loaded.anatomy
    check_unchanged(parts)
    if trace.manifest.model.weights_hash != loaded.weights_hash:
        raise InputError(
            f"the run is of {trace.manifest.model.name}; {loaded.name} is another model (other weights).",
            "Measure the model that was traced.",
        )
    counts = {prompt: len(trace.outputs(prompt)) for prompt in trace.prompts}
    total = sum(counts.values())
    directions = whole_number("the number of directions must be", directions)
    rows = min(whole_number("the number of rows must be", rows), total)
    if rows < max(4, directions + 1) or directions > parts.width:
        raise InputError(
            f"{directions} directions cannot be told from {rows} positions of width {parts.width}.",
            "Ask for fewer directions, or trace more text.",
        )
    chosen = np.zeros(total, dtype=bool)
    chosen[np.linspace(0, total - 1, rows).round().astype(int)] = True
    report, done = usual_progress(progress), 0
    sums: list[dict[str, Tensor]] = []
    held: list[list[Tensor]] = [[] for _ in parts.sites]
    for place, (prompt, count) in enumerate(counts.items()):
        report("geometry", place, len(counts))
        states, written = _read(parts, trace, prompt)
        sums.append(_measured(states, written))
        mine = torch.from_numpy(np.flatnonzero(chosen[done : done + count]))
        for layer, state in enumerate(states):
            held[layer].append(state[mine])
        done += count
    report("geometry", len(counts), len(counts))
    denominators = np.array([float(count) for count in counts.values()])
    prompts = tuple(counts)
    table = []
    for name in sums[0]:
        share = Share(torch.stack([each[name] for each in sums], -1).numpy(), denominators[None], prompts)
        low, high = share.interval()
        table += _rows(name, share.values, low, high)
    right = np.stack([trace.agreement(prompt).sum(axis=1) for prompt in prompts], axis=-1)
    agreement = Share(right.astype(float), denominators[None], prompts, (0.0, 1.0))
    table += _rows("agreement", agreement.values, *agreement.interval())
    whole = [torch.cat(each) for each in held]
    last, last_basis = _gram(whole[-1]), _basis(whole[-1], directions)
    for layer, state in enumerate(whole):
        table.append(_row("cka", layer, debiased_cka(_gram(state), last)))
        cosines = torch.linalg.svdvals(_basis(state, directions).T @ last_basis)
        table.append(_row("overlap", layer, float(cosines.square().mean().clamp(max=1))))
    frame = pd.DataFrame(table).assign(model=loaded.name, lens="stream")
    columns = ["model", "lens", "layer", "quantity", "value", "low", "high"]
    return StreamGeometry(loaded.name, parts.depth, total, directions, directions / parts.width, frame[columns])


def _read(parts: Anatomy, trace: Trace, prompt: int) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """h[0..L] at the scored positions of a text, (rows, width) float64 each, and what each branch wrote by layer."""
    ids = np.concatenate([trace.prompt_ids(prompt), trace.outputs(prompt)])[:-1]
    first = len(trace.prompt_ids(prompt)) - 1
    known = parts.family.branches is not None and parts.family.decodes
    branches: list[Site] = [site for branch in BRANCHES for site in all_sites(parts, branch)] if known else []
    with Capture(parts, [*parts.sites, *branches]) as capture:
        parts.decoder(input_ids=torch.from_numpy(ids)[None].to(parts.device), use_cache=False)
    states = [capture[site][0, first:].double().cpu() for site in parts.sites]
    written: dict[str, list[Tensor]] = {}
    for site in branches:
        if isinstance(site, Component):
            written.setdefault(site.branch, []).append(capture[site][0, first:].double().cpu())
    return states, written


def _measured(states: list[Tensor], written: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """{quantity: (layers,)}: sums over the rows of one text; NaN at a layer that has none."""
    h = torch.stack(states)  # (layers, rows, width)
    lengths = h.norm(dim=-1)
    found = {"norm": lengths.sum(-1)}
    if written:
        so_far = {"embedding": h[:1].expand_as(h)}
        for branch, pieces in written.items():
            so_far[branch] = torch.cat([torch.zeros_like(h[:1]), torch.stack(pieces).cumsum(0)])
        for name, part in so_far.items():
            found[name] = ((part * h).sum(-1) / lengths.square()).sum(-1)
    none = torch.full((1,), torch.nan, dtype=h.dtype)
    found["step"] = torch.cat([none, ((h[1:] - h[:-1]).norm(dim=-1) / lengths[:-1]).sum(-1)])
    found["cosine"] = torch.cat([none, torch.cosine_similarity(h[1:], h[:-1], dim=-1).sum(-1)])
    found["final_cosine"] = torch.cosine_similarity(h, h[-1:], dim=-1).sum(-1)
    return found


def _rows(name: str, values: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[dict[str, Any]]:
    return [_row(name, layer, *each) for layer, each in enumerate(zip(values, low, high, strict=True))]


def _row(name: str, layer: int, value: float, low: float = np.nan, high: float = np.nan) -> dict[str, Any]:
    return {"layer": layer, "quantity": name, "value": float(value), "low": float(low), "high": float(high)}


def _gram(rows: Tensor) -> Tensor:
    """(rows, rows): products of all pairs, with nothing on the diagonal."""
    centred = rows - rows.mean(0)
    products = centred @ centred.T
    return products.fill_diagonal_(0.0)


def debiased_cka(one: Tensor, other: Tensor) -> float:
    """Linear CKA of two sets of rows by their products of pairs, (rows, rows) with a diagonal of zeros.

    From the unbiased estimate of HSIC (Song et al., 2012, equation 5). It may fall a little below 0.
    """

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        n = len(a)
        whole = a.sum() * b.sum() / ((n - 1) * (n - 2))
        crossed = 2 / (n - 2) * (a.sum(0) @ b.sum(0))
        return ((a * b).sum() + whole - crossed) / (n * (n - 3))

    scale = hsic(one, one) * hsic(other, other)
    return float(hsic(one, other) / scale.sqrt()) if scale > 0 else float("nan")


def _basis(rows: Tensor, directions: int) -> Tensor:
    """(width, directions): an orthonormal basis of the rows' first principal directions, about their mean."""
    centred = rows - rows.mean(0)
    return torch.linalg.svd(centred, full_matrices=False).Vh[:directions].T


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of the places where both are known; NaN where one never changes, or there are fewer than 3."""
    known = ~(np.isnan(one) | np.isnan(other))
    if known.sum() < 3 or np.ptp(one[known]) == 0 or np.ptp(other[known]) == 0:
        return float("nan")
    return float(stats.spearmanr(one[known], other[known]).statistic)
