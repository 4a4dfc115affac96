"""What is the best exit worth on prose and on code, in models of different families?

    python analyses/07_prose_and_code.py MODEL ... --prompts 24 --max-new-tokens 48 -o build/analyses

Of the bundled prompts, prose are the stories and the questions, code the programming tasks. For each: the best pair of
exit layer and draft length with its predicted speedup, whether or not it is faster than no drafts, and the depth of
half agreement. Costs are those of a roofline: the least that each step can take, the same on every run.
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
import typer
import workbench
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.choice.choose import choose
from probekit.costs.profile import Costs
from probekit.costs.roofline import roofline_costs
from probekit.models.loaded import Loaded
from probekit.prediction.predict import predict
from probekit.presentation.plots.glyphs import plain
from probekit.presentation.plots.style import PALETTE
from probekit.traces.trace import Trace
from probekit.tying.shares import half_agreement

NAME = "07_prose_and_code"
TEXTS = {"prose": {"story", "question"}, "code": {"code"}}
DRAFT_LENGTHS = range(1, 9)
CONTEXT = 128
ROOFLINE_DEVICE = "h200"


@analysis
def main(work: Bench) -> None:
    """What is the best exit worth on prose and on code, in models of different families?"""
    parts = []
    for loaded in work.loaded():
        trace = work.trace(loaded)
        costs = roofline_costs(trace, device=ROOFLINE_DEVICE, context=CONTEXT)
        both = [rows_of(cut, costs).assign(loops=loops) for loops, cut in workbench.with_and_without_loops(trace)]
        parts += [part.assign(model=loaded.name) for part in (facts(loaded), *both)]
    columns = ["model", "loops", "text", "cell", "quantity", "value", "low", "high"]
    table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    work.write(NAME, table, draw(table), costs="roofline", context=CONTEXT)


def facts(loaded: Loaded) -> pd.DataFrame:
    """Whether embedding and head are one tensor, and how far apart they are: |E - W| / |E|, over all numbers."""
    parts = loaded.anatomy
    embedding, head = parts.embedding.weight, parts.head.weight
    apart = float((embedding - head).norm() / embedding.norm())
    figures = {"tied": float(parts.tied), "head apart from embedding": apart, "layers": parts.depth}
    return pd.DataFrame([{"quantity": name, "value": value} for name, value in figures.items()])


def rows_of(trace: Trace, costs: Costs) -> pd.DataFrame:
    """The best pair and the depth of half agreement on each kind of text that has two prompts or more."""
    rows = []
    kinds = trace.texts.set_index("prompt")["kind"]
    for text, wanted in {**TEXTS, "all": set(kinds)}.items():
        prompts = [int(prompt) for prompt, kind in kinds.items() if kind in wanted]
        if len(prompts) < 2:
            continue
        some = trace.select(prompts)
        best = choose(predict(some, None, DRAFT_LENGTHS), costs).ranking[0]
        low, high = best.interval or (float("nan"), float("nan"))
        cell = f"layer {best.exit_layer}, {best.draft_length} tokens"
        half = half_agreement(some)
        rows += [
            {"text": text, "cell": cell, "quantity": "speedup", "value": best.speedup, "low": low, "high": high},
            {"text": text, "quantity": "exit layer", "value": best.exit_layer},
            {"text": text, "quantity": "draft length", "value": best.draft_length},
            {"text": text, "quantity": "prompts", "value": len(prompts)},
            {"text": text, "quantity": "half agreement", **half._asdict()},
        ]
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """The best predicted speedup of each model on each text."""
    drawn, axes = workbench.figure(1, width=3.4, height=2.4)
    ax = axes.flat[0]
    rows = table[(table["quantity"] == "speedup") & (table["loops"] == "with")]
    names, texts = list(dict.fromkeys(rows["model"])), list(dict.fromkeys(rows["text"]))
    for place, (colour, text) in enumerate(zip(sns.color_palette(PALETTE), texts, strict=False)):
        found = rows[rows["text"] == text].set_index("model").reindex(names)
        at = [position + 0.2 * (place - (len(texts) - 1) / 2) for position in range(len(names))]
        values = found["value"].to_numpy(float)
        reach = [values - found["low"].to_numpy(float), found["high"].to_numpy(float) - values]
        ax.errorbar(values, at, xerr=reach, fmt="o", color=colour, label=text, markersize=4)
    ax.axvline(1.0, color="grey", linewidth=0.8)
    ax.set_yticks(range(len(names)), [plain(name) for name in names])
    ax.set(xlabel="predicted speedup of the best pair", ylim=(len(names) - 0.5, -0.5))
    ax.legend()
    return drawn


if __name__ == "__main__":
    typer.run(main)
