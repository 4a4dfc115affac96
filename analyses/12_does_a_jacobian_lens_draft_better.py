"""Does an exit draft better through the model's own average derivative than through a fitted head?

    python analyses/12_does_a_jacobian_lens_draft_better.py MODEL ... --prompts 24 --max-new-tokens 48 -o build/analyses

What stands before the model's own norm and head: nothing (the logit lens), the head that ridge regression finds in
closed form, the Jacobian lens of `jlens`, which counts what a residual does to all later positions, the same with what
it does to its own position only, and that expanded about the mean residual, which gives it an offset. Heads and
derivatives are of what the model writes after one half of the prompts and their beginnings; agreement and acceptance
are of the other half. `--texts` texts are enough for the derivatives, which cost width / 2 readings of each; the closed
form has all of them, and once more the same ones only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
import workbench
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.errors import InputError
from probekit.lens.exit_heads import ExitHead, fit_heads
from probekit.lens.jacobian import LONGEST, SKIP, fit_jacobian
from probekit.models.loaded import Loaded
from probekit.prediction.intervals import SHARE, Share, difference
from probekit.prediction.predict import predict
from probekit.presentation.plots.glyphs import plain
from probekit.traces.trace import Trace
from probekit.tracing.self_generated import self_generated_texts
from probekit.tracing.tracer import trace
from probekit.tying.text_kinds import acceptance_where

NAME = "12_does_a_jacobian_lens_draft_better"
DRAFT_LENGTH = 4
COLOURS = {
    "logit lens": "#999999", "closed form": "#D55E00", "closed form, same texts": "#E69F00", "jacobian": "#0072B2",
    "jacobian, same position": "#56B4E9", "jacobian, about the mean": "#009E73",
}  # fmt: skip
PAIRS = (
    ("jacobian", "logit lens"), ("jacobian", "closed form"), ("jacobian", "closed form, same texts"),
    ("jacobian, same position", "jacobian"), ("jacobian, about the mean", "logit lens"),
    ("jacobian, about the mean", "closed form"), ("jacobian, about the mean", "closed form, same texts"),
    ("closed form", "logit lens"),
)  # fmt: skip


@analysis
def main(
    work: Bench,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Texts that the derivatives are averaged over.")] = 24,
    every: Annotated[int, typer.Option("--every", min=1, help="Draft from every so many layers, and the last.")] = 1,
    lowest: Annotated[int, typer.Option("--lowest", min=1, help="The first exit: lower ones cost more.")] = 1,
    longest: Annotated[int, typer.Option("--longest", min=2, help="Tokens after which these texts are cut.")] = LONGEST,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Tokens at a text's beginning that do not count.")] = SKIP,
    same: Annotated[bool, typer.Option(help="Also the derivative at the same position only.")] = True,
) -> None:
    """Does an exit draft better through the model's own average derivative than through a fitted head?"""
    parts = []
    for loaded in work.loaded():
        prompts = work.prompts_for(loaded)
        first = min(lowest, loaded.depth - 1)
        exits = sorted({*range(first, loaded.depth, every), loaded.depth - 1})
        judged = {}
        for lens, heads, cost in lenses(work, loaded, exits, texts, longest, skip, same):
            workbench.say(f"{loaded.name}: {lens}")
            run = trace(
                loaded, prompts[1::2], max_new_tokens=work.max_new_tokens, statistics="agreement", exit_heads=heads,
            )  # fmt: skip
            judged[lens] = run
            parts.append(pd.DataFrame(cost).assign(model=loaded.name, lens=lens))
        for loops in ("with", "without"):
            cut = {lens: dict(workbench.with_and_without_loops(run))[loops] for lens, run in judged.items()}
            parts.append(compared(cut, exits).assign(model=loaded.name, loops=loops))
    columns = ["model", "loops", "lens", "other", "layer", "quantity", "value", "low", "high"]
    table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    work.write(NAME, table, draw(table), texts=texts, every=every, lowest=lowest, longest=longest, skip=skip, same=same)


