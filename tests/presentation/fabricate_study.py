"""A small study folder without a model: for tests of the report and of the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from traces.fabricate import fabricate

from probekit.choice.choose import Choice, choose
from probekit.choice.rank import priced, rank
from probekit.choice.ranking import Ranking
from probekit.costs.profile import Costs, DraftModelCosts
from probekit.files import atomic_text
from probekit.prediction.predict import predict
from probekit.prediction.replay import replay
from probekit.presentation import tables
from probekit.study.summary import recommendation
from probekit.traces.trace import Trace

MODELS = ("tales-untied", "tales-tied", "tales-layerskip")
# How fast layers come to agree with the model: small is early.
HALF_WAY = {"tales-untied": 0.75, "tales-tied": 0.6, "tales-layerskip": 0.25}

# Token texts as a tracer writes them; some with no glyph in common fonts, some with none at all, some like markup.
VOCABULARY = (
    "</s>", "␣the", "␣king", "␣and", "␣a", "␣of", "␣wolf", "␣forest", ",", ".", "⏎", "␣she", "␣princess", "␣said",
    "␣unbelievably", "ing", "␣$5", "<b>", "␣王", "␣القمر", "�", "\u200b", "␣ça", "😀", "␣to", "␣in", "␣he", "␣was",
    "␣his", "␣her", "␣it", "␣had", "␣that", "␣with", "␣as", "␣on", "␣but", "␣not", "␣so", "␣for", "␣at", "␣which",
    "␣old", "␣little", "␣went", "␣came", "␣then", "␣all", "!", "”",
)  # fmt: skip


def fabricate_study(
    folder: Path,
    models: Sequence[str] = MODELS,
    *,
    depth: int = 6,
    prompts: int = 6,
    tokens: int = 24,
    draft_lengths: Sequence[int] = (1, 2, 3, 4),
    text: str = "greedy",
    drafter: bool = False,
    attributed: int = 0,
    probed: bool = False,
) -> Path:
    """Write what `probekit study` leaves behind, but for the previews and the report. Returns the folder.

    attributed: of so many texts of each model it is known who wrote their logits, of the last model of none.
    probed: the residual stream of each was probed.
    """
    entries = []
    parts: dict[str, list[pd.DataFrame]] = {}
    for seed, name in enumerate(models):
        trace = fabricate_trace(name, depth, prompts, tokens, seed=seed, text=text, drafter=drafter)
        trace.save(folder / "traces" / name)
        even = trace.select(trace.prompts[::2])
        prediction = predict(even, draft_lengths=draft_lengths)
        costs = fabricate_costs(depth, max(draft_lengths), drafter)
        ways = rank(even, costs, draft_lengths=draft_lengths)
        choice = choose(prediction, costs, ways=ways)
        validation, rounds = fabricate_validation(trace.select(trace.prompts[1::2]), choice, name)
        for table, frame in (
            ("layers", tables.layers_table(trace, name)),
            ("cells", tables.cells_table(prediction, choice, name)),
            ("validation", tables.validation_table(validation, name, rounds)),
            ("rounds", rounds),
            ("run_lengths", tables.run_lengths_table(trace, model=name) if text == "greedy" else None),
            ("costs", tables.costs_table(costs, name)),
            ("ways", ways.to_pandas().assign(model=name)),
            ("attribution", fabricate_shares(trace, attributed) if attributed and name != models[-1] else None),
            ("probes", fabricate_probes(name, depth, seed) if probed else None),
        ):
            if frame is not None:
                parts.setdefault(table, []).append(frame)
        entries.append(_entry(name, trace, choice, validation))
    (folder / "tables").mkdir()
    for table, frames in parts.items():
        atomic_text(folder / "tables" / f"{table}.csv", pd.concat(frames, ignore_index=True).to_csv(index=False))
    summary = {
        "schema": "probekit/study/1",
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"probekit": "0.1.0", "torch": "2.13.0"},
        "machine": {"system": "Linux", "cores": 2},
        "settings": {"models": list(models), "max_new_tokens": tokens, "draft_lengths": list(draft_lengths)},
        "seconds": {"total": 120.0},
        "models": entries,
    }
    atomic_text(folder / "summary.json", json.dumps(summary, ensure_ascii=False))
    return folder


def fabricate_trace(
    name: str, depth: int = 6, prompts: int = 6, tokens: int = 24, *, seed: int = 0, text: str = "greedy",
    drafter: bool = False,
) -> Trace:  # fmt: skip
    """`fabricate`, with agreement that rises at the model's own pace, and with words for tokens."""
    pace = HALF_WAY.get(name, 0.5)
    share = np.arange(depth) / depth
    trace = fabricate(
        depth, prompts, tokens, seed, agreement=0.97 / (1 + np.exp(-9 * (share - pace))), top=2, text=text,
        drafter=drafter,
    )  # fmt: skip
    words = np.array(VOCABULARY, dtype=object)
    spoken = trace.tokens.assign(text=words[trace.tokens["text_id"]])
    top = trace.top
    assert top is not None
    texts = trace.texts.assign(
        text=[" " + " ".join(f"w{token}" for token in trace.prompt_ids(prompt)) for prompt in trace.prompts]
    )
    manifest = trace.manifest.but(model=replace(trace.manifest.model, name=name, tied=name.endswith("-tied")))
    return Trace.from_frames(
        manifest, texts, spoken, trace.layers, top=top.assign(token_text=words[top["token"]]), drafter=trace.drafter
    )


