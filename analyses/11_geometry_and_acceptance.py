"""Does the geometry of the residual stream tell at which layer a draft would be accepted?

    python analyses/11_geometry_and_acceptance.py MODEL ... --prompts 24 --max-new-tokens 48 -o build/analyses

By layer: the length of the stream, what embedding, attention and MLPs wrote of it, its cosine with the layer before
and with the last, CKA and principal angles with the last. Each is related to agreement (greedy acceptance) over the
exits of a model, by rank; the mean of these correlations has its interval over models. Both can rise with depth and
know nothing of each other, so the same is told of what they change from exit to exit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import typer
import workbench
from matplotlib.figure import Figure
from scipy import stats
from workbench import Bench, analysis

from probekit.presentation.plots.glyphs import plain
from probekit.probing.stream_geometry import DIRECTIONS, QUANTITIES, stream_geometry

NAME = "11_geometry_and_acceptance"
PANELS = {
    "length": ("norm",),
    "share of the stream": ("embedding", "attention", "mlp"),
    "alike with the last": ("final_cosine", "cka", "overlap"),
    "step": ("step",),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73")
WORDS = {"mlp": "MLP", "final_cosine": "cosine", "cka": "CKA", "overlap": "principal angles"}


@analysis
def main(work: Bench) -> None:
    """Does the geometry of the residual stream tell at which layer a draft would be accepted?"""
    parts, related = [], []
    for loaded in work.loaded():
        trace = work.trace(loaded, residuals=True)  # as 08 and 09, which leave it there
        for loops, cut in workbench.with_and_without_loops(trace):
            workbench.say(f"{loaded.name}: geometry, {loops} loops")
            positions = sum(len(cut.outputs(prompt)) for prompt in cut.prompts)
            found = stream_geometry(loaded, cut, directions=min(DIRECTIONS, positions // 2))
            table = found.table.drop(columns="lens").assign(loops=loops)
            known = found.with_acceptance().assign(loops=loops)
            related.append(known)
            for column, words in (("correlation", "values"), ("of_steps", "steps")):
                rows = known[["model", "loops"]].assign(
                    quantity=known["quantity"] + f" with acceptance, {words}", value=known[column]
                )
                table = pd.concat([table, rows], ignore_index=True)
            parts.append(table)
    parts.append(over_models(pd.concat(related)))
    columns = ["model", "loops", "layer", "quantity", "value", "low", "high"]
    table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    work.write(NAME, table, draw(table))


def over_models(related: pd.DataFrame) -> pd.DataFrame:
    """The mean of the models' rank correlations, with Student's interval over the models."""
    rows: list[dict[str, Any]] = []
    for loops, own in related.groupby("loops", sort=False):
        for name in QUANTITIES:
            for column, words in (("correlation", "values"), ("of_steps", "steps")):
                values = own.loc[own["quantity"] == name, column].dropna().to_numpy(float)
                if not len(values):
                    continue
                half = np.nan
                if len(values) > 1:
                    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
                rows.append(
                    {
                        "model": "all", "loops": loops, "quantity": f"{name} with acceptance, {words}",
                        "value": values.mean(), "low": np.maximum(-1.0, values.mean() - half),
                        "high": np.minimum(1.0, values.mean() + half),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """A column a model, a row a group of quantities; agreement dashed beside what is alike with the last."""
    models = [model for model in dict.fromkeys(table["model"]) if model != "all"]
    drawn, axes = workbench.figure(len(models), len(PANELS), height=1.7)
    rows = table[(table["loops"] == "with") & table["layer"].notna() & table["value"].notna()]
    for column, model in enumerate(models):
        own = rows[rows["model"] == model]
        for row, (label, names) in enumerate(PANELS.items()):
            ax = axes[row, column]
            for colour, name in zip(COLOURS, names, strict=False):
                some = own[own["quantity"] == name]
                if len(some):
                    workbench.curve(ax, some, "layer", colour, WORDS.get(name, name))
            if label == "alike with the last":
                workbench.curve(ax, own[own["quantity"] == "agreement"], "layer", "black", "agreement", linestyle="--")
            ax.set_ylabel(label if not column else "")
            if label in ("length", "step"):
                ax.set_yscale("log")
            workbench.whole_numbers(ax)
            if column == len(models) - 1 and len(names) > 1:
                workbench.legend_beside(ax)
        axes[0, column].set_title(plain(model).replace("-Instruct", "").split(".Q")[0])
        axes[-1, column].set_xlabel("layer")
    return drawn


if __name__ == "__main__":
    typer.run(main)
