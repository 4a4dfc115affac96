"""Traces side by side: what differs between models, how sure that is, and which factor explains it. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probekit.errors import InputError
from probekit.foreign.json import loads
from probekit.prediction.intervals import Estimate, Share, chance_of, difference, draws, holm, spread
from probekit.prediction.predict import predict
from probekit.tying.shares import CLASSES, class_shares, half_agreement, last_rise, layer_means, require_all, valley

if TYPE_CHECKING:
    from probekit.traces.trace import Trace

SCHEMA = "probekit/compare/1"
DRAFT_LENGTH = 4
RESAMPLES = 10_000  # of each difference: many are judged together, which asks for small chances
_DRAFTS_WELL = "tokens per round"  # the quantity by which drafting is judged
_WEIGHTS = {"data", "data (not known)", "training (not known)"}  # factors that two checkpoints of one model differ in
DEPTHS = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75}
"""Exits that are compared, as shares of the depth: models of different depth have no exit layer in common."""


@dataclass(frozen=True)
class ComparisonTable:
    """One table for a person: cells are numbers, texts, (low, high) pairs or None."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    footnote: str = ""


@dataclass(frozen=True)
class Recipe:
    """How a model was made, as far as it is known. data, steps, seed, training: None where it is not."""

    name: str
    tied: bool
    layers: int
    width: int
    vocabulary: int
    parameters: int
    data: str | None = None
    steps: int | None = None
    seed: int | None = None
    training: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Several traces side by side.

    models: one dict each: name, tied, training, layers, width, vocabulary, parameters, text, prompts, tokens, looped,
        half_agreement (layers) and half_agreement_share (of the depth), valley figures, echo at the first layers;
        [low, high] beside them under `<name>_interval`.
    layers: one dict for each model and layer: shares of the four classes, echo, kl, with intervals.
    differences: one dict for each pair and quantity: one minus other, its 95 % interval by itself, `p`, `p_corrected`
        (Holm, over all differences of the comparison), `clear` (that is below 5 %), `paired`, `factor`.
        With fewer than two prompts there is no interval and no p: None.
    factors: one dict for each pair: what the two models differ in, and whether the cause can be told.
    """

    models: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    factors: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "models": self.models,
            "layers": self.layers,
            "differences": self.differences,
            "factors": self.factors,
            "verdicts": self.verdicts(),
        }

    def verdicts(self) -> list[str]:
        """A sentence for each pair: which model's early layers draft better, and how much of it is clear."""
        return [self._verdict(row["one"], row["other"]) for row in self.factors]

    def _verdict(self, one: str, other: str) -> str:
        rows = [row for row in self.differences if (row["one"], row["other"]) == (one, other)]
        clear = sum(row["clear"] for row in rows)
        drafting = [row for row in rows if row["quantity"].startswith(_DRAFTS_WELL) and row["clear"]]
        if not drafting:
            return (
                f"{one} and {other}: no clear difference in how their early layers draft ({clear} of {len(rows)} "
                "compared quantities differ clearly)."
            )
        most = max(drafting, key=lambda row: abs(row["difference"]))
        better, worse = (one, other) if most["difference"] > 0 else (other, one)
        values = sorted((most["one_value"], most["other_value"]), reverse=True)
        mixed = any((row["difference"] > 0) != (most["difference"] > 0) for row in drafting)
        return (
            f"{better} drafts better than {worse}{', though not from every depth' if mixed else ''}: "
            f"{most['quantity']}, {values[0]:.2f} instead of {values[1]:.2f} ({clear} of {len(rows)} compared "
            "quantities differ clearly)."
        )

    @property
    def _explained(self) -> bool:
        """Whether there is anything to say of causes: two checkpoints of one shape differ in their weights alone."""
        return any(set(row["differ"]) - _WEIGHTS for row in self.factors)

    def to_pandas(self) -> pd.DataFrame:
        """The differences, a row each; intervals as `low` and `high`."""
        frame = pd.DataFrame(self.differences)
        frame[["low", "high"]] = [pair or (np.nan, np.nan) for pair in frame.pop("interval")]
        return frame

    def __repr__(self) -> str:
        return f"Comparison({', '.join(model['model'] for model in self.models)}: {len(self.differences)} differences)"

    def tables(self) -> list[ComparisonTable]:
        """What `probekit compare` prints."""
        factors = [self._factors_table()] if self._explained else []
        return [self._models_table(), self._layers_table(), self._differences_table(), *factors]

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(verdict)}</p>" for verdict in self.verdicts()]
        for table in self.tables():
            frame = pd.DataFrame(table.rows, columns=table.columns)
            parts.append(f"<h4>{escape(table.title)}</h4>{frame.to_html(index=False, float_format='{:.3f}'.format)}")
        return "".join(parts)

    def _models_table(self) -> ComparisonTable:
        columns = ["model", "tied", "training", "layers", "width", "parameters", "text", "prompts", "looped",
                   "half agreement", "95 %", "of the depth", "valley floor", "95 %", "drop", "95 %"]  # fmt: skip
        rows = [
            [
                model["model"], model["tied"], model["training"], model["layers"], model["width"], model["parameters"],
                model["text"], model["prompts"], model["looped"], model["half_agreement"],
                model["half_agreement_interval"], model["half_agreement_share"], model["valley_floor"],
                model["valley_floor_interval"], model["valley_drop"], model["valley_drop_interval"],
            ]
            for model in self.models
        ]  # fmt: skip
        return ComparisonTable(
            "models",
            columns,
            rows,
            "half agreement: layers after which the final-norm lens has the model's token half of the time, for good. "
            "valley floor: the least share, over layers, of positions where the lens agrees or echoes its input; drop: "
            "that share at the embedding minus the floor. looped: share of tokens inside a repeated run.",
        )

    def _layers_table(self) -> ComparisonTable:
        rows = []
        for layer in sorted({row["layer"] for row in self.layers}):
            row: list[Any] = [layer]
            for model in self.models:
                found = next((r for r in self.layers if (r["run"], r["layer"]) == (model["run"], layer)), None)
                row += [None] * 3 if found is None else [found["echo"], found["agrees"], found["gibberish"]]
            rows.append(row)
        columns = ["layer"]
        for model in self.models:
            columns += [f"{model['run']}: echo", "agrees", "gibberish"]
        return ComparisonTable(
            "what the final-norm lens says, by layer",
            columns,
            rows,
            "shares of generated positions. echo: the lens says the token that was read; agrees: the model's token; "
            "gibberish: neither, and not among the model's 50 most probable.",
        )

    def _differences_table(self) -> ComparisonTable:
        columns = ["quantity", "one", "other", "one's", "other's", "difference", "95 %", "clear", "paired"]
        rows = [
            [
                row["quantity"], row["one"], row["other"], row["one_value"], row["other_value"], row["difference"],
                row["interval"], row["clear"], row["paired"], *([row["factor"]] if self._explained else []),
            ]
            for row in self.differences
        ]  # fmt: skip
        return ComparisonTable(
            "differences",
            [*columns, *(["factor"] if self._explained else [])],
            rows,
            "one minus other; bootstrap over prompts, the same ones drawn for both where they share them (paired). "
            f"95 %: of this one by itself. clear: also when all {len(self.differences)} are looked at (Holm, 5 % for "
            f"all of them together). Acceptance rates are for drafts of {DRAFT_LENGTH} tokens. The interval "
            "is over prompts, not over trainings: another seed may give another difference.",
        )

    def _factors_table(self) -> ComparisonTable:
        rows = [[row["one"], row["other"], ", ".join(row["differ"]) or "nothing", row["says"]] for row in self.factors]
        return ComparisonTable("which factor explains a difference", ["one", "other", "differ in", "so"], rows)


