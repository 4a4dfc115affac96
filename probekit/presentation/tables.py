"""The study's tables as DataFrames, and any of them as LaTeX.

    layers       what each layer says, pooled over the generated tokens      one row a model, lens, layer
    cells        the prediction over exit layers and draft lengths           one row a model, drafter, E, K
    validation   the prediction beside the running decoder                   one row a cell that was run
    rounds       the same, round by round
    run_lengths  how long agreement lasts, beside the geometric law          one row a model, E, run length
    costs        times of a step                                             one row a step, E, rows
    sweep        seconds to know the cells by running them, and by a trace

Intervals are 95 %, bootstrap over prompts, in columns `_low` and `_high`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probekit.errors import InputError
from probekit.html_tables import HtmlCell, html_table
from probekit.prediction.intervals import SHARE, UNBOUNDED, bootstrap_ratio
from probekit.prediction.run_lengths import run_lengths
from probekit.prediction.table import Prediction
from probekit.presentation.tokens import shown
from probekit.traces.schema import LensName
from probekit.traces.token_text import visible
from probekit.traces.trace import Trace
from probekit.tying.shares import TOP

if TYPE_CHECKING:
    from probekit.choice.choose import Choice
    from probekit.costs.profile import Costs
    from probekit.validation.results import Validation

CONVENTION = "layer l: the residual stream after l decoder layers; 0: the embedding; the last row: the model"


@dataclass(frozen=True, eq=False)
class LensTable:
    """The top token of every layer at every position of one text.

    frame: a row for each layer and position, with columns layer, position, output, generated, input (the token that
        is read), token (the top one), token_id, agrees, and the trace's statistics.
    """

    model: str
    prompt: int
    lens: str
    frame: pd.DataFrame
    convention: str = CONVENTION

    @property
    def inputs(self) -> list[str]:
        """(positions,): the token that is read."""
        return self._heads["input"].tolist()

    @property
    def generated(self) -> list[bool]:
        """(positions,): False inside the prompt."""
        return self._heads["generated"].tolist()

    @property
    def cells(self) -> list[list[tuple[str, float]]]:
        """(layers, positions): the top token and its probability, from the embedding to the model."""
        return [
            list(zip(row["token"], row["probability"].astype(float), strict=True))
            for _, row in self.frame.groupby("layer")
        ]

    @property
    def _heads(self) -> pd.DataFrame:
        return self.frame[self.frame["layer"] == 0]

    def window(self, positions: int, before: int = 3) -> LensTable:
        """The same table with at most `positions` columns: from `before` rows ahead of the first generated token."""
        heads = self._heads
        first = int(heads["position"].iloc[0])
        start = max(first, int(heads.loc[heads["generated"], "position"].min()) - before)
        inside = self.frame["position"].between(start, start + positions - 1)
        return LensTable(self.model, self.prompt, self.lens, self.frame[inside].reset_index(drop=True))

    def to_json(self) -> dict[str, Any]:
        heads = self._heads[["position", "output", "generated", "input"]]
        return {
            "model": self.model,
            "prompt": self.prompt,
            "lens": self.lens,
            "convention": self.convention,
            "positions": heads.to_dict("records"),
            "layers": [
                {"layer": layer, "cells": row[["token", "token_id", "probability", "agrees"]].to_dict("records")}
                for layer, (_, row) in enumerate(self.frame.groupby("layer"))
            ],
        }

    def to_pandas(self) -> pd.DataFrame:
        return self.frame

    def __repr__(self) -> str:
        layers, positions = self.frame["layer"].nunique(), len(self.inputs)
        return f"LensTable({self.model}, {self.lens} lens, {layers} layers x {positions} positions)"

    def _repr_html_(self) -> str:
        """Layers from the model down to the embedding, shaded by probability; a dot marks the model's token."""
        generated = self.generated
        every = self.cells
        last = len(every) - 1
        rows = []
        for layer, cells in reversed(list(enumerate(every))):
            shaded = [
                HtmlCell(
                    shown(token) + (" •" if layer < last and token == own else ""),
                    probability,
                    "blue" if continued else "grey",
                )
                for (token, probability), (own, _), continued in zip(cells, every[-1], generated, strict=True)
            ]
            rows.append((f"model, {layer}" if layer == last else str(layer), shaded))
        caption = (
            f"{self.model}, {self.lens} lens. {self.convention}. Columns: the token that is read. Shade: probability; "
            "grey: prompt; •: the model's token."
        )
        return html_table(caption, "layer", [shown(text) for text in self.inputs], rows)


