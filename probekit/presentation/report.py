"""A study folder as one self-contained HTML page: the recommendation, the evidence, a replay, the lens tables.

The page fetches nothing and may not: its policy lets only its own scripts and styles run, by their hashes. Tokens and
prompts travel as JSON in which no character can end the element, and reach the page as text. The replay is worked out
in the page, from the agreement of every layer (a bit each) or, for sampled text, from the chances of acceptance.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

import probekit
from probekit.checksums import renew_sums
from probekit.errors import InputError
from probekit.files import atomic_text
from probekit.presentation.report_data import Source, number, pack_models, safe_json
from probekit.presentation.report_replays import Played, played_ways
from probekit.presentation.report_text import (
    DEFINITIONS,
    FIRST_ROUNDS,
    MEASURES,
    POOLS,
    costs_of,
    drafter_name,
    listed,
    standfirst,
    study_view,
    validated_cells,
)
from probekit.presentation.report_ways import ways_view
from probekit.presentation.study_folder import StudyFolder, open_study
from probekit.presentation.tables import lens_table
from probekit.traces.trace import Trace

if TYPE_CHECKING:
    from probekit.probing.attribution import Attribution

ASSETS = files("probekit.presentation") / "assets"
SCRIPTS = ("rounds.js", "page.js", "charts.js", "lens.js", "replay.js", "main.js")
"""In the order of their imports: they are joined into one module."""


# ------------------------------------------------------------------------------------------------ the two pages
def write_report(study_folder: str | Path) -> Path:
    """Write `report.html` into a study folder, and return its path. At most 5 MB for the default study.

    Raises InputError for a folder that is no study, or lacks a part of one.
    """
    study = open_study(study_folder, keys=("label", "trace", "sentence"))
    study.check(tables=("layers", "cells"))
    models = pack_models([_source(study, model) for model in study.models])
    data = {"models": models, "agreement": _agreement(study), "speedups": _speedups(study)}
    page = _page(
        title="Where to draft, and what it gains",
        standfirst=standfirst(study),
        data=data,
        study=study_view(study) | {"ways": ways_view(study)},
        stills=_stills(study.folder / "figures"),
        heads_note=_heads_note([study.trace(model) for model in study.models]),
    )
    path = study.folder / "report.html"
    atomic_text(path, page)
    renew_sums(study.folder, [path.name])
    return path


def write_lens_page(trace: Trace, path: str | Path, attributions: Mapping[int, Attribution] | None = None) -> Path:
    """Write the lens table of a trace as a self-contained page.

    attributions: {prompt: who wrote the logits of its tokens}, shown beside the lens.
    """
    if trace.manifest.settings.statistics != "all":
        raise InputError("this trace keeps agreement only; a lens table shows tokens.", "Trace with --statistics all.")
    models = pack_models([Source(trace.manifest.model.name, trace, attributions=attributions or {})])
    page = _page(
        title=f"What each layer of {trace.manifest.model.name} would say",
        standfirst=f"{trace.depth} layers, {trace.manifest.settings.text} text.",
        data={"models": models},
        study=None,
        stills={},
        heads_note=_heads_note([trace]),
        plain_lens=_plain_lens(trace) if models[0]["prompts"][0]["lens"] else None,
    )
    path = Path(path)
    atomic_text(path, page)
    return path


def _heads_note(traces: Sequence[Trace]) -> str:
    """Which models' final-norm lens is not the plain one."""
    names = [trace.manifest.model.name for trace in traces if trace.manifest.settings.exit_heads is not None]
    return f"The final-norm lens of {listed(names)} is read through exit heads; the raw lens is not." if names else ""


def _plain_lens(trace: Trace) -> dict[str, Any]:
    """The lens table of the first text in words alone, for a reader without scripts: from the model down."""
    table = lens_table(trace, trace.prompts[0], trace.manifest.settings.lenses[0])
    agrees = [row["agrees"].tolist() for _, row in table.frame.groupby("layer")]
    rows = [
        (f"{layer} model" if layer == trace.depth else f"{layer} embedding" if layer == 0 else str(layer),
         [(token, same) for (token, _), same in zip(cells, agrees[layer], strict=True)])
        for layer, cells in enumerate(table.cells)
    ]  # fmt: skip
    return {"inputs": table.inputs, "generated": table.generated, "rows": rows[::-1]}


STILLS = {
    "agreement": "agreement with the model by layer, a line for each model",
    "speedup": "predicted speedup over exit layer and draft length, a panel for each model",
    "predicted_against_measured": "predicted against measured rounds, acceptance rates and speedups",
    "lens_table": "the token that each layer of each model would say, by position, for one text",
}
"""The study's own pictures, for a reader without scripts, and what they show."""
SHOWN = {
    "probes": "what probes of the residual stream find by layer, beside the lens: whether a draft is accepted, and the "
    "model's token",
}
"""Those that every reader is shown."""


