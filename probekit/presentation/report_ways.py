"""Every way of drafting as the report shows it: the ladder, the table, kinds of text, what the decoder made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from probekit.presentation.report_text import capital, way_label
from probekit.presentation.study_folder import StudyFolder

WIDTH = 100.0  # of a bar's drawing
FARTHEST = 2.0  # of the greatest speedup: bars end there, whose figures stand beside them


def ways_view(study: StudyFolder) -> list[dict[str, Any]]:
    """What the template shows of each model; nothing of a study that ranked no ways."""
    known = [entry for entry in study.entries if entry.get("ways")]
    place = _scale([entry["ways"] for entry in known])
    return [
        {
            "label": entry["label"],
            "sentence": capital(entry["ways"]["sentence"].removeprefix(f"{entry['name']}: ")),
            "held_out": entry["ways"]["held_out"],
            "ladder": [_rung(row, place) for row in entry["ways"]["ladder"]],
            "rows": list(_rows(entry["ways"])),
            "kinds": [_kind(row) for row in entry["ways"]["kinds"]] if len(entry["ways"]["kinds"]) > 1 else [],
            "run": [_run(row) for row in entry["ways"]["validated"]],
        }
        for entry in known
    ]


def _scale(documents: Sequence[Mapping[str, Any]]) -> Any:
    """From a speedup to a place in a bar, the same for all models."""
    rungs = [row for document in documents for row in document["ladder"]]
    low = min([1.0, *(row["speedup_low"] or row["speedup"] for row in rungs)])
    high = max([1.0, *(row["speedup_high"] or row["speedup"] for row in rungs)])
    high = min(high, FARTHEST * max([1.0, *(row["speedup"] for row in rungs)]))
    return lambda speedup: round(
        2 + (WIDTH - 4) * (min(speedup, high) - low) / (high - low if high > low else 1.0), 2
    )  # fmt: skip


def _rung(row: Mapping[str, Any], place: Any) -> dict[str, Any]:
    low, high = row["speedup_low"], row["speedup_high"]
    return {
        "rung": row["rung"],
        "way": row["way"],
        "speedup": row["speedup"],
        "interval": None if low is None else (low, high),
        "one": place(1.0),
        "at": place(row["speedup"]),
        "from": place(row["speedup"] if low is None else low),
        "to": place(row["speedup"] if high is None else high),
    }


def _rows(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The oracle, then the best length of each drafter and policy."""
    for row in (*filter(None, [document["oracle"]]), *document["ways"]):
        yield {
            "drafts": way_label(row),
            "policy": row["policy"] + (", learned" if row["cross_fitted"] else ""),
            "length": row["draft_length"],
            "tokens_per_round": row["tokens_per_round"],
            "drafted_per_token": row["drafted_per_token"],
            "speedup": row["speedup"],
            "interval": row["interval"],
            "share": row["oracle_share"],
        }


def _kind(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "drafts": way_label(row["best"]), "policy": row["best"]["policy"]}


def _run(row: Mapping[str, Any]) -> dict[str, Any]:
    drafters = row["drafters"]
    return {
        "drafts": drafters[0] if len(drafters) == 1 else f"{len(drafters)} drafters in turn",
        "policy": row["policy"],
        "length": row["draft_length"],
        "rounds": (row["predicted"]["rounds"], row["measured"]["rounds"]),
        "drafted": (row["predicted"]["drafted"], row["measured"]["drafted"]),
        "equal": "yes" if row["rounds_equal"] else f"no, {row['unexplained']} unexplained",
        "predicted": row["speedup_predicted"],
        "measured": row["speedup_measured"],
    }
