"""What does the residual stream know that the lens does not say: whether a draft is accepted, and the answer itself?

    python analyses/08_what_the_residual_knows.py MODEL ... --prompts 24 --max-new-tokens 48 -o build/analyses

Of each exit layer: how well a linear probe of the residual tells accepted drafts from others (AUROC, on prompts that
it was not fitted on), beside the lens's probability, entropy and margin there, both together, the position alone, and
shuffled labels. And from which layer on the model's token is linearly there: the share of tokens that a ridge map to
the last residual finds, beside the lens.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
import workbench
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.errors import InputError
from probekit.presentation.plots.glyphs import plain
from probekit.probing.linear_answer import linear_answer
from probekit.probing.probe import probe
from probekit.traces.trace import Trace

NAME = "08_what_the_residual_knows"
COLOURS = {"probe": "#0072B2", "confidence": "#D55E00", "together": "#009E73", "position": "#999999", "lens": "#D55E00"}
FIGURES = ("probability", "entropy", "margin")
LEAST = 0.02  # a share of accepted drafts nearer to 0 or 1 leaves nothing to tell apart


@analysis
def main(
    work: Bench,
    every: Annotated[int, typer.Option("--every", min=1, help="Probe every so many layers, and the last exit.")] = 1,
) -> None:
    """What does the residual stream know that the lens does not say?"""
    parts = []
    for loaded in work.loaded():
        trace = work.trace(loaded, residuals=True)
        layers = sorted({*range(1, loaded.depth, every), loaded.depth - 1})
        for loops, cut in workbench.with_and_without_loops(trace):
            workbench.say(f"{loaded.name}: acceptance, {loops} loops")
            own = [acceptance(cut, layers)]
            workbench.say(f"{loaded.name}: the linear answer, {loops} loops")
            own.append(answers(linear_answer(loaded, cut, [0, *layers]), loaded.depth))
            parts.append(pd.concat(own, ignore_index=True).assign(model=loaded.name, loops=loops))
    columns = ["model", "loops", "layer", "quantity", "value", "low", "high"]
    table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    work.write(NAME, table, draw(table), every=every)


def acceptance(trace: Trace, layers: list[int]) -> pd.DataFrame:
    """AUROC of everything that could tell accepted drafts, by layer; and the layer where the residual adds most."""
    rows: list[dict[str, Any]] = []
    try:
        found = probe(trace, "accepted", layers).layers
    except InputError as error:
        workbench.say(str(error))  # no exit has both accepted and rejected drafts
        return pd.DataFrame([{"quantity": "share accepted", "value": np.nan}])
    for each in found:
        rows.append({"layer": each.layer, "quantity": "share accepted", "value": each.share})
        for kind, name in (
            ("probe", "score"),
            *((name, name) for name in ("confidence", "together", "position", "control")),
        ):
            rows.append({"layer": each.layer, "quantity": f"auroc {kind}", **getattr(each, name)._asdict()})
        rows += [
            {"layer": each.layer, "quantity": f"auroc {name}", "value": value} for name, value in each.alone.items()
        ]
        rows.append({"layer": each.layer, "quantity": "added to the lens", **each.added._asdict()})
        rows.append({"layer": each.layer, "quantity": "calibration error", "value": each.ece})
    told = [each for each in found if LEAST <= each.share <= 1 - LEAST and each.added.known is not None]
    if told:
        gains = [each.added.value for each in told]
        over = [each.score.value - each.confidence.value for each in told]
        best = told[int(np.argmax(gains))]
        rows += [
            {"quantity": "most added to the lens", **best.added._asdict()},
            {"quantity": "layer of most added", "value": best.layer},
            {"quantity": "mean added to the lens", "value": float(np.mean(gains))},
            {"quantity": "mean probe less lens", "value": float(np.mean(over))},
            {"quantity": "layers that are told apart", "value": len(told)},
            {"quantity": "layers with something added", "value": sum(each.added.low > 0 for each in told)},
        ]
    return pd.DataFrame(rows)


def answers(table: pd.DataFrame, depth: int) -> pd.DataFrame:
    """Shares of tokens by layer, and from where on half of them are said: by the lens, and by a linear map."""
    rows = table.assign(quantity="answer by " + table["kind"])[["layer", "quantity", "value", "low", "high"]]
    halves = []
    for kind in ("lens", "probe"):
        values = table[table["kind"] == kind].sort_values("layer")
        halves.append({"quantity": f"half said by {kind}", "value": half(values["layer"], values["value"], depth)})
    both = table.pivot(index="layer", columns="kind", values="value")
    lead = both["probe"] - both["lens"]
    halves += [
        {"quantity": "most that the probe leads", "value": float(lead.max())},
        {"quantity": "layer of that lead", "value": int(lead.idxmax())},
        {"quantity": "half said by probe less lens", "value": halves[1]["value"] - halves[0]["value"]},
    ]
    return pd.concat([rows, pd.DataFrame(halves)], ignore_index=True)


def half(layers: pd.Series, values: pd.Series, depth: int) -> float:
    """Where the share first reaches one half, straight lines between the layers that were read; 1 at the depth."""
    xs, ys = [*layers.tolist(), depth], [*values.tolist(), 1.0]
    if ys[0] >= 0.5:
        return float(xs[0])
    first = next(place for place, value in enumerate(ys) if value >= 0.5)
    x, y = xs[first - 1], ys[first - 1]
    return float(x + (xs[first] - x) * (0.5 - y) / (ys[first] - y))


def draw(table: pd.DataFrame) -> Figure:
    """Above the AUROC for acceptance, below the answer, a column a model."""
    models = list(dict.fromkeys(table["model"]))
    drawn, axes = workbench.figure(len(models), 2)
    rows = table[(table["loops"] == "with") & table["layer"].notna() & table["value"].notna()]
    for column, model in enumerate(models):
        for row, kinds, front, label in (
            (0, ("probe", "confidence", "together", "position"), "auroc", "AUROC for acceptance"),
            (1, ("probe", "lens"), "answer by", "says the model's token"),
        ):
            ax = axes[row, column]
            for kind in kinds:
                own = rows[(rows["model"] == model) & (rows["quantity"] == f"{front} {kind}")]
                if len(own):
                    name = {"confidence": "lens confidence", "together": "both"}.get(kind, kind)
                    workbench.curve(ax, own, "layer", COLOURS[kind], name)
            ax.set(xlabel="layer", ylabel=label if not column else "", ylim=(0.4, 1.0) if row == 0 else (0, 1))
            workbench.whole_numbers(ax)
            if row == 0:
                ax.set_title(plain(model).replace("-Instruct", "").split(".Q")[0])
                ax.axhline(0.5, color="grey", linewidth=0.6)
            if column == len(models) - 1:
                workbench.legend_beside(ax)
    return drawn


if __name__ == "__main__":
    typer.run(main)