def fabricate_shares(trace: Trace, prompts: int) -> pd.DataFrame:
    """Random shares of the logits of a trace's first texts, as `tables/attribution.csv` has them."""
    terms = ["embedding", *(f"{kind}:{n}" for n in range(trace.depth) for kind in ("attention", "mlp")), "head bias"]
    draw, rows = np.random.default_rng(3), []
    for prompt in trace.prompts[:prompts]:
        for position in range(len(trace.prompt_ids(prompt)) + len(trace.outputs(prompt)) - 1):
            rows += [
                {
                    "model": trace.manifest.model.name,
                    "prompt": prompt,
                    "position": position,
                    "term": term,
                    "logit": each,
                }
                for term, each in zip(terms, draw.normal(size=len(terms)).round(4).tolist(), strict=True)
            ]
    return pd.DataFrame(rows)


def fabricate_probes(name: str, depth: int, seed: int = 0) -> pd.DataFrame:
    """What probes of a study say, as `tables/probes.csv` has it: the residual is ahead of the lens."""
    draw, rows = np.random.default_rng(seed), []
    kinds = {
        "accepted": {"probe": 0.85, "control": 0.5, "confidence": 0.75, "position": 0.55, "together": 0.87},
        "answer": {"lens": 0.2, "probe": 0.5, "control": 0.05},
    }
    for label, values in kinds.items():
        for layer in range(label == "accepted", depth):
            for kind, value in values.items():
                rise = 0.0 if kind == "control" else 0.1 * layer / depth
                value = value + rise + 0.01 * draw.normal()
                rows.append({"model": name, "label": label, "layer": layer, "kind": kind, "value": value,
                             "low": value - 0.05, "high": value + 0.05})  # fmt: skip
    return pd.DataFrame(rows)


def fabricate_costs(depth: int, longest: int, drafter: bool = False) -> Costs:
    """Every layer takes 1 ms a pass, whatever its rows; the head 0.5 ms."""
    layer, head = 1e-3, 0.5e-3
    rows = range(1, longest + 2)
    return Costs(
        source="measured",
        device="a machine that does not exist",
        dtype="float32",
        context=128,
        depth=depth,
        autoregressive_s=depth * layer + head,
        early_s={exit_layer: exit_layer * layer for exit_layer in range(1, depth)},
        head_s=head,
        verify_s={
            (exit_layer, count): (depth - exit_layer) * layer + head + 1e-4 * count
            for exit_layer in range(1, depth)
            for count in rows
        },
        overhead_s=1e-4,
        draft_model=DraftModelCosts(
            "fabricated-drafter", 2e-3, 2.2e-3, {count: depth * layer + head + 1e-4 * count for count in rows}
        )
        if drafter
        else None,
    )


