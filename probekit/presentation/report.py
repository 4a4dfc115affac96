"""A study folder as one self-contained HTML page: the recommendation, the evidence, a replay, the lens tables.

The page fetches nothing and may not: its policy lets only its own scripts and styles run, by their hashes. Tokens and
prompts travel as JSON in which no character can end the element, and reach the page as text. The replay is worked out
in the page, from the agreement of every layer (a bit each) or, for sampled text, from the chances of acceptance.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

import probekit
from probekit.costs.profile import Costs
from probekit.errors import InputError
from probekit.presentation.report_data import Source, number, pack_models, safe_json
from probekit.traces.manifest import Manifest
from probekit.traces.storage import atomic_text
from probekit.traces.trace import Trace

SCHEMA = "probekit/study/1"

ASSETS = files("probekit.presentation") / "assets"
SCRIPTS = ("rounds.js", "page.js", "charts.js", "lens.js", "replay.js", "main.js")
"""In the order of their imports: they are joined into one module."""

TABLES = {
    "layers": ("model", "lens", "layer", "agreement", "agreement_low", "agreement_high", "echo", "entropy", "kl"),
    "cells": ("model", "drafter", "exit_layer", "draft_length", "first_round", "prompts", "acceptance_rate",
              "tokens_per_round", "speedup", "speedup_low", "speedup_high"),
}  # fmt: skip
MEASURES = {
    "speedup": "predicted speedup",
    "acceptance_rate": "acceptance rate (%)",
    "tokens_per_round": "tokens per round",
}
POOLS = {"all": "all texts", "even": "even texts (chosen on)", "odd": "odd texts (measured on)"}
FIRST_ROUNDS = {"prefill": "after the prefill's token (probekit)", "draft": "straight after the prompt (transformers)"}

WORDS = {
    "exit layer": "E: drafts come from layers 0..E−1, the model's own final norm and its own head.",
    "draft length": "K: tokens that a round drafts before the model verifies them.",
    "speedup": "time of autoregressive decoding on the same engine ÷ time of speculative decoding, for the same "
    "tokens, decoding only.",
    "agreement(l)": "share of generated positions where the lens at layer l and the model have the same top token.",
    "final-norm lens, raw lens": "head(norm(h)), and head(h); the raw lens's last row is the model's own, normed.",
    "echo": "share of positions where the lens's top token is the token that was just read.",
    "entropy, KL": "in nats: of the lens's distribution, and KL(model ‖ lens).",
    "prompt positions": "traced and shown in grey, never in a rate.",
    "drafted, accepted, rounds, tokens": "counts. Tokens are those that rounds emit: the one that verification adds is "
    "in tokens, never in accepted.",
    "acceptance rate": "accepted ÷ drafted, pooled over texts. It depends on K.",
    "alpha": "chance that a draft is accepted, given that all before it in its round were: accepted ÷ (accepted + "
    "rounds that ended by a rejection).",
    "tokens per round": "tokens ÷ rounds, the token that verification adds in it.",
    "correction, bonus": "the model's own token that ends a round: in place of a rejected draft, or after the last "
    "draft was accepted. A +n beside a rejected draft counts those drafted behind it, which nobody looks at.",
    "first round": "either the pass over the prompt emits the first token and rounds begin behind it, or the first "
    "round drafts straight after the prompt.",
    "probability": "of the lens's top token under the lens.",
    "rank": "of the text's next token under the lens; 0 is the top.",
    "signs in tokens": "␣ space, ⏎ line end, ⇥ tab, ⟨…⟩ a code point or byte without a shape, ∅ no text.",
}


# ------------------------------------------------------------------------------------------------ the two pages
def write_report(study_folder: str | Path) -> Path:
    """Write `report.html` into a study folder, and return its path. At most 5 MB for the default study.

    Raises InputError for a folder that is no study, or lacks a part of one.
    """
    study = read_study(Path(study_folder))
    models = pack_models([_source(study, entry, trace) for entry, trace in study.models])
    data = {"models": models, "agreement": _agreement(study), "speedups": _speedups(study)}
    page = _page(
        title="Where to draft, and what it gains",
        standfirst=_standfirst(study),
        data=data,
        study=_study_view(study),
        heads_note=_heads_note([trace for _, trace in study.models]),
    )
    path = study.folder / "report.html"
    atomic_text(path, page)
    return path


def write_lens_page(trace: Trace, path: str | Path) -> Path:
    """Write the lens table of a trace as a self-contained page."""
    if trace.manifest.statistics != "all":
        raise InputError("this trace keeps agreement only; a lens table shows tokens.", "Trace with --statistics all.")
    models = pack_models([Source(trace.manifest.model.name, trace)])
    page = _page(
        title=f"What each layer of {trace.manifest.model.name} would say",
        standfirst=f"{trace.depth} layers, {trace.manifest.text} text.",
        data={"models": models},
        study=None,
        heads_note=_heads_note([trace]),
    )
    path = Path(path)
    atomic_text(path, page)
    return path


def _heads_note(traces: Sequence[Trace]) -> str:
    """Which models' final-norm lens is not the plain one."""
    names = [trace.manifest.model.name for trace in traces if trace.manifest.exit_heads is not None]
    return f"The final-norm lens of {_listed(names)} is read through exit heads; the raw lens is not." if names else ""


