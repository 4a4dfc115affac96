"""`README.md` of a study folder: a card that a hub shows when the folder is uploaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from probekit.files import atomic_text


def write_card(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Metadata that hubs read, the recommendations, a table, a picture, and how it was measured."""
    environment = jinja2.Environment(  # nosec B701
        loader=jinja2.PackageLoader("probekit.presentation", "assets"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, which `inline` escapes
        keep_trailing_newline=True,
    )
    environment.filters["inline"] = inline
    page = environment.get_template("card.md.j2").render(
        header=yaml.safe_dump(metadata(summary), sort_keys=False, allow_unicode=True),
        models=[{"sentence": model["sentence"], "cells": _cells(model)} for model in summary["models"]],
        max_new_tokens=summary["settings"]["max_new_tokens"],
        machine=", ".join(f"{name} {value}" for name, value in summary["machine"].items()),
        versions=", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    )
    path = folder / "README.md"
    atomic_text(path, page)
    return path


def metadata(summary: Mapping[str, Any]) -> dict[str, Any]:
    """As the Hugging Face hub reads it."""
    return {
        "library_name": "probekit",
        "tags": ["probekit", "logit-lens", "early-exit", "speculative-decoding"],
        "base_model": [hub for model in summary["models"] if (hub := _hub_id(str(model["reference"]))) is not None],
        "pretty_name": f"Drafting of {', '.join(model['name'] for model in summary['models'])}",
    }


def _hub_id(reference: str) -> str | None:
    """A Hugging Face id; None for a folder, a file or a bundled model."""
    name = reference.partition("@")[0]
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else None


def _cells(model: Mapping[str, Any]) -> list[Any]:
    choice, measured = model["choice"], model["chosen_validation"] or {}
    interval, ratio = choice["interval"], measured.get("speedup_measured")
    return [
        model["name"],
        choice["exit_layer"] or choice["drafter"],
        choice["draft_length"],
        f"{choice['speedup']:.2f}×",
        None if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
        None if ratio is None else f"{ratio:.2f}×",
    ]


def inline(value: Any) -> str:
    """Data in a line of Markdown: nothing in it is markup."""
    text = "–" if value is None else " ".join(str(value).split())
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|!" else letter for letter in text)
