"""How does acceptance depend on the exit layer, and on the kind of text?

    python analyses/04_acceptance_by_exit.py [MODEL ...] -o build/analyses

The model's own greedy text, its sampled text (temperature 1) and given text (the prompts themselves) side by side, each
with and without loops; then apart by kind of prompt, place in the text and kind of token.
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
import typer
from matplotlib.figure import Figure
from workbench import OUTPUT, PROMPTS, TOKENS, TRACES, Device, Limit, Models, Output, Tokens, Traces, bench, figure

from probekit.presentation.plots import PALETTE, plain
from probekit.tying.text_kinds import acceptance_by_kind, before_loops, side_by_side

NAME = "04_acceptance_by_exit"
TEXTS = ("greedy", "sampled", "given")
DRAFT_LENGTHS = (1, 4, 8)
SHOWN_DEPTH = 0.75  # the exit at which kinds are drawn, as a share of the depth
FEWEST = 20  # positions of a kind that is drawn
FIGURES = ("acceptance", "acceptance_rate", "alpha", "tokens_per_round")


def main(
    models: Models = None, output: Output = OUTPUT, traces: Traces = TRACES, prompts: Limit = PROMPTS,
    max_new_tokens: Tokens = TOKENS, device: Device = None,
) -> None:  # fmt: skip
    """How does acceptance depend on the exit layer, and on the kind of text?"""
    with bench(models, output, traces, prompts, max_new_tokens, device) as work:
        parts = []
        for loaded in work.loaded():
            texts = {text: work.trace(loaded, text) for text in TEXTS}
            parts.append(cell_rows(side_by_side(texts, draft_lengths=DRAFT_LENGTHS)))
            for trace in texts.values():
                for loops, chosen in (("with", trace), ("without", before_loops(trace))):
                    kinds = acceptance_by_kind(chosen, loaded.anatomy.exits).rename(columns={"acceptance": "value"})
                    parts.append(kinds.assign(loops=loops, quantity="acceptance"))
        table = pd.concat(parts, ignore_index=True).astype({"draft_length": "Int64"})
        columns = ["model", "text", "loops", "by", "group", "layer", "draft_length", "quantity", "value", "low", "high"]
        work.write(NAME, main.__doc__ or "", table[[*columns, "positions"]], draw(table), draft_lengths=DRAFT_LENGTHS)


def cell_rows(wide: pd.DataFrame) -> pd.DataFrame:
    """The rounds' figures: by = "cell"; the share of looped tokens as a quantity of its own."""
    parts = []
    keys = wide[["model", "text", "loops", "draft_length"]].assign(by="cell", group="all", layer=wide["exit_layer"])
    for name in FIGURES:
        ends = {end: wide.get(f"{name}_{end}", float("nan")) for end in ("low", "high")}
        parts.append(keys.assign(quantity=name.replace("_", " "), value=wide[name], positions=wide["tokens"], **ends))
    once = wide.drop_duplicates(["model", "text", "loops"])
    looped = once[["model", "text", "loops"]].assign(by="all", group="all", layer=pd.NA, quantity="looped tokens")
    parts.append(looped.assign(value=once["looped"], positions=once["tokens"]))
    return pd.concat(parts, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Acceptance of one draft by exit for each text above; below, by kind at three quarters of the depth."""
    names = list(dict.fromkeys(table["model"]))
    drawn, axes = figure(len(names), 2, height=2.4)
    one = table[(table["quantity"] == "acceptance") & (table["by"] != "cell") & (table["loops"] == "with")]
    for column, name in enumerate(names):
        rows = one[one["model"] == name]
        ax = axes[0][column]
        for colour, text in zip(sns.color_palette(PALETTE), TEXTS, strict=False):
            curve = rows[(rows["by"] == "all") & (rows["text"] == text)]
            layers = curve["layer"].to_numpy(int)
            ax.plot(layers, curve["value"], color=colour, label=f"{text} text")
            ax.fill_between(
                layers, curve["low"].to_numpy(float), curve["high"].to_numpy(float), color=colour, alpha=0.22
            )
        ax.set(title=plain(name), xlabel="exit layer", ylabel="acceptance of one draft", ylim=(-0.02, 1.02))
        ax = axes[1][column]
        depth = int(rows["layer"].max()) + 1
        kinds = rows[(rows["text"] == "greedy") & (rows["layer"] == round(SHOWN_DEPTH * depth)) & (rows["by"] != "all")]
        kinds = kinds[kinds["positions"] >= FEWEST]
        colours = dict(zip(dict.fromkeys(kinds["by"]), sns.color_palette(PALETTE), strict=False))
        places = range(len(kinds))
        bars = [kinds["value"] - kinds["low"], kinds["high"] - kinds["value"]]
        for place, (_, row) in zip(places, kinds.iterrows(), strict=True):
            ax.plot(row["value"], place, "o", color=colours[row["by"]])
        ax.errorbar(kinds["value"], places, xerr=bars, fmt="none", ecolor="grey", elinewidth=0.8)
        ax.set_yticks(list(places), [plain(group) for group in kinds["group"]])
        ax.invert_yaxis()
        ax.set(xlabel=f"acceptance at exit {round(SHOWN_DEPTH * depth)}, greedy text")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


if __name__ == "__main__":
    typer.run(main)
