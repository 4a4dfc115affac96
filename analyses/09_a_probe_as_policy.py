"""Does a probe's policy beat a fixed pair, and by how much of the oracle?

    python analyses/09_a_probe_as_policy.py MODEL ... --prompts 24 --max-new-tokens 48 -o build/analyses

On one half of the prompts the best fixed pair of exit layer and draft length is chosen, the best thresholds on the
lens's probability, entropy and margin, and the best threshold on a linear probe of acceptance; each is judged on the
other half, in predicted speedup and in rounds that the decoder runs (`--run N` prompts of them). Costs are those of a
roofline: the least that each step can take, the same on every run. The oracle knows every round beforehand.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
import workbench
from matplotlib.figure import Figure
from workbench import Bench, analysis

from probekit.choice.rank import oracle_of
from probekit.choice.ranking import Ranked
from probekit.costs.profile import Costs
from probekit.costs.roofline import roofline_costs
from probekit.drafting.drafters import traced_drafters
from probekit.models.loaded import Loaded
from probekit.prediction.intervals import draws, spread
from probekit.presentation.plots.glyphs import plain
from probekit.probing.acceptance import Compared, compare_policies
from probekit.traces.trace import Trace
from probekit.validation.ways import validate_ways

NAME = "09_a_probe_as_policy"
DRAFT_LENGTHS = range(1, 9)
CONTEXT = 128
ROOFLINE_DEVICE = "h200"


@analysis
def main(
    work: Bench,
    every: Annotated[int, typer.Option("--every", min=1, help="Draft from every so many layers, and the last.")] = 1,
    run: Annotated[int, typer.Option("--run", min=0, help="Run the chosen ways on so many judged prompts.")] = 0,
) -> None:
    """Does a probe's policy beat a fixed pair, and by how much of the oracle?"""
    parts = []
    for loaded in work.loaded():
        trace = work.trace(loaded, residuals=True)
        costs = roofline_costs(trace, device=ROOFLINE_DEVICE, context=CONTEXT)
        exits = sorted({*range(1, loaded.depth, every), loaded.depth - 1})
        for loops, cut in workbench.with_and_without_loops(trace):
            workbench.say(f"{loaded.name}: policies, {loops} loops")
            found = compare_policies(cut, costs, cut.prompts[::2], cut.prompts[1::2], exits, DRAFT_LENGTHS)
            own = [judged(cut, found, exits, costs)]
            if run and loops == "with":
                own.append(measured(loaded, trace.select(trace.prompts[1::2][:run]), found))
            parts.append(pd.concat(own, ignore_index=True).assign(model=loaded.name, loops=loops))
    columns = ["model", "loops", "policy", "way", "quantity", "value", "low", "high"]
    table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    work.write(NAME, table, draw(table), costs="roofline", context=CONTEXT, every=every, run=run)


def judged(trace: Trace, found: list[Compared], exits: list[int], costs: Costs) -> pd.DataFrame:
    """Speedups on the half that nothing was chosen on, beside the fixed pair's and the oracle's."""
    others = trace.select(trace.prompts[1::2])
    oracle = oracle_of(others, traced_drafters(trace, exits, draft_model=False), costs, max(DRAFT_LENGTHS))
    rows: list[dict[str, Any]] = [speedup("oracle", "", oracle)]
    fixed = next(each for each in found if each.name == "fixed").judged
    for each in found:
        policy = each.learned.policy
        threshold = getattr(policy, "threshold", None)
        way = f"layer {each.learned.keys[0].exit_layer}, up to {each.learned.draft_length}"
        way += "" if threshold is None else f", {threshold:g}"
        rows.append(speedup(each.name, way, each.judged))
        rows.append({"policy": each.name, "quantity": "over the fixed pair", **gain(each.judged, fixed)})
        share = float(oracle.seconds_of_prompt.sum() / each.judged.seconds_of_prompt.sum())
        rows.append({"policy": each.name, "quantity": "share of the oracle", "value": share})
        way_gained, most = each.judged.speedup - fixed.speedup, oracle.speedup - fixed.speedup
        rows.append(
            {"policy": each.name, "quantity": "share of the gap closed", "value": way_gained / most if most else np.nan}
        )
        rows.append({"policy": each.name, "quantity": "drafted per token", "value": each.judged.drafted_per_token})
    return pd.DataFrame(rows)


def speedup(name: str, way: str, ranked: Ranked) -> dict[str, Any]:
    low, high = ranked.interval or (np.nan, np.nan)
    return {"policy": name, "way": way, "quantity": "speedup", "value": ranked.speedup, "low": low, "high": high}


def gain(mine: Ranked, fixed: Ranked) -> dict[str, float]:
    """The difference of two speedups, with its interval over the same prompts."""
    times = draws(len(mine.seconds_of_prompt))
    drawn = times @ mine.plain_s_of_prompt / (times @ mine.seconds_of_prompt)
    low, high = spread(drawn - times @ fixed.plain_s_of_prompt / (times @ fixed.seconds_of_prompt))
    return {"value": mine.speedup - fixed.speedup, "low": float(low), "high": float(high)}


def measured(loaded: Loaded, trace: Trace, found: list[Compared]) -> pd.DataFrame:
    """Whether the decoder's rounds are the replay's, and how far drafted tokens were off."""
    rows = []
    for own, each in zip(validate_ways(loaded, trace, [each.learned for each in found]).ways, found, strict=True):
        for quantity, value in (
            ("rounds equal", own.rounds_equal), ("tokens equal", own.tokens_equal), ("near-ties", own.near_ties),
            ("unexplained", own.unexplained), ("rounds run", own.measured["rounds"]),
            ("error of drafts", own.drafted_error),
        ):  # fmt: skip
            rows.append({"policy": each.name, "quantity": quantity, "value": float(value)})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Predicted speedups on the judged prompts, a panel a model."""
    models = list(dict.fromkeys(table["model"]))
    drawn, axes = workbench.figure(len(models), height=2.3)
    rows = table[(table["loops"] == "with") & (table["quantity"] == "speedup")]
    order = ["fixed", "confidence", "entropy", "margin", "probe", "oracle"]
    for ax, model in zip(axes.flat, models, strict=True):
        own = rows[rows["model"] == model].set_index("policy").reindex(order)
        values = own["value"].to_numpy(float)
        reach = [values - own["low"].to_numpy(float), own["high"].to_numpy(float) - values]
        colours = ["#999999", "#D55E00", "#D55E00", "#D55E00", "#0072B2", "black"]
        for place, colour in enumerate(colours):
            at = [[part[place]] for part in reach]
            ax.errorbar([values[place]], [place], xerr=at, fmt="o", color=colour, markersize=4)
        ax.axvline(1.0, color="grey", linewidth=0.8)
        ax.set_yticks(range(len(order)), order)
        ax.set(xlabel="predicted speedup", ylim=(len(order) - 0.5, -0.5))
        ax.set_title(plain(model).replace("-Instruct", "").split(".Q")[0])
    return drawn


if __name__ == "__main__":
    typer.run(main)
