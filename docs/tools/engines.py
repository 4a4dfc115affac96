"""Tables of rounds, speedups and choices inside other engines, and of batch-invariant passes, in their pages.

python docs/tools/engines.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent.parent
PAGE = DOCS / "how-to" / "use-in-another-engine.md"
RECORDS = DOCS / "results" / "engines"
COSTS_PAGE = DOCS / "reference" / "cost-profile.md"
SPEEDUPS = DOCS / "results" / "engine-speedups"
REGRETS = DOCS / "results" / "engine-regret"
INVARIANT_PAGE = DOCS / "how-to" / "batch-invariant.md"
PRICES = DOCS / "results" / "decoding"


def table() -> str:
    """A row an engine and model: cells, texts in all cells, and how many were equal round by round; none, no table."""
    if not any(RECORDS.glob("*.json")):
        return ""
    lines = [
        "| engine | model | drafters and lengths | texts in all of them | rounds equal | tokens equal | at a near-tie "
        "| else |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for model in dict.fromkeys(row["model"] for row in record["rows"]):
            rows = [row for row in record["rows"] if row["model"] == model]
            total = {name: sum(row[name] for row in rows)
                     for name in ("prompts", "rounds_equal", "tokens_equal", "near_ties", "unexplained")}  # fmt: skip
            cells = ", ".join(dict.fromkeys(f"{row['drafter']} × {row['draft_length']}" for row in rows))
            name = f"{record['engine']} {version_of(record)}"
            lines.append(f"| {name} | {model} | {cells} | " + " | ".join(map(str, total.values())) + " |")
    return "\n".join(lines) + "\n"


def version_of(record: dict) -> str:
    packages = record["versions"].get("packages") or f"transformers=={record['versions']['transformers']}"
    return packages.split("==")[-1]


def speedups() -> str:
    """A row a cell: predicted and measured; none, no table."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SPEEDUPS.glob("*.json"))]
    if not records:
        return ""
    lines = ["| engine | model | drafter and length | predicted | measured | ratio | plain against plain |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    rows = [(record, row) for record in records for row in record["rows"]]
    for record, row in rows:
        figures = " | ".join(f"{row[name]:.2f}" for name in ("predicted", "measured", "ratio", "plain_against_plain"))
        name = f"{record['engine']} {version_of(record)}"
        lines.append(f"| {name} | {row['model']} | {row['drafter']} × {row['draft_length']} | {figures} |")
    near = []
    for record in records:
        ratios = [abs(row["ratio"] - 1) for row in record["rows"]]
        near.append(f"{sum(each <= 0.1 for each in ratios)} of {len(ratios)} cells in {record['engine']}")
    return "\n".join([*lines, "", f"Within 10 %: {', '.join(near)}."]) + "\n"


def regrets() -> str:
    """A row an engine and model: the chosen way and the fastest of all that were run there; none, no table."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(REGRETS.glob("*.json"))]
    if not records:
        return ""
    heads = ["engine", "model", "ways run", "chosen", "predicted", "measured", "the fastest", "measured", "regret, %",
             "held out, %", "noise, %"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for record in records:
        found = record["regret"]
        low, high = (100 * each for each in found["regret_interval"])
        cells = [
            f"{record['engine']} {version_of(record)}", record["model"], found["ways"],
            found["chosen"].replace(" x ", " × "), f"{found['predicted_speedup']:.2f}",
            f"{found['chosen_speedup']:.2f}", found["best"].replace(" x ", " × "),
            f"{found['best_speedup']:.2f}", f"{100 * found['regret']:.1f} [{low:.1f}, {high:.1f}]",
            f"{100 * found['regret_held_out']:.1f}", f"{100 * found['noise_95']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def prices() -> str:
    """A row a model and job: time of batch-invariant passes over that of plain ones."""
    lines = ["| model | job | float32 | bfloat16 |", "|---|---|---|---|"]
    for record in price_records():
        exit_layer, length = record["settings"]["cell"]
        words = {"autoregressive": "autoregressive decoding",
                 "self-speculative": f"self-speculative decoding, exit {exit_layer}, {length} drafts",
                 "prefill": f"a prompt of {record['settings']['prefill']} tokens"}  # fmt: skip
        for what, said in words.items():
            cells = [
                f"{row['p50']:.2f} ({row['p20']:.2f} to {row['p80']:.2f})"
                for dtype in ("float32", "bfloat16")
                for row in record["rows"]
                if (row["dtype"], row["what"]) == (dtype, what)
            ]
            lines.append(f"| `{record['model']}` | {said} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def excused() -> str:
    """A row a model, number type and kind of pass: what a validation found, and what it could have excused."""
    heads = "| model | pass | rounds | rounds equal | tokens equal | near-ties that decided | "
    lines = [heads + "positions where one would be excused |", "|---" * 7 + "|"]
    for record in price_records():
        for row in record["rows"]:
            if row["what"].startswith("validation, "):
                kind = f"{row['dtype']}, {row['what'].removeprefix('validation, ')}"
                equal = ["all" if row[name] else "not all" for name in ("rounds_equal", "tokens_equal")]
                cells = [f"`{record['model']}`", kind, str(row["rounds"]), *equal, str(row["near_ties"]),
                         f"{row['excusable_share']:.0%}"]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def price_records() -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(PRICES.glob("invariance-*.json"))][::-1]


def page(text: str, name: str = "counted", made: Callable[[], str] = table) -> str:
    """A page with the table in its place."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    return before + begin + made() + end + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    costs = page(COSTS_PAGE.read_text(encoding="utf-8"), "speedups", speedups)
    COSTS_PAGE.write_text(page(costs, "regrets", regrets), encoding="utf-8")
    invariant = page(INVARIANT_PAGE.read_text(encoding="utf-8"), "prices", prices)
    INVARIANT_PAGE.write_text(page(invariant, "excused", excused), encoding="utf-8")