def lens_table(trace: Trace, prompt: int, lens: LensName = "final-norm") -> LensTable:
    """The lens table of one prompt of a trace.

    Raises InputError where the trace lacks the prompt, the lens, or the top tokens.
    """
    if trace.manifest.settings.statistics != "all":
        raise InputError(
            "this trace holds agreement only, and a lens table shows tokens.", "Trace again with --statistics all."
        )
    if lens not in trace.manifest.settings.lenses:
        raise InputError(f"this trace has no {lens!r} lens: it has {', '.join(trace.manifest.settings.lenses)}.")
    trace = trace.select([prompt])
    tokens = trace.tokens.sort_values("position", ignore_index=True)
    layers = trace.layers[trace.layers["lens"] == lens].drop(columns=["lens", "prompt"])
    top = trace.top
    names = dict(zip(tokens["text_id"].tolist(), tokens["text"].tolist(), strict=True))
    if top is not None and not top.empty:
        names = dict(zip(top["token"].tolist(), top["token_text"].tolist(), strict=True)) | names
    first = {int(tokens["input_id"].iloc[0]): _first_token(trace, prompt, tokens)}
    names = first | names if list(first.values()) == [""] else names | first
    heads = tokens[["position", "generated"]].assign(input=[_name(names, token) for token in tokens["input_id"]])
    frame = layers.merge(heads, on="position", validate="many_to_one").rename(columns={"argmax": "token_id"})
    frame["token"] = [_name(names, token) for token in frame["token_id"]]
    leading = ["layer", "position", "output", "generated", "input", "token", "token_id", "agrees"]
    frame = frame[[*leading, *(column for column in frame.columns if column not in leading)]]
    frame = frame.sort_values(["layer", "position"], ignore_index=True)
    return LensTable(trace.manifest.model.name, prompt, lens, frame)


def _first_token(trace: Trace, prompt: int, tokens: pd.DataFrame) -> str:
    """Text of the sequence's first token, which no row predicts: what the others leave of the prompt; may be empty."""
    inside = "".join(tokens.loc[tokens["output"] < 0, "text"])
    whole = visible(trace.text(prompt))
    return whole.removesuffix(inside) if whole.endswith(inside) else ""


def _name(names: Mapping[int, str], token: int) -> str:
    return names.get(token) or f"#{token}"


def layers_table(trace: Trace, model: str | None = None) -> pd.DataFrame:
    """What each lens says at each layer, pooled over the generated tokens.

    Shares: agreement (the model's token), echo (the token that was just read), in_top50 (the lens's token is among
    the model's top 50), gibberish (none of these). Means: entropy, kl, log_probability (of the text's token), in
    nats, and overlap. A trace of agreement only has NaN elsewhere.
    """
    rows = trace.layers[trace.layers["output"] >= 0]
    everything = trace.manifest.settings.statistics == "all"
    measured = pd.DataFrame({"agreement": rows["agrees"]})
    if everything:
        among = rows["model_rank"] < TOP
        measured["echo"] = rows["echo"]
        for name in ("entropy", "kl", "overlap", "log_probability"):
            measured[name] = rows[name]
        measured["in_top50"] = among
        measured["gibberish"] = ~(rows["agrees"] | rows["echo"] | among)
    names = list(measured.columns)
    keys = [rows["lens"].astype(str), rows["layer"], rows["prompt"]]
    sums = measured.astype(np.float64).groupby(keys, sort=True).sum()
    counts = measured["agreement"].groupby(keys, sort=True).size()
    prompts = len(trace)
    below = counts.to_numpy(dtype=np.float64).reshape(-1, prompts)
    table = counts.groupby(level=["lens", "layer"]).sum().rename("rows").reset_index()
    table.insert(0, "model", model or trace.manifest.model.name)
    for name in ("agreement", "echo", "entropy", "kl", "overlap", "log_probability", "in_top50", "gibberish"):
        if name not in names:
            table[[name, f"{name}_low", f"{name}_high"]] = np.nan
            continue
        above = sums[name].to_numpy().reshape(-1, prompts)
        bounds = UNBOUNDED if name in ("entropy", "kl", "log_probability") else SHARE
        low, high = bootstrap_ratio(above, below, bounds=bounds)
        table[name], table[f"{name}_low"], table[f"{name}_high"] = above.sum(axis=1) / below.sum(axis=1), low, high
    return table