def _page(title: str, standfirst: str, data: dict[str, Any], study: dict[str, Any] | None, heads_note: str) -> str:
    script, style, dark_style = joined_scripts(), _asset("report.css"), _asset("dark.css")
    with_lens = sum(prompt["lens"] is not None for model in data["models"] for prompt in model["prompts"])
    prompts = sum(len(model["prompts"]) for model in data["models"])
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
        has_lens=with_lens > 0,
        heads_note=heads_note,
        lens_note=f"To keep the page small it holds {with_lens} of {prompts} texts." if with_lens < prompts else "",
        definitions=WORDS,
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
        "fixed": lambda value: _shown(value, "{:.2f}"),
        "count": lambda value: _shown(value, "{:.0f}" if value is not None and value == round(value) else "{:.1f}"),
        "milliseconds": lambda seconds: _shown(None if seconds is None else 1000 * seconds, "{:.3g}"),
        "span": lambda pair: f"{pair[0]:.2f} to {pair[1]:.2f}",
        "percents": lambda pair: "–" if None in pair else f"{pair[0]:.1%} to {pair[1]:.1%}".replace("%", " %"),
    }
    return environment


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


# ------------------------------------------------------------------------------------------------ the study folder
@dataclass(frozen=True, eq=False)
class StudyFolder:
    """What a study left behind. models: (entry of the summary, its trace); tables: by name, those of TABLES."""

    folder: Path
    summary: Mapping[str, Any]
    models: Sequence[tuple[Mapping[str, Any], Trace]]
    tables: Mapping[str, pd.DataFrame]

    def rows(self, table: str, entry: Mapping[str, Any]) -> pd.DataFrame:
        frame = self.tables[table]
        return frame[frame["model"] == entry["name"]]


def read_study(folder: Path) -> StudyFolder:
    """Read a study folder. Raises InputError naming what is missing or foreign."""
    path = folder / "summary.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is not a finished study: it has no summary.json.", "Make one: `probekit study -o DIR`."
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}.", "Run the study again.") from None
    schema = summary.get("schema") if isinstance(summary, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}; expected {SCHEMA!r}.", "Run the study again.")
    entries = summary.get("models") or []
    lacking = [key for entry in entries for key in ("name", "label", "trace", "sentence") if key not in entry]
    if not entries or lacking:
        missing = f"lacks {', '.join(sorted(set(lacking)))} of a model" if entries else "names no model"
        raise InputError(f"{path} {missing}.", "Run the study again.")
    tables = {name: _read_table(folder / "tables" / f"{name}.csv", columns) for name, columns in TABLES.items()}
    return StudyFolder(folder, summary, [(entry, Trace.open(folder / entry["trace"])) for entry in entries], tables)


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"this study has no {path}.", "It was not finished, or a file was moved: run the study again.")
    try:
        table = pd.read_csv(path)
    except (ValueError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path} cannot be read: {error}.", "Run the study again.") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}.", "Run the study again with this probekit.")
    return table


