"""The section of a model card that says how a model drafts: `MODEL_CARD.md` and its figure, in an exported folder."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from probekit.checksums import renew_sums
from probekit.engines.acceptance import AcceptanceProfile
from probekit.engines.export import CARD, FIGURE, Export
from probekit.files import atomic_bytes, atomic_text
from probekit.presentation.model_card import inline
from probekit.presentation.plots import STYLE, acceptance_by_position
from probekit.traces.manifest import Manifest


def write_export_card(folder: Path, told: Export, manifest: Manifest) -> Path | None:
    """A table, a figure and how it was measured, ready to be pasted; None where nobody drafts."""
    profile = told.profile
    if profile is None:
        return None
    with matplotlib.rc_context(STYLE | {"savefig.dpi": 160}):
        figure = Figure(figsize=(3.4, 2.4), layout="constrained")
        acceptance_by_position(positions_table(profile), ax=figure.add_subplot())
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    atomic_bytes(folder / FIGURE, picture.getvalue())
    path = folder / CARD
    atomic_text(path, section(told, profile, manifest))
    renew_sums(folder, (FIGURE, CARD))
    return path


def positions_table(profile: AcceptanceProfile) -> pd.DataFrame:
    """Columns position, kind and rate, as `plots.acceptance_by_position` draws them."""
    rows = [
        {"position": place, "kind": kind, "rate": rate}
        for kind, rates in (("unconditional", profile.unconditional), ("conditional", profile.conditional))
        for place, rate in enumerate(rates, start=1)
    ]
    return pd.DataFrame(rows).astype({"rate": "float64"})


def section(told: Export, profile: AcceptanceProfile, manifest: Manifest) -> str:
    """The Markdown."""
    best = max(told.entries, key=lambda each: each.speedup or 0.0, default=None)
    speedup = None if best is None or best.speedup is None else f"{best.speedup:.2f}× at {best.rows} rows"
    interval = profile.acceptance_rate_interval
    span = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    cells = [
        ("drafts come from", told.drafting.label),
        ("tokens a round drafts", profile.draft_length),
        ("acceptance rate", f"{profile.acceptance_rate:.3f}{span}"),
        ("mean acceptance length, the bonus token in it", f"{profile.mean_acceptance_length:.2f}"),
        ("tokens per round", None if profile.tokens_per_round is None else f"{profile.tokens_per_round:.2f}"),
        ("speedup, predicted", speedup),
    ]
    settings, versions = manifest.settings, manifest.provenance.versions
    source, where = inline(manifest.provenance.prompts_source), f"{inline(settings.dtype)} on {inline(settings.device)}"
    sampled = "greedy" if settings.text == "greedy" else ", ".join(f"{k} {v}" for k, v in settings.decoding.items())
    made = ", ".join(f"{name} {versions[name]}" for name in ("probekit", "torch", "transformers") if name in versions)
    lines = [
        "## Speculative decoding",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {inline(value)} |" for name, value in cells),
        "",
        f"![Share of drafts accepted at each place of a round]({FIGURE})",
        "",
        f"Read off a trace of {profile.prompts} texts of up to {settings.max_new_tokens} tokens ({inline(sampled)}; "
        f"prompts: {source}), {where}, by the convention of {inline(profile.convention)}, with {inline(made)}. The "
        f"interval is 95 %, over texts. Weights: {inline(manifest.model.weights_hash)}.",
        "",
    ]
    return "\n".join(lines)