def compare_traces(traces: Sequence[Trace]) -> Comparison:
    """Compare traces of several models (or of several texts of one), each pair of them.

    Raises InputError for fewer than two traces, or one with agreement only.
    """
    if len(traces) < 2:
        raise InputError(f"a comparison needs at least two runs, and {len(traces)} was given.")
    for trace in traces:
        require_all(trace)
    runs = _run_names(traces)
    recipes = [recipe_of(trace) for trace in traces]
    measured = [_measure(trace) for trace in traces]
    models, layers = [], []
    for run, trace, recipe in zip(runs, traces, recipes, strict=True):
        models.append(_model_row(run, trace, recipe))
        layers += _layer_rows(run, trace)
    differences, factors = [], []
    for one, other in combinations(range(len(traces)), 2):
        factor = explain(recipes[one], recipes[other], traces[one], traces[other])
        factors.append({"one": runs[one], "other": runs[other], **factor})
        paired = _same_prompts(traces[one], traces[other])
        for quantity in measured[one]:
            found = _difference(measured[one][quantity], measured[other][quantity], paired)
            differences.append(
                {"quantity": quantity, "one": runs[one], "other": runs[other], **found, "factor": factor["factor"]}
            )
    return Comparison(models, layers, _judged_together(differences), factors)


@dataclass(frozen=True, eq=False)
class _Measured:
    """A pooled figure of one trace, as something that can be drawn again: `of(times)` answers (draws,)."""

    share: Share
    curve: bool = False  # the figure is the depth at which the curve comes to one half, as a share of the depth

    def of(self, times: np.ndarray) -> np.ndarray:
        drawn = self.share.redrawn(times)
        return last_rise(drawn) / (len(drawn) - 1) if self.curve else drawn

    @property
    def prompts(self) -> int:
        return len(self.share.prompts)