def _costs(entry: Mapping[str, Any]) -> Costs | None:
    document = (entry.get("choice") or {}).get("costs")
    return Costs.from_json(document) if document else None


def _pair(entry: Mapping[str, Any]) -> tuple[int | None, int] | None:
    """The chosen (exit layer, draft length), or None where there is none; exit layer None: the draft model."""
    choice = entry.get("choice") or {}
    return (choice["exit_layer"], choice["draft_length"]) if choice.get("speculate") else None


# ------------------------------------------------------------------------------------------------ what a reader sees
def _standfirst(study: StudyFolder) -> str:
    manifest = study.models[0][1].manifest
    names = [entry["label"] for entry, _ in study.models]
    return (
        f"{_listed(names)}: {manifest.prompt_count} texts of up to {manifest.max_new_tokens} new tokens, "
        f"{manifest.text} decoding, {manifest.dtype} on {manifest.device}. One trace of each model predicts every "
        "round of speculative decoding; the running decoder then checks the prediction."
    )


def _study_view(study: StudyFolder) -> dict[str, Any]:
    """What the template shows without a script."""
    summary = study.summary
    versions = summary.get("versions") or {}
    machine = summary.get("machine") or {}
    return {
        "models": [_recommendation(entry) for entry, _ in study.models],
        "unspeculated": any(_pair(entry) is None for entry, _ in study.models),
        "layers": [row for entry, _ in study.models for row in _layer_rows(study, entry)],
        "cells_note": _cells_note(study),
        "validation": [
            (entry["label"], [_validation_row(cell) for cell in _validated(entry)])
            for entry, _ in study.models
            if _validated(entry)
        ],
        "costs": [row for entry, _ in study.models for row in _cost_rows(entry)],
        "costs_note": _costs_note(study),
        "created": summary.get("created", "at an unknown time"),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()) or "unknown versions",
        "machine": ", ".join(f"{name}: {value}" for name, value in machine.items() if value not in (None, "")),
        "settings": json.dumps(summary.get("settings") or {}, indent=2, ensure_ascii=False),
        "provenance": _provenance(study),
    }


def _recommendation(entry: Mapping[str, Any]) -> dict[str, Any]:
    choice, pair = entry.get("choice") or {}, _pair(entry)
    runners_up = choice.get("runners_up") or []
    cell = next((cell for cell in _validated(entry) if (cell["exit_layer"], cell["draft_length"]) == pair), {})
    return {
        "label": entry["label"],
        "sentence": _capital(entry["sentence"].removeprefix(f"{entry['label']}: ")),
        "pair": pair and {"drafter": _drafter(pair[0], choice), "length": pair[1]},
        "predicted": choice.get("speedup") if pair else None,
        "interval": choice.get("interval") if pair else None,
        "measured": cell.get("speedup_measured"),
        "measured_span": cell.get("speedup_measured_quantiles"),
        "runners_up": [
            {
                "words": f"E {_drafter(each['exit_layer'], each)}, K {each['draft_length']}",
                "speedup": each["speedup"],
            }
            for each in runners_up
        ],
    }


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _drafter(exit_layer: int | None, document: Mapping[str, Any]) -> str:
    return str(exit_layer) if exit_layer is not None else str(document.get("drafter") or "draft model")