def _stills(folder: Path) -> dict[str, dict[str, str]]:
    """{picture: its source as a data URI, its words}, those that are there; the smaller of drawing and pixels."""
    found = {}
    for name, words in (STILLS | SHOWN).items():
        files = [path for kind in ("svg", "png") if (path := folder / f"{name}.{kind}").is_file()]
        if files:
            path = min(files, key=lambda each: each.stat().st_size)
            kind = "svg+xml" if path.suffix == ".svg" else "png"
            source = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
            found[name] = {"source": source, "words": words}
    return found


def _page(
    title: str, standfirst: str, data: dict[str, Any], study: dict[str, Any] | None, stills: dict[str, Any],
    heads_note: str, plain_lens: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    script, style, dark_style = joined_scripts(), _asset("report.css"), _asset("dark.css")
    with_lens = sum(prompt["lens"] is not None for model in data["models"] for prompt in model["prompts"])
    prompts = sum(len(model["prompts"]) for model in data["models"])
    shared = sum(prompt["attribution"] is not None for model in data["models"] for prompt in model["prompts"])
    text = "text" if shared == 1 else "texts"
    notes = [
        f"To keep the page small it holds {with_lens} of {prompts} texts." if with_lens < prompts else "",
        f"Of {shared} {text} it also says which layer's attention and MLP wrote the logit of the model's token "
        "(the final norm's scale held; what all of them wrote adds up to it)." if shared else "",
        heads_note,
    ]  # fmt: skip
    return _environment().get_template("report.html.j2").render(
        title=title,
        standfirst=standfirst,
        version=probekit.__version__,
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)} {_hash(dark_style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        script=script,
        style=style,
        dark_style=dark_style,
        data=safe_json(data),
        study=study,
        stills={name: stills.get(name) for name in STILLS | SHOWN},
        has_lens=with_lens > 0,
        plain_lens=plain_lens,
        heads_note=heads_note,
        lens_note=" ".join(filter(None, notes)),
        definitions=DEFINITIONS,
        measures=MEASURES.items(),
        first_rounds=FIRST_ROUNDS.items(),
        pools=POOLS.items(),
    )  # fmt: skip


def joined_scripts() -> str:
    """The scripts as one module: each is a module of its own in the sources; here their imports fall away."""
    joined = "\n".join(_asset(name) for name in SCRIPTS)
    return re.sub(r"^export ", "", re.sub(r"^import .*;\n", "", joined, flags=re.MULTILINE), flags=re.MULTILINE)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("probekit.presentation", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "times": lambda value: _shown(value, "{:.2f}×"),
        "percent": lambda value: _shown(value, "{:.1%}").replace("%", " %"),
        "share": lambda value: _shown(value, "{:.0%}").replace("%", " %"),
        "fixed": lambda value: _shown(value, "{:.2f}"),
        "count": lambda value: _shown(value, "{:.0f}" if value is not None and float(value).is_integer() else "{:.1f}"),
        "milliseconds": lambda seconds: _shown(None if seconds is None else 1000 * seconds, "{:.3g}"),
        "span": lambda pair: f"{pair[0]:.2f} to {pair[1]:.2f}",
        "percents": lambda pair: "–" if None in pair else f"{pair[0]:.1%} to {pair[1]:.1%}".replace("%", " %"),
    }
    return environment


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


# ------------------------------------------------------------------------------------------------ what scripts read
_LINE = {"agreement": "agreement", "low": "agreement_low", "high": "agreement_high"}
"""{name in the page: column of the table}"""


def _agreement(study: StudyFolder) -> list[dict[str, Any]]:
    """A line a model and lens, by layer."""
    lines = []
    for model in study.models:
        for lens, rows in study.of("layers", model).sort_values("layer").groupby("lens"):
            values = {name: [number(value) for value in rows[column]] for name, column in _LINE.items()}
            lines.append({"label": study.label(model), "lens": lens, "layer": rows["layer"].tolist(), **values})
    return lines


def _speedups(study: StudyFolder) -> list[dict[str, Any]]:
    """A point for each cell that was measured."""
    points = []
    for entry in study.entries:
        for cell in validated_cells(entry):
            if cell.get("speedup_predicted") is None or cell.get("speedup_measured") is None:
                continue
            low, high = cell.get("speedup_measured_quantiles") or (None, None)
            points.append(
                {
                    "label": entry["label"],
                    "name": f"{entry['label']}, E {drafter_name(cell['exit_layer'], cell)}, K {cell['draft_length']}",
                    "predicted": cell["speedup_predicted"],
                    "measured": cell["speedup_measured"],
                    "low": low,
                    "high": high,
                }
            )
    return points


def _source(study: StudyFolder, model: str) -> Source:
    cells, costs, trace = study.of("cells", model), costs_of(study.entry(model)), study.trace(model)
    ways: Sequence[Played] = ()
    if study.entry(model).get("ways") and costs is not None:
        asked = study.summary.get("settings") or {}
        lengths = asked.get("draft_lengths") or sorted(set(cells["draft_length"].tolist()))
        ways = played_ways(trace, costs, asked.get("exit_layers"), lengths, costs.draft_rows)
    shares = study.attributions(model)
    return Source(study.label(model), trace, cells, costs, study.chosen(model), ways, shares)
