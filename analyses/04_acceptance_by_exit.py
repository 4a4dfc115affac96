"""How does acceptance depend on the exit layer, and on the kind of text?

    python analyses/04_acceptance_by_exit.py [MODEL ...] -o build/analyses

The model's own greedy text, its sampled text (temperature 1) and given text (the prompts themselves) side by side, each
with and without loops; then apart by kind of prompt, place in the text and kind of token.
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
import typer
import workbench
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import PALETTE
from probekit.tying.text_kinds import acceptance_by_kind, side_by_side

NAME = "04_acceptance_by_exit"
TEXTS = ("greedy", "sampled", "given")
DRAFT_LENGTHS = (1, 4, 8)
SHOWN_DEPTH = 0.75  # the exit at which kinds are drawn, as a share of the depth
FEWEST = 20  # positions of a kind that is drawn
FIGURES = ("acceptance", "acceptance_rate", "alpha", "tokens_per_round")


@analysis
def main(work: Bench) -> None:
    """How does acceptance depend on the exit layer, and on the kind of text?"""
    parts = []
    for loaded in work.loaded():
        texts = {text: work.trace(loaded, text) for text in TEXTS}
        parts.append(cell_rows(side_by_side(texts, draft_lengths=DRAFT_LENGTHS)))
        for trace in texts.values():
            for loops, chosen in workbench.with_and_without_loops(trace):
                kinds = acceptance_by_kind(chosen, loaded.anatomy.exits).rename(columns={"acceptance": "value"})
                parts.append(kinds.assign(loops=loops, quantity="acceptance"))
    table = pd.concat(parts, ignore_index=True).astype({"draft_length": "Int64"})
    columns = ["model", "text", "loops", "by", "group", "layer", "draft_length", "quantity", "value", "low", "high"]
    work.write(NAME, table[[*columns, "positions"]], draw(table), draft_lengths=DRAFT_LENGTHS)


def cell_rows(wide: pd.DataFrame) -> pd.DataFrame:
    """The rounds' figures: by = "cell"; the share of looped tokens as a quantity of its own."""
    parts = []
    keys = wide[["model", "text", "loops", "draft_length"]].assign(by="cell", group="all", layer=wide["exit_layer"])
    for name in FIGURES:
        ends = {end: wide.get(f"{name}_{end}", float("nan")) for end in ("low", "high")}
        parts.append(keys.assign(quantity=name.replace("_", " "), value=wide[name], positions=wide["tokens"], **ends))
    once = wide.drop_duplicates(["model", "text", "loops"])
    looped = once[["model", "text", "loops"]].assign(by="all", group="all", layer=pd.NA, quantity="looped tokens")
    ends = {"low": once["looped_low"], "high": once["looped_high"]}
    parts.append(looped.assign(value=once["looped"], positions=once["tokens"], **ends))
    return pd.concat(parts, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Acceptance of one draft by exit for each text above; below, by kind at three quarters of the depth."""
    names = list(dict.fromkeys(table["model"]))
    one = table[(table["quantity"] == "acceptance") & (table["by"] != "cell")]
    kinds = one[(one["text"] == "greedy") & (one["by"] != "all") & (one["positions"] >= FEWEST)]
    groups = list(dict.fromkeys(zip(kinds["by"], kinds["group"], strict=True)))
    drawn, axes = workbench.figure(len(names), 2, height=1.2 + 0.09 * len(groups), beside=1.6)
    for column, name in enumerate(names):
        by_exit(axes[0][column], one[(one["model"] == name) & (one["by"] == "all")])
        axes[0][column].set(title=plain(name))
        rows = kinds[kinds["model"] == name]
        shown = round(SHOWN_DEPTH * (int(rows["layer"].max()) + 1))
        by_kind(axes[1][column], rows[rows["layer"] == shown], groups)
        axes[1][column].set(xlabel=f"acceptance at exit {shown}", title="greedy text")
        if column:
            axes[1][column].set_yticklabels([])
    axes[0][0].set_ylabel("acceptance of one draft")
    workbench.legend_beside(axes[0][-1])
    workbench.legend_beside(axes[1][-1])
    return drawn


def by_exit(ax: Axes, rows: pd.DataFrame) -> None:
    for colour, text in zip(sns.color_palette(PALETTE), TEXTS, strict=False):
        of_text = rows[rows["text"] == text].astype({"layer": int})
        workbench.curve(ax, of_text[of_text["loops"] == "with"], "layer", colour, f"{text} text")
        cut = of_text[of_text["loops"] == "without"]
        ax.plot(cut["layer"], cut["value"], ":", color=colour, linewidth=0.8)
    ax.plot([], [], ":", color="grey", linewidth=0.8, label="without loops")
    ax.set(xlabel="exit layer", ylim=(-0.02, 1.02))
    workbench.whole_numbers(ax)


def by_kind(ax: Axes, rows: pd.DataFrame, groups: list[tuple[str, str]]) -> None:
    """Filled: with loops; hollow, below it: without."""
    ways = list(dict.fromkeys(by for by, _ in groups))
    for colour, way in zip(sns.color_palette(PALETTE)[3:], ways, strict=False):
        for loops, lower, fill in (("with", -0.15, colour), ("without", 0.2, "white")):
            found = rows[(rows["by"] == way) & (rows["loops"] == loops)]
            places = [groups.index((way, group)) + lower for group in found["group"]]
            ends = [found["value"] - found["low"], found["high"] - found["value"]]
            label = f"{way}{', without loops' if loops == 'without' else ''}"
            ax.errorbar(found["value"], places, xerr=ends, fmt="o", color=colour, markerfacecolor=fill, markersize=3,
                        elinewidth=0.8, label=label)  # fmt: skip
    ax.set_yticks(range(len(groups)), [plain(group) for _, group in groups])
    ax.set(xlim=(-0.02, 1.02), ylim=(len(groups) - 0.4, -0.6))


if __name__ == "__main__":
    typer.run(main)