def _layer_rows(study: StudyFolder, entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    rows = study.rows("layers", entry)
    raw = rows[rows["lens"] == "raw"].set_index("layer")["agreement"]
    for row in rows[rows["lens"] == "final-norm"].sort_values("layer").itertuples():
        yield {
            "model": entry["label"],
            "layer": row.layer,
            "agreement": number(row.agreement),
            "interval": (number(row.agreement_low), number(row.agreement_high)),
            "raw": number(raw.get(row.layer)),
            "echo": number(row.echo),
            "entropy": number(row.entropy),
            "kl": number(row.kl),
        }


def _cells_note(study: StudyFolder) -> str:
    cells = study.tables["cells"]
    first = ", ".join(sorted(cells["first_round"].astype(str).unique()))
    return f"Predicted from the {cells['prompts'].max():.0f} texts that the choice was made on; first round: {first}."


def _validated(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return (entry.get("validation") or {}).get("cells") or []


def _validation_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "drafter": _drafter(cell["exit_layer"], cell),
        "length": cell["draft_length"],
        "rounds": (cell["predicted"]["rounds"], cell["measured"]["rounds"]),
        "accepted": (cell["predicted"]["accepted"], cell["measured"]["accepted"]),
        "equal": _verdict(cell),
        "ties": cell.get("ties"),
        "predicted": cell.get("speedup_predicted"),
        "measured": cell.get("speedup_measured"),
    }


def _verdict(cell: Mapping[str, Any]) -> str:
    """Greedy text: every round as predicted. Sampled text: the runs lie within the intervals of the expected counts."""
    equal, within = cell.get("rounds_equal"), cell.get("within_interval")
    if equal is None:
        return "–" if within is None else "within interval" if within else "outside interval"
    unexplained = cell.get("unexplained")
    return "yes" if equal else f"no, {unexplained} unexplained" if unexplained else "no"


def _cost_rows(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps at the chosen pair, or at the best one that was found where speculation does not pay."""
    costs = _costs(entry)
    if costs is None:
        return
    choice = entry["choice"]
    best: Mapping[str, Any] = next(iter(choice.get("runners_up") or []), {})
    exit_layer, drafts = _pair(entry) or (best.get("exit_layer"), best.get("draft_length"))
    row = {"model": entry["label"], "autoregressive": costs.autoregressive_s, "overhead": costs.overhead_s}
    if drafts is None:
        yield row | {"words": "–", "early": None, "head": costs.head_s, "verify": None, "round": None}
    elif exit_layer is None:
        words = f"{costs.drafter}, K = {drafts}"
        helper = costs.draft_model
        step, verify = (None, None) if helper is None else (helper.step_s, helper.verify_s.get(drafts + 1))
        whole = costs.round_seconds(None, drafts)
        yield row | {"words": words, "early": step, "head": None, "verify": verify, "round": whole}
    else:
        yield row | {
            "words": f"E = {exit_layer}, K = {drafts}",
            "early": costs.early_s[exit_layer],
            "head": costs.head_s,
            "verify": costs.verify_s[exit_layer, drafts + 1],
            "round": costs.round_seconds(exit_layer, drafts),
        }


def _costs_note(study: StudyFolder) -> str:
    known = [costs for costs in (_costs(entry) for entry, _ in study.models) if costs is not None]
    kinds = dict.fromkeys((costs.source, costs.device, costs.dtype, costs.context) for costs in known)
    ways = {"measured": "Measured on {}", "roofline": "From a roofline of {} (bytes over bandwidth)"}
    words = (
        f"{ways.get(source, source).format(device)}, {dtype}, {context} tokens in the cache."
        for source, device, dtype, context in kinds
    )
    return " ".join(words)


def _provenance(study: StudyFolder) -> list[tuple[str, list[str]]]:
    """(name, one value a model): what each trace was made with, and what it found out about itself."""
    columns = [_provenance_of(entry, trace) for entry, trace in study.models]
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def _provenance_of(entry: Mapping[str, Any], trace: Trace) -> dict[str, str]:
    manifest, model, timings = trace.manifest, trace.manifest.model, entry.get("timings") or {}
    decoding = ", ".join(f"{name} {value:g}" for name, value in manifest.decoding.items())
    order, rows = manifest.draft_vocabulary, (entry.get("choice") or {}).get("draft_rows")
    looped = np.average(trace.texts["looped"], weights=trace.texts["new_tokens"])
    return {
        "reference": model.reference + (f" @ {model.revision}" if model.revision else ""),
        "weights": model.weights_hash or "not hashed",
        "shape": f"{model.depth} layers × {model.width}, vocabulary {model.vocabulary}",
        "parameters": f"{model.parameters:,}",
        "embeddings": "tied" if model.tied else "untied",
        "drafter": manifest.drafter.name if manifest.drafter else "none",
        "exit heads": _exit_heads(manifest),
        "draft head": f"{rows:,} rows, the most frequent tokens of {order.source}" if rows and order else "all rows",
        "arithmetic": f"{manifest.dtype} on {manifest.device}",
        "text": f"{manifest.text} ({decoding}), seed {manifest.seed}, at most {manifest.max_new_tokens} new tokens",
        "prompts": f"{manifest.prompt_count} from {manifest.prompts_source}, hash {manifest.prompts_hash}",
        "repeated text": f"{looped:.1%} of the generated tokens lie in a repeated run of 8".replace("%", " %"),
        "noise of a logit": "not measured" if manifest.noise is None else f"{manifest.noise:.2g}",
        "processors not applied": ", ".join(manifest.ignored_processors) or "none",
        "back-offs for memory": str(len(manifest.backoffs)),
        "time": _took(timings),
        "traced with": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()) or "unknown versions",
    }


def _exit_heads(manifest: Manifest) -> str:
    heads = manifest.exit_heads
    return "none" if heads is None else f"{heads.fingerprint}, of exits {_listed([str(each) for each in heads.exits])}"


def _took(timings: Mapping[str, Any]) -> str:
    """What the text took, and what it took to read it and to tabulate every exit and draft length."""
    if timings.get("generation_s") is None or timings.get("agreement_trace_s") is None:
        return "not timed"
    return (
        f"{timings['generation_s']:.1f} s to generate {timings['prompts']:.0f} texts, one at a time; "
        f"{timings['agreement_trace_s']:.1f} s to trace their agreement and to predict every pair"
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ------------------------------------------------------------------------------------------------ what scripts read
def _agreement(study: StudyFolder) -> list[dict[str, Any]]:
    """A line a model and lens, by layer."""
    lines = []
    for entry, _ in study.models:
        for lens, rows in study.rows("layers", entry).sort_values("layer").groupby("lens"):
            values = {name: [number(value) for value in rows[column]] for name, column in _LINE.items()}
            lines.append({"label": entry["label"], "lens": lens, "layer": rows["layer"].tolist(), **values})
    return lines


_LINE = {"agreement": "agreement", "low": "agreement_low", "high": "agreement_high"}


def _speedups(study: StudyFolder) -> list[dict[str, Any]]:
    """A point for each cell that was measured."""
    points = []
    for entry, _ in study.models:
        for cell in _validated(entry):
            if cell.get("speedup_predicted") is None or cell.get("speedup_measured") is None:
                continue
            low, high = cell.get("speedup_measured_quantiles") or (None, None)
            points.append(
                {
                    "label": entry["label"],
                    "name": f"{entry['label']}, E {_drafter(cell['exit_layer'], cell)}, K {cell['draft_length']}",
                    "predicted": cell["speedup_predicted"],
                    "measured": cell["speedup_measured"],
                    "low": low,
                    "high": high,
                }
            )
    return points


def _source(study: StudyFolder, entry: Mapping[str, Any], trace: Trace) -> Source:
    return Source(entry["label"], trace, study.rows("cells", entry), _costs(entry), _pair(entry))