def lenses(
    work: Bench, loaded: Loaded, exits: list[int], texts: int, longest: int, skip: int, same: bool
) -> Iterator[tuple[str, dict[int, ExitHead] | None, list[dict[str, Any]]]]:
    """(name, heads, what it cost) of each."""
    yield "logit lens", None, []
    written = [
        torch.tensor([ids + tokens])
        for ids, tokens in self_generated_texts(loaded, work.prompts_for(loaded)[::2], work.max_new_tokens)
    ]
    long = [ids[:, :longest] for ids in written if ids.shape[1] >= skip + 2]
    if not long:
        raise InputError(f"the model wrote no text of {skip + 2} tokens.", "Give --skip or --max-new-tokens.")
    few = [long[place * len(long) // min(texts, len(long))] for place in range(min(texts, len(long)))]
    parts = loaded.anatomy
    ways = {
        "closed form": (written, lambda ids: fit_heads(parts, ids, exits)),
        "closed form, same texts": (few, lambda ids: fit_heads(parts, ids, exits)),
        "jacobian": (few, lambda ids: fit_jacobian(parts, ids, exits, skip=skip)),
    }
    if same:
        own = partial(fit_jacobian, parts, exits=exits, skip=skip, same_position=True, centred=True)
        ways["jacobian, about the mean"] = (few, own)
    for name, (read, fit) in ways.items():
        workbench.say(f"{loaded.name}: fitting {name} on {len(read)} texts")
        heads = fit(read)
        yield name, heads, [
            {"quantity": "texts", "value": len(read)},
            {"quantity": "tokens", "value": sum(ids.shape[1] for ids in read)},
        ]  # fmt: skip
    if same:  # the same derivatives without the offset
        yield (
            "jacobian, same position",
            {e: ExitHead(h.change, torch.zeros_like(h.offset)) for e, h in heads.items()},
            [],
        )


def compared(runs: dict[str, Trace], exits: list[int]) -> pd.DataFrame:
    """Agreement and acceptance of each lens, by exit; the paired differences, and how many of them are clear."""
    rows: list[dict[str, Any]] = []
    agreement = {lens: acceptance_where(run).at(exits) for lens, run in runs.items()}
    drafts = {lens: accepted(run, exits) for lens, run in runs.items()}
    for quantity, shares in (("agreement", agreement), ("acceptance rate", drafts)):
        for lens, share in shares.items():
            rows += by_layer(exits, share.values, *share.interval(), quantity=quantity, lens=lens)
        for lens, other in PAIRS:
            if lens not in shares:
                continue
            gap = difference(shares[lens], shares[other])
            rows += by_layer(
                exits, gap.values, gap.low, gap.high, quantity=f"{quantity} gained", lens=lens, other=other
            )
            best, worst = int(np.nanargmax(gap.values)), int(np.nanargmin(gap.values))
            for name, value in (
                ("exits better", int((gap.low > 0).sum())), ("exits worse", int((gap.high < 0).sum())),
                ("exits", len(exits)), ("mean gained", float(np.nanmean(gap.values))),
                ("exit of most gained", exits[best]), ("exit of most lost", exits[worst]),
            ):  # fmt: skip
                rows.append({"quantity": f"{quantity}: {name}", "lens": lens, "other": other, "value": value})
    return pd.DataFrame(rows)


def accepted(run: Trace, exits: list[int]) -> Share:
    """(exits,): accepted of the drafts in rounds of DRAFT_LENGTH."""
    table = predict(run, exits, [DRAFT_LENGTH])
    cells = [table.cell(layer, DRAFT_LENGTH) for layer in exits]
    counts = (np.stack([np.asarray(getattr(cell, name), float) for cell in cells]) for name in
              ("accepted_of_prompt", "drafted_of_prompt"))  # fmt: skip
    return Share(*counts, tuple(run.prompts), SHARE)


def by_layer(
    exits: list[int], values: np.ndarray, low: np.ndarray, high: np.ndarray, **more: str
) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "value": float(value), "low": float(one), "high": float(two), **more}
        for layer, value, one, two in zip(exits, values, low, high, strict=True)
    ]


def draw(table: pd.DataFrame) -> Figure:
    """Agreement by exit above, acceptance rate below, a column a model."""
    models = list(dict.fromkeys(table["model"]))
    drawn, axes = workbench.figure(len(models), 2)
    rows = table[(table["loops"] == "with") & table["layer"].notna()]
    for column, model in enumerate(models):
        for row, quantity in enumerate(("agreement", "acceptance rate")):
            ax = axes[row, column]
            for lens, colour in COLOURS.items():
                own = rows[(rows["model"] == model) & (rows["quantity"] == quantity) & (rows["lens"] == lens)]
                if len(own):
                    workbench.curve(ax, own, "layer", colour, lens)
            label = quantity if row == 0 else f"{quantity}, {DRAFT_LENGTH} drafts"
            ax.set(xlabel="exit layer", ylabel=label if not column else "", ylim=(0, 1))
            workbench.whole_numbers(ax)
            if row == 0:
                ax.set_title(plain(model).replace("-Instruct", "").split(".Q")[0])
            if column == len(models) - 1 and row == 0:
                workbench.legend_beside(ax)
    return drawn


if __name__ == "__main__":
    typer.run(main)
