"""What does tying do to the lens, and what does early-exit training do?

    python analyses/03_tied_or_untied.py [MODEL ...] -o build/analyses

Four looks, one table (column `part`):
    comparison    paired differences between the models, and the factor that explains each; with and without loops
    heads         one and the same model with its head rotated, swapped, or replaced by the embedding: echo, agreement,
                  KL and acceptance when the lens alone is changed, and when the model speaks with that head too
    geometry      cosine of a token's two vectors and alignment of their principal subspaces, by frequency of the token
    two by two    tied or not, plain or LayerSkip, over several seeds (from `train_reference_models.py two-by-two`)
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import seaborn as sns
import typer
import workbench
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import PALETTE
from probekit.tying.compare import compare_traces
from probekit.tying.factorial import factorial_effects
from probekit.tying.geometry import geometry_table, token_counts
from probekit.tying.head_swaps import head_effects, standard_heads, weights_digest
from probekit.tying.text_kinds import before_loops

NAME = "03_tied_or_untied"
HEAD_PROMPTS = 8
DRAFT_LENGTH = 4
LAYER_FIGURES = ("agrees", "echo", "gibberish", "kl", "held_out_loss")
EXIT_FIGURES = ("acceptance_rate", "tokens_per_round")
KEYS = ["part", "model", "other", "text", "loops", "head", "changed", "tokens", "layer", "quantity"]
SHOWN_DIFFERENCES = {
    "depth of half agreement, share of the depth": "depth of half agreement",
    "agreement at half of the depth": "agreement at L/2",
    "echo after 0 layers": "echo at the embedding",
    "gibberish in the first half of the layers": "gibberish, layers 1..L/2",
    "acceptance rate at half of the depth": f"acceptance rate at L/2, K = {DRAFT_LENGTH}",
}
COLUMNS = 3  # panels beside each other


@analysis
def main(
    work: Bench,
    two_by_two: Annotated[Path | None, typer.Option(help="Folder with the tables of the 2 x 2.")] = None,
    heads: Annotated[bool, typer.Option(help="Change the heads, too (the longest part).")] = True,
) -> None:
    """What does tying do to the lens, and what does early-exit training do?"""
    parts, traced = [], []
    for loaded in work.loaded():
        trace = work.trace(loaded)
        traced.append(trace)
        parts.append(geometry_rows(geometry_table(loaded.anatomy, loaded.name, token_counts(trace))))
        if heads:
            workbench.say(f"{loaded.name}: changing its head")
            before = weights_digest(loaded.model)
            few, changed = trace.select(trace.prompts[:HEAD_PROMPTS]), standard_heads(loaded.anatomy)
            for loops, texts in workbench.with_and_without_loops(few):
                effects = head_effects(loaded, texts, changed, draft_length=DRAFT_LENGTH, speak=loops == "with")
                parts += [rows.assign(loops=loops) for rows in head_rows(*effects)]
            assert weights_digest(loaded.model) == before, "an intervention left its mark on the weights"
    if len(traced) > 1:
        for loops, texts in (("with", traced), ("without", [before_loops(trace) for trace in traced])):
            parts.append(comparison_rows(compare_traces(texts).to_pandas()).assign(loops=loops))
    if two_by_two is not None:
        parts += two_by_two_rows(two_by_two)
    table = pd.concat(parts, ignore_index=True)
    table = table.reindex(columns=[*KEYS, "value", "low", "high", "factor"]).astype({"layer": "Int64"})
    work.write(NAME, table, draw(table), head_prompts=HEAD_PROMPTS, draft_length=DRAFT_LENGTH)


# ------------------------------------------------------------------------------------------------- the parts
def comparison_rows(differences: pd.DataFrame) -> pd.DataFrame:
    named = differences.rename(columns={"one": "model", "difference": "value"})
    return named[["model", "other", "quantity", "value", "low", "high", "factor"]].assign(part="comparison")


def head_rows(layers: pd.DataFrame, exits: pd.DataFrame) -> list[pd.DataFrame]:
    names = {name: name for name in ("echo", "agreement", "kl")}
    names |= {"echo_change": "change of echo", "agreement_change": "change of agreement"}
    rates = {"acceptance_rate": "acceptance rate", "tokens_per_round": "tokens per round"}
    exits = exits.rename(columns={"exit_layer": "layer"})
    parts = [tall(layers, column, name) for column, name in names.items()]
    parts += [tall(exits, column, name) for column, name in rates.items()]
    return [part.assign(part="heads") for part in parts]


def tall(frame: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    ends = {"value": frame[column], "low": frame[f"{column}_low"], "high": frame[f"{column}_high"]}
    return frame[["model", "head", "changed", "layer"]].assign(quantity=name, **ends)


def geometry_rows(table: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for column in ("cosine", "cosine_lowest_tenth", "cosine_highest_tenth", "cosine_of_others", "echo", "alignment",
                   "alignment_by_chance"):  # fmt: skip
        ends = {end: table.get(f"{column}_{end}", float("nan")) for end in ("low", "high")}
        name = column.replace("_", " ")
        parts.append(table[["model", "tokens"]].assign(quantity=name, value=table[column], **ends))
    return pd.concat(parts).assign(part="geometry")


def two_by_two_rows(folder: Path) -> list[pd.DataFrame]:
    """Effects at each layer and exit, and the means of each of the four kinds of model over seeds."""
    layers = pd.read_csv(folder / "two_by_two_layers.csv")
    exits = pd.read_csv(folder / "two_by_two_exits.csv")
    exits = exits[exits["draft_length"] == DRAFT_LENGTH].rename(columns={"exit_layer": "layer"})
    parts = []
    for frame, quantities in ((layers, LAYER_FIGURES), (exits, EXIT_FIGURES)):
        effects = factorial_effects(frame, quantities, ["text", "layer"])
        parts.append(effects.rename(columns={"effect": "factor"}).assign(part="two by two", model="effect"))
        means = frame.groupby(["text", "tied", "layerskip", "layer"])[list(quantities)].mean().reset_index()
        kind = means["tied"].map({True: "tied", False: "untied"}) + means["layerskip"].map(
            {True: ", LayerSkip", False: ", plain"}
        )
        for quantity in quantities:
            rows = means[["text", "layer"]].assign(model=kind, quantity=quantity, value=means[quantity])
            parts.append(rows.assign(part="two by two"))
    return parts


# ----------------------------------------------------------------------------------------------- the picture
def draw(table: pd.DataFrame) -> Figure:
    """Echo with the own and with changed heads; geometry by frequency; differences; the effects of the 2 x 2."""
    heads, geometry = table[(table["part"] == "heads") & (table["loops"] == "with")], table[table["part"] == "geometry"]
    differences = table[(table["part"] == "comparison") & (table["loops"] == "with")]
    effects = table[(table["part"] == "two by two") & (table["model"] == "effect") & (table["text"] == "given")]
    panels = [partial(echo_by_head, rows=rows, name=str(name)) for name, rows in heads.groupby("model", sort=False)]
    if len(differences):
        panels.append(partial(all_differences, rows=differences))
    panels += [partial(by_frequency, rows=geometry, quantity=quantity) for quantity in ("cosine", "alignment")]
    if len(effects):
        panels += [partial(effects_by_layer, rows=effects, quantity=quantity) for quantity in ("echo", "agrees", "kl")]
    columns = min(COLUMNS, len(panels))
    drawn, axes = workbench.figure(columns, -(-len(panels) // columns), width=2.9, height=2.4)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, panels, strict=False):
        panel(ax)
    return drawn


def echo_by_head(ax: Axes, rows: pd.DataFrame, name: str) -> None:
    shown = rows[(rows["quantity"] == "echo") & rows["changed"].isin(["nothing", "lens"])].astype({"layer": float})
    for colour, (head, of_head) in zip(sns.color_palette(PALETTE), shown.groupby("head", sort=False), strict=False):
        workbench.curve(ax, of_head, "layer", colour, f"{head} head", ls="-" if head == "own" else "--")
    ax.set(title=plain(name), xlabel="layer (0: embedding)", ylabel="echo (share of tokens)",
           ylim=(-0.02, 1.02))  # fmt: skip
    workbench.whole_numbers(ax)
    ax.legend(title="the lens reads with")


def by_frequency(ax: Axes, rows: pd.DataFrame, quantity: str) -> None:
    """Groups of tokens by frequency; for alignment what chance gives, for cosines the middle 80 % of the tokens."""
    wide = rows.pivot_table(index=["model", "tokens"], columns="quantity", values="value", sort=False)
    groups = list(dict.fromkeys(rows["tokens"]))
    models = list(dict.fromkeys(rows["model"]))
    for number, (colour, model) in enumerate(zip(sns.color_palette(PALETTE), models, strict=False)):
        found = wide.loc[model].reindex(groups)
        places = [place + 0.12 * (number - (len(models) - 1) / 2) for place in range(len(groups))]
        values, ends = found[quantity], None
        if quantity == "cosine":
            ends = [values - found["cosine lowest tenth"], found["cosine highest tenth"] - values]
        ax.errorbar(places, values, yerr=ends, fmt="o", color=colour, elinewidth=0.8, label=plain(model))
    if quantity == "alignment":
        chance = rows[(rows["quantity"] == "alignment by chance") & (rows["model"] == models[0])]
        chance = chance.set_index("tokens").reindex(groups)
        ax.plot(range(len(groups)), chance["value"], "_", color="black", markersize=14, label="by chance, 95 %")
        for place, (_, row) in enumerate(chance.iterrows()):
            ax.fill_between([place - 0.3, place + 0.3], row["low"], row["high"], color="grey", alpha=0.3, linewidth=0)
    label = "cosine, embedding and head" if quantity == "cosine" else "overlap of principal subspaces"
    ax.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
    ax.set(xlabel="tokens, by frequency", ylabel=label, ylim=(-0.25, 1.05) if quantity == "cosine" else (-0.02, 1.05))
    ax.legend(loc="center right")


def all_differences(ax: Axes, rows: pd.DataFrame) -> None:
    """Paired differences, first minus second, and the factor that explains each pair."""
    pairs = rows.groupby(["model", "other"], sort=False)
    for number, (colour, ((one, other), of_pair)) in enumerate(zip(sns.color_palette(PALETTE), pairs, strict=False)):
        found = of_pair.set_index("quantity").loc[list(SHOWN_DIFFERENCES)]
        places = [place + 0.2 * (number - (len(pairs) - 1) / 2) for place in range(len(found))]
        ends = [found["value"] - found["low"], found["high"] - found["value"]]
        label = f"{plain(one)} − {plain(other)}".replace("tales-", "") + f": {found['factor'].iloc[0]}"
        ax.errorbar(found["value"], places, xerr=ends, fmt="o", color=colour, elinewidth=0.8, label=label)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_yticks(range(len(SHOWN_DIFFERENCES)), list(SHOWN_DIFFERENCES.values()))
    ax.invert_yaxis()
    ax.set(xlabel="paired difference, first − second")
    ax.legend(loc="upper center", bbox_to_anchor=(0.3, -0.2))


def effects_by_layer(ax: Axes, rows: pd.DataFrame, quantity: str) -> None:
    for colour, factor in zip(sns.color_palette(PALETTE), ("tying", "training", "interaction"), strict=False):
        found = rows[(rows["quantity"] == quantity) & (rows["factor"] == factor)].astype({"layer": float})
        workbench.curve(ax, found, "layer", colour, factor)
    ax.axhline(0, color="black", linewidth=0.6)
    named = {"echo": "echo (share of tokens)", "agrees": "agreement (share of tokens)", "kl": "KL (nats)"}[quantity]
    ax.set(title="2 x 2 over seeds, given text", xlabel="layer (0: embedding)", ylabel=f"effect on {named}")
    workbench.whole_numbers(ax)
    ax.legend()


if __name__ == "__main__":
    typer.run(main)
