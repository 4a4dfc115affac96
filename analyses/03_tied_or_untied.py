"""What does tying do to the lens, and what does early-exit training do?

    python analyses/03_tied_or_untied.py [MODEL ...] -o build/analyses

Four looks, one table (column `part`):
    comparison    paired differences between the models, and the factor that explains each
    heads         one and the same model with its head rotated, swapped, or replaced by the embedding: echo, agreement,
                  KL and acceptance when the lens alone is changed, and when the model speaks with that head too
    geometry      cosine of a token's two vectors and alignment of their principal subspaces, by frequency of the token
    two by two    tied or not, plain or LayerSkip, over several seeds (from `train_reference_models.py two-by-two`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import seaborn as sns
import typer
from matplotlib.figure import Figure
from workbench import OUTPUT, PROMPTS, TOKENS, TRACES, Device, Limit, Models, Output, Tokens, Traces, bench, figure, say

from probekit.presentation.plots import PALETTE, plain
from probekit.tying.comparison import compare_traces
from probekit.tying.factorial import factorial_effects
from probekit.tying.geometry import geometry_table, token_counts
from probekit.tying.interventions import head_effects, standard_heads, weights_digest

NAME = "03_tied_or_untied"
HEAD_PROMPTS = 8
DRAFT_LENGTH = 4
LAYER_FIGURES = ("agrees", "echo", "gibberish", "kl", "held_out_loss")
EXIT_FIGURES = ("acceptance_rate", "tokens_per_round")
KEYS = ["part", "model", "other", "text", "head", "changed", "tokens", "layer", "quantity"]


def main(
    models: Models = None, output: Output = OUTPUT, traces: Traces = TRACES, prompts: Limit = PROMPTS,
    max_new_tokens: Tokens = TOKENS, device: Device = None,
    two_by_two: Annotated[Path | None, typer.Option(help="Folder with the tables of the 2 x 2.")] = None,
    heads: Annotated[bool, typer.Option(help="Change the heads, too (the longest part).")] = True,
) -> None:  # fmt: skip
    """What does tying do to the lens, and what does early-exit training do?"""
    with bench(models, output, traces, prompts, max_new_tokens, device) as work:
        parts, traced = [], []
        for loaded in work.loaded():
            trace = work.trace(loaded)
            traced.append(trace)
            parts.append(geometry_rows(geometry_table(loaded.anatomy, loaded.name, token_counts(trace))))
            if heads:
                say(f"{loaded.name}: changing its head")
                before = weights_digest(loaded.model)
                few = trace.select(trace.prompts[:HEAD_PROMPTS])
                parts += head_rows(
                    *head_effects(loaded, few, standard_heads(loaded.anatomy), draft_length=DRAFT_LENGTH)
                )
                assert weights_digest(loaded.model) == before, "an intervention left its mark on the weights"
        if len(traced) > 1:
            parts.append(comparison_rows(compare_traces(traced).to_pandas()))
        if two_by_two is not None:
            parts += two_by_two_rows(two_by_two)
        table = pd.concat(parts, ignore_index=True)
        table = table.reindex(columns=[*KEYS, "value", "low", "high", "factor"]).astype({"layer": "Int64"})
        work.write(NAME, main.__doc__ or "", table, draw(table), head_prompts=HEAD_PROMPTS, draft_length=DRAFT_LENGTH)


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
    for column in ("cosine", "cosine_of_others", "echo", "alignment", "alignment_by_chance"):
        spread = {end: table[f"cosine_{end}"] if column == "cosine" else float("nan") for end in ("low", "high")}
        name = column.replace("_", " ")
        parts.append(table[["model", "tokens"]].assign(quantity=name, value=table[column], **spread))
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
    """Echo with the own and with changed heads; a token's cosines; and the effects of the 2 x 2, where there is one."""
    heads, geometry = table[table["part"] == "heads"], table[table["part"] == "geometry"]
    effects = table[(table["part"] == "two by two") & (table["model"] == "effect") & (table["text"] == "greedy")]
    names = list(dict.fromkeys(heads["model"]))
    drawn, axes = figure(len(names) + 1 + (2 if len(effects) else 0))
    panels = list(axes[0])
    for name in names:
        ax = panels.pop(0)
        rows = heads[
            (heads["model"] == name) & (heads["quantity"] == "echo") & heads["changed"].isin(["nothing", "lens"])
        ]
        for colour, (head, curve) in zip(sns.color_palette(PALETTE), rows.groupby("head", sort=False), strict=False):
            ax.plot(
                curve["layer"],
                curve["value"],
                color=colour,
                label=f"{head} head",
                linestyle="-" if head == "own" else "--",
            )
        ax.set(title=plain(name), xlabel="layer", ylabel="echo (share of tokens)", ylim=(-0.02, 1.02))
        ax.legend()
    ax = panels.pop(0)
    cosines = geometry[geometry["quantity"] == "cosine"]
    sns.pointplot(data=cosines, x="tokens", y="value", hue="model", palette=PALETTE, ax=ax, errorbar=None, markersize=3)
    ax.tick_params(axis="x", rotation=40)
    ax.set(xlabel="", ylabel="cosine of embedding and head row")
    for ax, quantity in zip(panels, ("echo", "agrees"), strict=False):
        for colour, factor in zip(sns.color_palette(PALETTE), ("tying", "training"), strict=False):
            rows = effects[(effects["quantity"] == quantity) & (effects["factor"] == factor)].sort_values("layer")
            layers = rows["layer"].to_numpy(float)
            ax.plot(layers, rows["value"], color=colour, label=f"effect of {factor}")
            ax.fill_between(layers, rows["low"].to_numpy(float), rows["high"].to_numpy(float), color=colour, alpha=0.22)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(title="2 x 2 over seeds", xlabel="layer", ylabel=f"effect on {quantity} (share of tokens)")
        ax.legend()
    return drawn


if __name__ == "__main__":
    typer.run(main)
