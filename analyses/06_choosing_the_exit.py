"""Which exit layer and draft length, after how many prompts, and does the choice hold on other text?

    python analyses/06_choosing_the_exit.py [MODEL ...] -o build/analyses

The best pairs with their intervals; a learning curve: the chance that the pair chosen on n prompts is within 2 % of
the best; and transfer: what a pair chosen on one kind of text loses on another. Costs are measured on this machine, or
those of a roofline (`--costs roofline`): the least that each step can take, the same on every run.
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import seaborn as sns
import typer
from matplotlib.figure import Figure
from workbench import OUTPUT, PROMPTS, TOKENS, TRACES, Device, Limit, Models, Output, Tokens, Traces, bench, figure

from probekit.models.loading import Loaded
from probekit.prediction.acceptance import predict
from probekit.prediction.choice import choose
from probekit.prediction.costs import Costs, measure_costs, roofline_costs
from probekit.presentation.plots import PALETTE, plain
from probekit.tracing.traces import Trace
from probekit.tying.certainty import NONE, Timed, learning_curve, timed, transfer
from probekit.tying.text_kinds import before_loops

NAME = "06_choosing_the_exit"
TEXTS = ("greedy", "sampled", "given")
DRAFT_LENGTHS = range(1, 9)
SIZES = (1, 2, 4, 8, 12, 24, 48)
CONTEXT = 128
ROOFLINE_DEVICE = "h200"
BEST = 3


def main(
    models: Models = None, output: Output = OUTPUT, traces: Traces = TRACES, prompts: Limit = PROMPTS,
    max_new_tokens: Tokens = TOKENS, device: Device = None,
    costs: Annotated[str, typer.Option(help="measured or roofline")] = "measured",
) -> None:  # fmt: skip
    """Which exit layer and draft length, after how many prompts, and does the choice hold on other text?"""
    if costs not in ("measured", "roofline"):
        raise typer.BadParameter(f"costs are {costs!r}; expected measured or roofline")
    with bench(models, output, traces, prompts, max_new_tokens, device) as work:
        parts, steps = [], {}
        for loaded in work.loaded():
            texts = {text: work.trace(loaded, text) for text in TEXTS}
            times = costs_of(loaded, texts["greedy"], costs)
            steps[loaded.name] = {
                name: getattr(times, name) for name in ("device", "autoregressive_s", "head_s", "overhead_s")
            }
            parts += [
                choice_rows(texts["greedy"], times, "with"),
                choice_rows(before_loops(texts["greedy"]), times, "without"),
            ]
            tables = {text: timed(predict(trace, None, DRAFT_LENGTHS), times) for text, trace in texts.items()}
            parts += learning_rows(tables["greedy"])
            parts.append(transfer_rows(tables, "text"))
            kinds = by_kind(texts["greedy"], tables["greedy"])
            if len(kinds) > 1:
                parts.append(transfer_rows(kinds, "kind of prompt"))
            parts = [
                part.assign(model=part["model"].fillna(loaded.name) if "model" in part else loaded.name)
                for part in parts
            ]
        table = pd.concat(parts, ignore_index=True)
        columns = ["model", "part", "loops", "option", "cell", "prompts", "chosen_on", "used_on", "quantity", "value",
                   "low", "high"]  # fmt: skip
        table = table.reindex(columns=columns).astype({"prompts": "Int64"})
        work.write(NAME, main.__doc__ or "", table, draw(table), costs=costs, context=CONTEXT, steps=steps)


def costs_of(loaded: Loaded, trace: Trace, source: str) -> Costs:
    if source == "measured":
        return measure_costs(loaded, CONTEXT, draft_lengths=DRAFT_LENGTHS)
    return roofline_costs(trace, device=ROOFLINE_DEVICE, context=CONTEXT)


def choice_rows(trace: Trace, costs: Costs, loops: str) -> pd.DataFrame:
    """The fastest pairs, whether or not they are faster than no drafting, and what is chosen."""
    choice = choose(predict(trace, None, DRAFT_LENGTHS), costs)
    rows = []
    for candidate in choice.ranking[:BEST]:
        low, high = candidate.interval or (float("nan"), float("nan"))
        cell = f"layer {candidate.exit_layer}, {candidate.draft_length} tokens"
        rows.append({"cell": cell, "quantity": "speedup", "value": candidate.speedup, "low": low, "high": high})
    rows.append(
        {
            "cell": rows[0]["cell"] if choice.speculate else NONE,
            "quantity": "speculate",
            "value": float(choice.speculate),
        }
    )
    return pd.DataFrame(rows).assign(part="choice", loops=loops, model=trace.manifest.model.name)


def learning_rows(table: Timed) -> list[pd.DataFrame]:
    """Free to refuse to speculate, and bound to speculate."""
    parts = []
    for option, chosen in (("may refuse", table), ("must speculate", table.without_none())):
        curve = learning_curve(chosen, SIZES)
        parts.append(
            curve[["prompts", "low", "high"]].assign(
                quantity="within 2 % of the best", value=curve["probability"], option=option
            )
        )
        parts.append(
            curve[["prompts"]].assign(quantity="share of the best speedup lost", value=curve["loss"], option=option)
        )
    return [part.assign(part="learning curve") for part in parts]


def by_kind(trace: Trace, table: Timed) -> dict[str, Timed]:
    """The same cells on the prompts of each kind; a single one is no kind."""
    kinds = trace.texts.groupby("kind")["prompt"].apply(list)
    return {str(kind): table.of(prompts) for kind, prompts in kinds.items() if len(prompts) > 1}


def transfer_rows(tables: dict[str, Timed], kind: str) -> pd.DataFrame:
    """Bound to speculate: where nothing gains, a choice still costs."""
    wide = transfer({name: table.without_none() for name, table in tables.items()})
    keys = wide[["chosen_on", "used_on", "cell"]].assign(part="transfer", option=kind)
    loss = keys.assign(
        quantity="share of the best speedup lost", value=wide["loss"], low=wide["loss_low"], high=wide["loss_high"]
    )
    return pd.concat([loss, keys.assign(quantity="speedup", value=wide["speedup"])])


def draw(table: pd.DataFrame) -> Figure:
    """The learning curves, and the loss of a choice made on another kind of text."""
    names = list(dict.fromkeys(table["model"]))
    drawn, axes = figure(1 + len(names), height=2.3)
    ax = axes[0][0]
    curves = table[(table["quantity"] == "within 2 % of the best") & (table["option"] == "must speculate")]
    for colour, (name, curve) in zip(sns.color_palette(PALETTE), curves.groupby("model", sort=False), strict=False):
        sizes = curve["prompts"].to_numpy(float)
        ax.plot(sizes, curve["value"], "o-", color=colour, label=plain(str(name)))
        ax.fill_between(sizes, curve["low"].to_numpy(float), curve["high"].to_numpy(float), color=colour, alpha=0.22)
    ax.set(xscale="log", xlabel="prompts", ylabel="chance of a pair within 2 % of the best", ylim=(-0.02, 1.02))
    ax.legend()
    losses = table[
        (table["part"] == "transfer")
        & (table["quantity"] == "share of the best speedup lost")
        & (table["option"] == "text")
    ]
    for ax, name in zip(axes[0][1:], names, strict=True):
        grid = losses[losses["model"] == name].pivot(index="chosen_on", columns="used_on", values="value").astype(float)
        order = [text for text in TEXTS if text in grid.index]
        sns.heatmap(grid.loc[order, order], annot=True, fmt=".2f", cmap="mako_r", vmin=0, vmax=0.3, cbar=False, ax=ax)
        ax.set(title=f"{plain(name)}: speedup lost", xlabel="used on", ylabel="chosen on")
    return drawn


if __name__ == "__main__":
    typer.run(main)