def cells_table(prediction: Prediction, choice: Choice | None = None, model: str | None = None) -> pd.DataFrame:
    """The prediction, a row a cell, with its speedup where a choice has weighed it against the costs."""
    table = prediction.to_pandas()
    if model is not None:
        table["model"] = model
    table["accepted_by_position"] = [json.dumps(counts) for counts in table["accepted_by_position"]]
    speedups = (
        {} if choice is None else {row.cell: (row.speedup, *(row.interval or _NO_INTERVAL)) for row in choice.ranking}
    )
    keys = _cells_of(table)
    table[["speedup", "speedup_low", "speedup_high"]] = np.array(
        [speedups.get(key, (np.nan, *_NO_INTERVAL)) for key in keys], dtype=np.float64
    )
    leading = ["model", "drafter", "exit_layer", "draft_length", "first_round"]
    return table[[*leading, *(column for column in table.columns if column not in leading)]]


_NO_INTERVAL = (np.nan, np.nan)
_COUNTS = ("rounds", "drafted", "accepted", "tokens")


def validation_table(
    validation: Validation | Mapping[str, Any], model: str, rounds: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The prediction beside the running decoder, a row a cell.

    rounds: the model's `rounds` table, where there is one: rounds and acceptance rates get intervals from it.
    """
    document = _document(validation)
    rows = []
    for cell in document["cells"]:
        row = {
            "model": model,
            "drafter": cell.get("drafter", "self"),
            "exit_layer": cell["exit_layer"],
            "draft_length": cell["draft_length"],
        }
        for side in ("predicted", "measured"):
            counts = cell[side]
            row |= {f"{side}_{name}": counts.get(name, np.nan) for name in _COUNTS}
            drafted = counts.get("drafted")
            row[f"{side}_acceptance_rate"] = counts["accepted"] / drafted if drafted else np.nan
        row |= {name: cell.get(name) for name in ("rounds_equal", "tokens_equal", "ties", "speedup_predicted")}
        row["speedup_measured"] = cell.get("speedup_measured")
        low, high = cell.get("speedup_measured_quantiles") or _NO_INTERVAL
        rows.append(row | {"speedup_measured_20": low, "speedup_measured_80": high})
    table = pd.DataFrame(rows).astype({"exit_layer": "Int64"})
    return table if rounds is None or rounds.empty else _with_intervals(table, rounds)


def _with_intervals(table: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """Intervals of rounds and acceptance rates over the prompts that a cell was run on."""
    cells = np.array(_cells_of(rounds), dtype=object)
    found = []
    for key in _cells_of(table):
        found.append(_intervals_of_cell(rounds[(cells == np.array(key, dtype=object)).all(axis=1)]))
    return pd.concat([table, pd.DataFrame(found, index=table.index)], axis=1)


def _cells_of(table: pd.DataFrame) -> list[tuple[int | None, int]]:
    """(exit layer, draft length) of every row; the exit layer of a draft model is None."""
    exits = table["exit_layer"].astype("Float64").fillna(-1).astype(int).tolist()
    lengths = table["draft_length"].astype(int).tolist()
    return [(None if exit_layer < 0 else exit_layer, length) for exit_layer, length in zip(exits, lengths, strict=True)]


def _intervals_of_cell(cell: pd.DataFrame) -> dict[str, float]:
    found: dict[str, float] = {}
    for side in ("predicted", "measured"):
        accepted = f"accepted_{side}"
        ran = cell.dropna(subset=[accepted])
        sums = ran.groupby("prompt")[["drafted", accepted]].sum().astype(np.float64)
        many = ran.groupby("prompt").size().to_numpy(dtype=np.float64)
        if len(many) < 2:
            continue
        share = np.full(len(many), 1 / len(many))  # a ratio to the number of prompts: the interval of a sum
        for name, above, below in (
            ("acceptance_rate", sums[accepted].to_numpy(), sums["drafted"].to_numpy()),
            ("rounds", many, share),
        ):
            bounds = SHARE if name == "acceptance_rate" else UNBOUNDED
            low, high = bootstrap_ratio(above, below, bounds=bounds)
            found |= {f"{side}_{name}_low": float(low), f"{side}_{name}_high": float(high)}
    return found


def run_lengths_table(trace: Trace, exit_layers: Iterable[int] | None = None, model: str | None = None) -> pd.DataFrame:
    """Runs of agreement by their length, at each exit layer, beside the geometric law.

    count: runs of exactly `run` tokens; at_least: of `run` or more, with its interval; geometric and
    geometric_at_least: how many independent agreements would give.
    """
    share = np.full(len(trace), 1 / len(trace))  # a ratio to the number of prompts: the interval of a sum
    tables = []
    for runs in run_lengths(trace, exit_layers):
        at_least = runs.counts_of_prompt.T[::-1].cumsum(axis=0)[::-1].astype(np.float64)  # (run, prompts)
        low, high = bootstrap_ratio(at_least, share)
        table = runs.to_pandas()
        table["at_least"], table["at_least_low"], table["at_least_high"] = at_least.sum(axis=1), low, high
        table["geometric_at_least"] = runs.geometric[::-1].cumsum()[::-1]
        tables.append(table)
    joined = pd.concat(tables, ignore_index=True)
    joined.insert(0, "model", model or trace.manifest.model.name)
    return joined


def costs_table(costs: Costs, model: str) -> pd.DataFrame:
    """Seconds of every step: those of `Costs.to_pandas`, with the model's name."""
    table = costs.to_pandas()
    table.insert(0, "model", model)
    return table


def sweep_table(
    cells: pd.DataFrame, validation: pd.DataFrame, autoregressive_s: float, tokens: int, trace_s: float
) -> pd.DataFrame:
    """Cumulative seconds to know 1, 2, .. cells of one model: by running each on `tokens` tokens, and by one trace.

    A cell takes tokens x autoregressive_s / speedup. The cells that were validated come first, with their measured
    speedup (source "measured"); the others follow with the predicted one ("extrapolated"). trace_s: generation,
    trace and prediction, once for all cells ("trace").
    """
    keys = ["drafter", "exit_layer", "draft_length"]
    measured = validation.dropna(subset=["speedup_measured"])[[*keys, "speedup_measured"]]
    merged = cells[[*keys, "speedup"]].merge(measured, on=keys, how="left").dropna(subset=["speedup"])
    merged["source"] = np.where(merged["speedup_measured"].notna(), "measured", "extrapolated")
    merged["speedup"] = merged["speedup_measured"].fillna(merged["speedup"])
    merged = merged.sort_values(["source", *keys], ascending=[False, True, True, True], ignore_index=True)
    merged["seconds"] = (tokens * autoregressive_s / merged["speedup"]).cumsum()
    merged["cells"] = np.arange(1, len(merged) + 1)
    by_trace = merged[["cells"]].assign(source="trace", seconds=trace_s)
    return pd.concat([merged[["cells", "source", *keys, "seconds"]], by_trace], ignore_index=True)


__all__: Sequence[str] = (
    "LensTable",
    "cells_table",
    "costs_table",
    "layers_table",
    "lens_table",
    "run_lengths_table",
    "sweep_table",
    "validation_table",
)


def _document(result: Any) -> Mapping[str, Any]:
    """The JSON of a result, or the document itself."""
    return result if isinstance(result, Mapping) else result.to_json()