def fabricate_validation(trace: Trace, choice: Choice, name: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """The document of a validation that held, and its rounds: the prediction, measured to the token."""
    chosen = choice.ranking[:3] + choice.ranking[4 :: max(1, len(choice.ranking) // 4)]
    lengths = sorted({row.draft_length for row in choice.ranking})
    prediction = predict(trace, draft_lengths=lengths, with_rounds=True)
    cells, rounds = [], []
    for place, row in enumerate(chosen):
        counts = prediction.cell(*row.cell).counts()
        measured = row.speedup * (0.9 + 0.02 * place)
        cells.append(
            {
                "exit_layer": row.exit_layer,
                "draft_length": row.draft_length,
                "drafter": row.drafter or "self",
                "prompts": len(trace),
                "predicted": counts,
                "measured": counts,
                "rounds_equal": True,
                "tokens_equal": True,
                "ties": 0,
                "speedup_predicted": row.speedup,
                "speedup_measured": measured,
                "speedup_measured_quantiles": [0.97 * measured, 1.03 * measured],
            }
        )
    for each in prediction.rounds or ():
        if (each.exit_layer, each.draft_length) in [row.cell for row in chosen]:
            rounds += [
                {"model": name, "prompt": each.prompt, "exit_layer": each.exit_layer,
                 "draft_length": each.draft_length, "round": place, "drafted": drafted,
                 "accepted_predicted": accepted, "accepted_measured": accepted}
                for place, (drafted, accepted) in enumerate(zip(each.drafted, each.accepted, strict=True))
            ]  # fmt: skip
    return {"schema": "probekit/validate/1", "cells": cells}, pd.DataFrame(rounds)


def _entry(name: str, trace: Trace, choice: Choice, validation: dict[str, Any]) -> dict[str, Any]:
    model = trace.manifest.model
    everything = np.concatenate([trace.agreement(prompt) for prompt in trace.prompts], axis=1)
    pair = (choice.exit_layer, choice.draft_length)
    chosen = next((cell for cell in validation["cells"] if (cell["exit_layer"], cell["draft_length"]) == pair), None)
    return {
        "name": name,
        "label": name,
        "reference": name,
        "trace": f"traces/{name}",
        "anatomy": {"layers": model.depth, "width": model.width, "vocabulary": model.vocabulary, "tied": model.tied,
                    "parameters": model.parameters},
        "sentence": recommendation(choice, chosen),
        "choice": choice.to_json(),
        "chosen_validation": chosen if choice.speculate else None,
        "validation": validation,
        "ways": choice.ways and {**choice.ways.brief(), "validated": _ways_run(trace, choice.ways)},
        "agreement": everything.mean(axis=1).tolist(),
        "looped": float(trace.texts["looped"].mean()),
        "timings": {"prompts": 6, "tokens": 120, "generation_s": 2.0, "agreement_trace_s": 0.8},
    }  # fmt: skip


def _ways_run(trace: Trace, ways: Ranking) -> list[dict[str, Any]]:
    """Ways that ran as they were predicted, a little slower."""
    if trace.manifest.settings.text != "greedy":
        return []
    rows = []
    for way in (each.way for each in ways.to_run()):
        assert way is not None
        counts, found = replay(trace.select(trace.prompts[1::2]), way).counts(), priced(trace, way, ways.costs)
        rows.append(
            {"drafters": [key.label for key in way.keys], "policy": way.name, "exit_layer": found.exit_layer,
             "draft_length": way.draft_length, "predicted": counts, "measured": counts, "rounds_equal": True,
             "unexplained": 0, "speedup_predicted": found.speedup, "speedup_measured": 0.95 * found.speedup}
        )  # fmt: skip
    return rows