def _measure(trace: Trace) -> dict[str, _Measured]:
    """The quantities that are compared, by name."""
    echo, agrees, kl = (layer_means(trace, column) for column in ("echo", "agrees", "kl"))
    gibberish = class_shares(trace).at(3)
    exits = {name: min(trace.depth - 1, max(1, round(share * trace.depth))) for name, share in DEPTHS.items()}
    found = {f"echo after {layer} layers": _Measured(echo.at(layer)) for layer in (0, 1, 2) if layer < trace.depth}
    found["depth of half agreement, share of the depth"] = _Measured(agrees, curve=True)
    for name, layer in exits.items():
        found[f"agreement at {name} of the depth"] = _Measured(agrees.at(layer))
    for name, layer in exits.items():
        found[f"KL at {name} of the depth, nats"] = _Measured(kl.at(layer))
    first = range(1, max(2, trace.depth // 2 + 1))
    early = Share(
        gibberish.numerators[list(first)].sum(axis=0), gibberish.denominators[list(first)].sum(axis=0), echo.prompts
    )
    found["gibberish in the first half of the layers"] = _Measured(early)
    cells = predict(trace, sorted(set(exits.values())), [DRAFT_LENGTH], drafter=False)
    for name, layer in exits.items():
        cell = cells.cell(layer, DRAFT_LENGTH)
        rate = Share(cell.accepted_of_prompt, cell.drafted_of_prompt, echo.prompts)
        found[f"acceptance rate at {name} of the depth"] = _Measured(rate)
    for name, layer in exits.items():
        cell = cells.cell(layer, DRAFT_LENGTH)
        per_round = Share(cell.tokens_of_prompt, cell.rounds_of_prompt, echo.prompts)
        found[f"tokens per round at {name} of the depth"] = _Measured(per_round)
    return found


def _difference(one: _Measured, other: _Measured, paired: bool) -> dict[str, Any]:
    mine, theirs = (float(each.of(np.ones((1, each.prompts)))[0]) for each in (one, other))
    low = high = p = np.nan
    fewest = min(one.prompts, other.prompts)
    if not one.curve:
        found = difference(one.share, other.share, paired=paired, resamples=RESAMPLES)
        low, high, p = float(found.low), float(found.high), float(found.p)
    elif fewest > 1:  # where a curve crosses one half has no standard error but that of its draws
        drawn = one.of(draws(one.prompts)) - other.of(draws(other.prompts, seed=0 if paired else 1))
        low, high = (float(bound) for bound in spread(drawn, fewest))
        error = float(np.nanstd(drawn)) * np.sqrt(fewest / (fewest - 1)) if np.isfinite(drawn).any() else np.nan
        with np.errstate(invalid="ignore", divide="ignore"):
            p = float(chance_of(np.abs(np.float64(mine - theirs)) / error, np.empty(0), fewest))
        p = 1.0 if mine == theirs else p
    return {
        "one_value": mine,
        "other_value": theirs,
        "difference": mine - theirs,
        "interval": None if np.isnan(low) else [low, high],
        "p": None if np.isnan(p) else p,
        "paired": paired,
    }


def _judged_together(differences: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which differences are clear, when all of them are looked at: by Holm's correction, 5 % for all at once."""
    p = holm(np.array([np.nan if row["p"] is None else row["p"] for row in differences]))
    return [
        row | {"p_corrected": None if np.isnan(each) else float(each), "clear": bool(each < 0.05)}
        for row, each in zip(differences, p, strict=True)
    ]


def _same_prompts(one: Trace, other: Trace) -> bool:
    return (
        one.manifest.provenance.prompts_hash == other.manifest.provenance.prompts_hash and one.prompts == other.prompts
    )


def _run_names(traces: Sequence[Trace]) -> list[str]:
    """The models' names, told apart by text or number where two runs have the same."""
    names = [trace.manifest.model.name for trace in traces]
    if len(set(names)) < len(names):
        names = [f"{name} ({trace.manifest.settings.text})" for name, trace in zip(names, traces, strict=True)]
    return [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names, start=1)]


def _model_row(run: str, trace: Trace, recipe: Recipe) -> dict[str, Any]:
    model, texts = trace.manifest.model, trace.texts
    tokens = texts["new_tokens"].to_numpy(np.float64)
    half, shape, echo = half_agreement(trace), valley(trace), layer_means(trace, "echo")
    low, high = echo.interval()
    row: dict[str, Any] = {
        "run": run,
        "model": model.name,
        "tied": model.tied,
        "training": recipe.training,
        "layers": model.depth,
        "width": model.width,
        "vocabulary": model.vocabulary,
        "parameters": model.parameters,
        "text": trace.manifest.settings.text,
        "prompts": len(trace),
        "tokens": int(tokens.sum()),
        "looped": float((texts["looped"].to_numpy(np.float64) * tokens).sum() / tokens.sum()),
    }
    row |= _with_interval("half_agreement", half)
    row["half_agreement_share"] = half.value / model.depth
    for name in ("floor", "layer", "drop", "wide"):
        row |= _with_interval(f"valley_{name}", getattr(shape, name))
    for layer in range(min(3, model.depth)):
        row |= _with_interval(
            f"echo_{layer}", Estimate(float(echo.values[layer]), float(low[layer]), float(high[layer]))
        )
    return row


def _with_interval(name: str, figure: Estimate) -> dict[str, Any]:
    return {name: figure.value, f"{name}_interval": None if np.isnan(figure.low) else [figure.low, figure.high]}


def _layer_rows(run: str, trace: Trace) -> list[dict[str, Any]]:
    shares = class_shares(trace)
    columns = {
        name: (shares.values[index], *(bound[index] for bound in shares.interval()))
        for index, name in enumerate(CLASSES)
    }
    for name in ("echo", "kl"):
        share = layer_means(trace, name)
        columns[name] = (share.values, *share.interval())
    rows = []
    for layer in range(trace.depth + 1):
        row: dict[str, Any] = {"run": run, "model": trace.manifest.model.name, "layer": layer}
        for name, (values, low, high) in columns.items():
            key = name.replace(" ", "_")
            row |= _with_interval(key, Estimate(float(values[layer]), float(low[layer]), float(high[layer])))
        rows.append(row)
    return rows


def recipe_of(trace: Trace) -> Recipe:
    """What is known of how a trace's model was made: the record of its training where it has one beside its weights."""
    model = trace.manifest.model
    known = {} if model.adapter is not None else _training_record(model.name, model.reference)
    return Recipe(
        name=model.name, tied=model.tied, layers=model.depth, width=model.width, vocabulary=model.vocabulary,
        parameters=model.parameters, **known,
    )  # fmt: skip


def _training_record(name: str, reference: str) -> dict[str, Any]:
    bundled = files("probekit.models").joinpath("bundled", name, "training.json")
    path = Path(reference) / "training.json"
    source = path if os.path.isfile(path) else bundled if bundled.is_file() else None
    if source is None:
        return {}
    try:
        record = loads(source.read_text(encoding="utf-8"))
        recipe = record["recipe"]
        return {
            "data": record["corpus_sha256"],
            "steps": record["steps"],
            "seed": record["seed"],
            "training": "plain" if recipe is None else "early-exit",
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def explain(one: Recipe, other: Recipe, mine: Trace, theirs: Trace) -> dict[str, Any]:
    """Which factor can explain differences between two traces.

    Returns {"differ": list of factors that differ or are not known, "factor": the one, or "cannot be separated",
    "separable": bool, "says": a sentence}.
    """
    differ, unknown = [], []
    if one.tied != other.tied:
        differ.append("tying")
    if (one.layers, one.width) != (other.layers, other.width):
        differ.append("size")
    if one.vocabulary != other.vocabulary:
        differ.append("vocabulary")
    same_weights = mine.manifest.model.weights_hash == theirs.manifest.model.weights_hash
    for factor, a, b in (
        ("data", (one.data, one.steps, one.seed), (other.data, other.steps, other.seed)),
        ("training", one.training, other.training),
    ):
        if same_weights and mine.manifest.model.weights_hash is not None:
            continue
        if None in (a if isinstance(a, tuple) else (a,)) or None in (b if isinstance(b, tuple) else (b,)):
            unknown.append(factor)
        elif a != b:
            differ.append(factor)
    if _text_of(mine) != _text_of(theirs):
        differ.append("text")
    if not _same_prompts(mine, theirs):
        differ.append("prompts")
    named = [*differ, *(f"{factor} (not known)" for factor in unknown)]
    if not named:
        return {
            "differ": [],
            "factor": "nothing",
            "separable": True,
            "says": "the same model on the same text: chance.",
        }
    if len(named) == 1 and not unknown:
        return {
            "differ": named,
            "factor": differ[0],
            "separable": True,
            "says": f"they differ in {differ[0]} alone, which explains a clear difference (of this pair of runs).",
        }
    return {
        "differ": named,
        "factor": "cannot be separated",
        "separable": False,
        "says": f"{', '.join(named)} come together here: these runs cannot tell them apart.",
    }


def _text_of(trace: Trace) -> tuple[Any, ...]:
    return (trace.manifest.settings.text, tuple(sorted(trace.manifest.settings.decoding.items())))
