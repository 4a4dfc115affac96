"""From the records of `validate_on_gpu.py`: the targets, the figure, and the page of the documentation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from benchmarking import paper_figure, target
from gpu_plan import Part, Plan

from probekit.presentation.plots.rounds import predicted_against_measured

NOT_RUN = "Not yet run on a GPU"


def dialled_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for cell in found["cells"].values() for row in cell.get("rows", ())]


def targets(found: Mapping[str, Any], plan: Plan) -> Iterator[dict[str, Any]]:
    """What the records are held against, as far as there are records."""
    largest = next(iter(plan.shapes))
    step = found["costs"].get(f"{largest} at {plan.contexts[0]}")
    if step:
        what = f"autoregressive step of {largest} at {step['context']} tokens: share of the copy's bandwidth"
        yield target(what, list(step["share_of_copy"].values()), at_least=0.8)
    product = found["micro"].get(f"{largest} head's product")
    if product:
        shares = list(product["share_of_product"].values())
        yield target(f"head's product of {largest}: share of the square product's rate", shares, at_least=0.8)
    lens = found["peers"].get("lens")
    if lens:
        (whole,) = (row for row in lens["rows"] if row["way"] == "all statistics")
        what = f"lens of {lens['model']}, all statistics: share of the square product's rate"
        yield target(what, list(whole["share_of_product"].values()), at_least=0.8)
    rows = dialled_rows(found)
    if rows:
        misses = [abs(row["speedup_predicted"] / row["speedup_measured"] - 1) for row in rows]
        yield target("widest miss of a predicted speedup", [max(misses)], at_most=0.05)
    near = [row for row in rows if row["model"] == largest and row["share"] == min(plan.shares)]
    alphas = {row["dial"]: row["alpha_predicted"] for row in near if row["alpha_predicted"] is not None}
    if alphas:
        dial = min(alphas, key=lambda dial: abs(alphas[dial] - 0.8))
        best = max((row for row in near if row["dial"] == dial), key=lambda row: row["speedup_measured"])
        what = f"speedup of {largest} at E/L {best['share']:g} and alpha {alphas[dial]:.2f} (asked for at .80)"
        yield target(what, [best["speedup_measured"]], at_least=1.7)


def judged(found: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    for line in targets(found, plan):
        asked = f"at most {line['at_most']:g}" if line["at_most"] is not None else f"at least {line['at_least']:g}"
        yield f"{'met   ' if line['met'] else 'MISSED'} {line['what']}: {line['measured']['p50']:.3g} ({asked})"


def draw(folder: Path, found: Mapping[str, Any]) -> None:
    """Predicted against measured speedup of every cell on record."""
    rows = dialled_rows(found)
    if not rows:
        return
    frame = pd.DataFrame([{name: row[name] for name in ("speedup_predicted", "speedup_measured")} for row in rows])
    frame["model"] = [f"{row['model']}, exit {row['exit_layer']} of {row['depth']}" for row in rows]
    frame[["speedup_measured_20", "speedup_measured_80"]] = [row["speedup_measured_quantiles"] for row in rows]
    with paper_figure(folder, "predicted_and_measured", 3.35, 3.2) as figure:
        axes = figure.subplots()
        predicted_against_measured(frame, "speedup", ax=axes)
        axes.get_legend().set_loc("lower right")  # where speculation was expected to gain more than it did


# ------------------------------------------------------------------------------------------------- the page
def fill_page(folder: Path) -> str:
    """The page, with a table for each part that is on record and a plain word for each that is not."""
    records = {
        part: json.loads((folder / f"{part}.json").read_text(encoding="utf-8")) if (folder / f"{part}.json").is_file()
        else None
        for part in Part
    }  # fmt: skip
    some = next((record for record in records.values() if record), None)
    lines = ["# On a GPU", ""]
    if some is None:
        lines += [f"**{NOT_RUN}**: there is no record, and so no figure on this page."]
        lines += [
            "`python analyses/validate_on_gpu.py --all` makes the records, and `--page` fills this page from them.",
            "",
        ]
    else:
        versions = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
        lines += [
            f"Measured on {some['machine']['name']}, {some['settings']['dtype']} ({versions}); attention kernels in "
        ]
        lines += [
            f"the order {', '.join(some['attention_order'])}. Made by `python analyses/validate_on_gpu.py --page`.",
            "",
        ]
        if some["settings"]["miniature"]:
            lines += ["**A miniature**: tiny shapes, to see that the way is clear. These figures mean nothing.", ""]
    for part, (title, table) in PARTS.items():
        record = records[part]
        rows = list(table(record["cells"])) if record else []
        lines += [f"## {title}", *(["", *rows] if rows else [f"{NOT_RUN}."]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    return [
        "| " + " | ".join(names) + " |", "|" + "---|" * len(names),
        *("| " + " | ".join(map(shown, row)) + " |" for row in rows),
    ] if rows else []  # fmt: skip


def _smoke(cells: Mapping[str, Any]) -> list[str]:
    rows = [[name, found["passed"], found["says"]] for name, found in cells.items() if "passed" in found]
    if "a captured round" in cells:
        found = cells["a captured round"]
        rows += [
            ["a captured round: tokens and rounds as the host's", found["same_tokens"] and found["same_rounds"], ""]
        ]
    if "rates" in cells:
        rows += [["copy (GB/s)", None, cells["rates"]["copy"]["p50"] / 1e9]]
        rows += [["product (TFLOP/s)", None, cells["rates"]["product"]["p50"] / 1e12]]
    return _table(("what", "holds", "says"), rows)


def _micro(cells: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, found in cells.items():
        for each in found.get("rows", ()) if isinstance(found.get("rows"), list) else ():
            rows.append([f"{name}, {each['rows']} rows", 1e6 * each["seconds"]["p50"], each["share_of_copy"]["p50"]])
        if "masked" in found:
            rows.append([f"{name}, masked", 1e6 * found["masked"]["p50"], None])
        if "share_of_product" in found:
            rows.append(
                [f"{name} (share of the product)", 1e6 * found["seconds"]["p50"], found["share_of_product"]["p50"]]
            )
        if "rows_per_s" in found:
            rows.append([f"{name} (rows/s)", found["rows_per_s"]["p50"], found["share_of_copy"]["p50"]])
    return _table(("what", "us", "share of the limit"), rows)


def _costs(cells: Mapping[str, Any]) -> list[str]:
    rows = [
        [found["model"], found["context"], each["step"], 1e3 * each["seconds"], 1e3 * each["roofline_s"]]
        for found in cells.values() for each in found.get("steps", ())
    ]  # fmt: skip
    return _table(("model", "context", "step", "ms", "roofline ms"), rows)


def _cells(cells: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["model"], row["exit_layer"], row["draft_length"], row["dial"], row["alpha_predicted"], row["rounds_equal"],
         row["ties"], row["unexplained"], row["speedup_predicted"], row["speedup_measured"]]
        for row in dialled_rows({"cells": cells})
    ]  # fmt: skip
    names = (
        "model",
        "exit",
        "drafts",
        "dial",
        "alpha",
        "rounds equal",
        "ties",
        "unexplained",
        "speedup predicted",
        "measured",
    )
    return _table(names, rows)


def _peers(cells: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["way"], row["tokens_per_s"]["p20"], row["tokens_per_s"]["p50"], row["tokens_per_s"]["p80"]]
        for found in cells.values() for row in found.get("rows", ())
    ]  # fmt: skip
    return _table(("way", "tokens/s, 20 %", "50 %", "80 %"), rows)


def _weights(cells: Mapping[str, Any]) -> list[str]:
    return _table(("model", "what the study says"), [[found["name"], found["sentence"]] for found in cells.values()])


PARTS = {
    Part.SMOKE: ("Does it run", _smoke),
    Part.MICRO: ("Products, attention and kernels alone", _micro),
    Part.COSTS: ("What steps cost", _costs),
    Part.CELLS: ("Predicted and measured", _cells),
    Part.PEERS: ("Beside others", _peers),
    Part.WEIGHTS: ("Real weights", _weights),
}
