"""Which layers write the answer: attention or MLPs, early or late, in tied, untied and early-exit-trained models?

    python analyses/10_which_layers_write_the_answer.py MODEL ... --prompts 24 --max-new-tokens 48 -o build/analyses

The answer's lead is its logit less that of the model's second choice. It is shared out, exactly, to the embedding and
to each layer's attention and MLP (direct logit attribution, the final norm's scale held). Shares are of the lead,
summed over the positions that predict a token, so that a position where the model is sure weighs more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
import typer
import workbench
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.hooks.capture import Capture
from probekit.lens.lens import head_logits
from probekit.models.loaded import Loaded
from probekit.prediction.intervals import Estimate, Share, estimate
from probekit.presentation.plots.glyphs import plain
from probekit.probing.attribution import attribute
from probekit.traces.trace import Trace

NAME = "10_which_layers_write_the_answer"
COLOURS = {"embedding": "#999999", "attention": "#D55E00", "mlp": "#0072B2"}
KINDS = tuple(COLOURS)


@analysis
def main(work: Bench) -> None:
    """Which layers write the answer: attention or MLPs, early or late?"""
    parts = []
    for loaded in work.loaded():
        trace = work.trace(loaded, residuals=True)  # as 08 and 09, which leave it there
        leads = {prompt: lead_of(loaded, trace, prompt) for prompt in trace.prompts}
        for loops, cut in workbench.with_and_without_loops(trace):
            shares = shared(cut, leads, loaded.depth)
            parts.append(rows_of(shares).assign(model=loaded.name, loops=loops))
    columns = ["model", "loops", "layer", "quantity", "value", "low", "high"]
    table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    work.write(NAME, table, draw(table))


@torch.no_grad()
def lead_of(loaded: Loaded, trace: Trace, prompt: int) -> np.ndarray:
    """(kinds, L + 1, positions that predict a token): who wrote the lead of the model's token, the embedding at 0."""
    ids = [*trace.prompt_ids(prompt).tolist(), *trace.outputs(prompt).tolist()][:-1]
    parts, first = loaded.anatomy, len(trace.prompt_ids(prompt)) - 1
    with Capture(parts, [parts.depth]) as capture:
        parts.decoder(input_ids=torch.tensor([ids], device=parts.device), use_cache=False)
    best = head_logits(parts, parts.norm(capture[parts.depth][0])).topk(2).indices
    one, other = (attribute(loaded, ids, best[:, place].tolist()) for place in (0, 1))
    found = np.zeros((len(KINDS), loaded.depth + 1, len(ids) - first))
    for term, values in zip(one.terms, (one.values - other.values).T, strict=True):
        kind, _, layer = term.partition(":")
        if kind in KINDS:  # else a bias, or the soft cap
            found[KINDS.index(kind), int(layer) + 1 if layer else 0] += values[first:]
    return found


def shared(trace: Trace, leads: dict[int, np.ndarray], depth: int) -> Share:
    """Shares of the lead, (kinds, L + 1, prompts): of each text the positions that this trace has."""
    sums = np.stack([leads[each][..., : len(trace.outputs(each))].sum(-1) for each in trace.prompts], -1)
    return Share(sums, sums.sum(axis=(0, 1), keepdims=True), tuple(trace.prompts))


def rows_of(shares: Share) -> pd.DataFrame:
    """By layer and kind; and as sums over them."""
    rows: list[dict[str, Any]] = []
    low, high = shares.interval()
    for (kind, layer), value in np.ndenumerate(shares.values):
        if (layer == 0) == (kind == 0):
            ends = {"value": value, "low": low[kind, layer], "high": high[kind, layer]}
            rows.append({"layer": layer, "quantity": KINDS[kind], **ends})
    depth = shares.values.shape[1] - 1

    def told(quantity: str, found: Estimate, layer: float = np.nan) -> None:
        rows.append({"layer": layer, "quantity": quantity, **found._asdict()})

    for layer in range(depth + 1):
        so_far = estimate(shares, lambda each, layer=layer: each[:, : layer + 1].sum(axis=(0, 1)))
        told("written so far", so_far, layer)
    for place, kind in enumerate(KINDS):
        told(f"all {kind}", estimate(shares, lambda each, place=place: each[place].sum(axis=0)))
    told("half written", estimate(shares, lambda each: half(each.sum(axis=0))))
    told("half written, share of the depth", estimate(shares, lambda each: half(each.sum(axis=0)) / depth))
    third = depth - depth // 3
    told("last third", estimate(shares, lambda each: each[:, third + 1 :].sum(axis=(0, 1))))
    told("last layer", estimate(shares, lambda each: each[:, depth].sum(axis=0)))
    return pd.DataFrame(rows)


def half(written: np.ndarray) -> np.ndarray:
    """(draws,): from which layer on at least half of the lead is written, for good. written: (L + 1, draws)."""
    so_far = written.cumsum(axis=0)
    below = so_far < 0.5 * so_far[-1]
    return (len(so_far) - below[::-1].argmax(axis=0)) * below.any(axis=0).astype(float)


def draw(table: pd.DataFrame) -> Figure:
    """Above the share of each layer's attention and MLP, below what is written so far; a column a model."""
    models = list(dict.fromkeys(table["model"]))
    drawn, axes = workbench.figure(len(models), 2)
    rows = table[(table["loops"] == "with") & table["layer"].notna()]
    for column, model in enumerate(models):
        own = rows[rows["model"] == model]
        above, below = axes[:, column]
        for kind in KINDS:
            some = own[own["quantity"] == kind]
            if kind == "embedding":
                above.plot(some["layer"], some["value"], "s", color=COLOURS[kind], label=kind, markersize=4)
            else:
                workbench.curve(above, some, "layer", COLOURS[kind], "MLP" if kind == "mlp" else kind)
        above.axhline(0, color="grey", linewidth=0.6)
        above.set_title(plain(model).replace("-Instruct", "").split(".Q")[0])
        workbench.curve(below, own[own["quantity"] == "written so far"], "layer", "black")
        below.axhline(0.5, color="grey", linewidth=0.6)
        above.set_ylabel("share of the lead" if not column else "")
        below.set(xlabel="layer", ylabel="written so far" if not column else "")
        for ax in (above, below):
            workbench.whole_numbers(ax)
        if column == len(models) - 1:
            workbench.legend_beside(above)
    return drawn


if __name__ == "__main__":
    typer.run(main)
