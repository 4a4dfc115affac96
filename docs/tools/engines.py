"""The table of rounds counted inside other engines: `python docs/tools/engines.py` writes it into its page."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parent.parent
PAGE = DOCS / "how-to" / "use-in-another-engine.md"
RECORDS = DOCS / "results" / "engines"
BEGIN, END = "<!-- counted: begin -->\n", "<!-- counted: end -->"


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


def page(text: str) -> str:
    """The page with the table in its place."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
