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
import workbench
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from workbench import Bench, analysis

from probekit.choice.choose import choose
from probekit.choice.robustness import NONE, Timed, learning_curve, timed, transfer
from probekit.costs.measure import measure_costs
from probekit.costs.profile import Costs
from probekit.costs.roofline import roofline_costs
from probekit.models.loaded import Loaded
from probekit.prediction.predict import predict
from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import PALETTE
from probekit.traces.trace import Trace
from probekit.tying.text_kinds import before_loops

NAME = "06_choosing_the_exit"
TEXTS = ("greedy", "sampled", "given")
DRAFT_LENGTHS = range(1, 9)
SIZES = (1, 2, 4, 8, 12, 24, 48)
CONTEXT = 128
ROOFLINE_DEVICE = "h200"
BEST = 3
COLUMNS = 4  # panels beside each other


@analysis
def main(
    work: Bench,
    costs: Annotated[str, typer.Option(help="measured or roofline")] = "measured",
) -> None:
    """Which exit layer and draft length, after how many prompts, and does the choice hold on other text?"""
    workbench.check_costs(costs)
    parts, steps = [], {}
    for loaded in work.loaded():
        texts = {text: work.trace(loaded, text) for text in TEXTS}
        times = costs_of(loaded, texts["greedy"], costs)
        steps[loaded.name] = {
            name: getattr(times, name) for name in ("device", "autoregressive_s", "head_s", "overhead_s")
        }
        cut = {text: before_loops(trace) for text, trace in texts.items()}
        for loops, chosen in (("with", texts), ("without", cut)):
            rows = rows_of(chosen, times)
            parts.append(rows.assign(model=loaded.name, loops=loops))
    table = pd.concat(parts, ignore_index=True)
    columns = ["model", "part", "loops", "option", "cell", "prompts", "chosen_on", "used_on", "quantity", "value",
               "low", "high"]  # fmt: skip
    table = table.reindex(columns=columns).astype({"prompts": "Int64"})
    work.write(NAME, table, draw(table), costs=costs, context=CONTEXT, steps=steps)


def costs_of(loaded: Loaded, trace: Trace, source: str) -> Costs:
    if source == "measured":
        return measure_costs(loaded, CONTEXT, draft_lengths=DRAFT_LENGTHS)
    return roofline_costs(trace, device=ROOFLINE_DEVICE, context=CONTEXT)


def rows_of(texts: dict[str, Trace], costs: Costs) -> pd.DataFrame:
    """What is chosen, after how many prompts, and what it is worth on other text."""
    tables = {text: timed(predict(trace, None, DRAFT_LENGTHS), costs) for text, trace in texts.items()}
    parts = [choice_rows(texts["greedy"], costs), *learning_rows(tables["greedy"]), transfer_rows(tables, "text")]
    kinds = by_kind(texts["greedy"], tables["greedy"])
    if len(kinds) > 1:
        parts.append(transfer_rows(kinds, "kind of prompt"))
    return pd.concat(parts, ignore_index=True)


def choice_rows(trace: Trace, costs: Costs) -> pd.DataFrame:
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
    return pd.DataFrame(rows).assign(part="choice")


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
    """The learning curves, and the loss of a choice that was made on another text, or on another kind of prompt."""
    names = list(dict.fromkeys(table["model"]))
    losses = table[(table["part"] == "transfer") & (table["quantity"] == "share of the best speedup lost")]
    losses = losses[losses["loops"] == "with"]
    grids = [
        (name, option, found)
        for name in names
        for option in ("text", "kind of prompt")
        if len(found := losses[(losses["model"] == name) & (losses["option"] == option)]) > 4
    ]
    columns = min(COLUMNS, 1 + len(grids))
    drawn, axes = workbench.figure(columns, -(-(1 + len(grids)) // columns), width=2.9, height=2.4)
    for ax in axes.flat[1 + len(grids) :]:
        ax.set_axis_off()
    curves = table[(table["quantity"] == "within 2 % of the best") & (table["option"] == "must speculate")]
    learning(axes.flat[0], curves, names)
    for ax, (name, option, found) in zip(axes.flat[1:], grids, strict=False):
        transfers(ax, found)
        ax.set(title=f"{plain(name)}\nspeedup lost, %", xlabel=f"used on {option}", ylabel=f"chosen on {option}")
    return drawn


def learning(ax: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    for colour, name in zip(sns.color_palette(PALETTE), names, strict=False):
        found = rows[rows["model"] == name].astype({"prompts": int})
        workbench.curve(ax, found[found["loops"] == "with"], "prompts", colour, plain(name), marker="o")
        cut = found[found["loops"] == "without"]
        ax.plot(cut["prompts"], cut["value"], ":", color=colour, linewidth=0.8)
    ax.plot([], [], ":", color="grey", linewidth=0.8, label="without loops")
    ax.set(xscale="log", xlabel="prompts", ylabel="chance of a pair within 2 % of the best", ylim=(-0.02, 1.02))
    ax.set_xticks(SIZES, [str(size) for size in SIZES])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend()


def transfers(ax: Axes, losses: pd.DataFrame) -> None:
    order = list(dict.fromkeys(losses["chosen_on"]))
    grid, low, high = (
        (100 * losses.pivot(index="chosen_on", columns="used_on", values=column).astype(float)).loc[order, order]
        for column in ("value", "low", "high")
    )
    many = len(order) > len(TEXTS)
    notes = [
        [f"{grid.loc[i, j]:.1f}" + ("" if many else f"\n[{low.loc[i, j]:.1f}, {high.loc[i, j]:.1f}]") for j in order]
        for i in order
    ]
    sns.heatmap(grid, annot=notes, fmt="", cmap="mako_r", vmin=0, vmax=30, cbar=False, ax=ax, annot_kws={"size": 6.5})
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
    ax.tick_params(axis="x", rotation=90 if many else 0)


if __name__ == "__main__":
    typer.run(main)
