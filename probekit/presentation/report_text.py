"""The report's text: definitions, labels, and the rows of its tables, as the template shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from probekit.costs.profile import Costs
from probekit.presentation.next_steps import next_steps, not_measured
from probekit.presentation.report_data import number
from probekit.presentation.study_folder import StudyFolder
from probekit.traces.manifest import Manifest
from probekit.traces.trace import Trace

MEASURES = {
    "speedup": "predicted speedup",
    "acceptance_rate": "acceptance rate (%)",
    "tokens_per_round": "tokens per round",
}
POOLS = {"all": "all texts", "even": "even texts (chosen on)", "odd": "odd texts (measured on)"}
FIRST_ROUNDS = {"prefill": "after the prefill's token (probekit)", "draft": "straight after the prompt (transformers)"}

DEFINITIONS = {
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


def standfirst(study: StudyFolder) -> str:
    """The sentence below the title: which models, texts and machine."""
    manifest = study.trace(study.models[0]).manifest
    asked, names = manifest.settings, [entry["label"] for entry in study.entries]
    return (
        f"{listed(names)}: {manifest.prompt_count} texts of up to {asked.max_new_tokens} new tokens, "
        f"{asked.text} decoding, {asked.dtype} on {asked.device}. One trace of each model predicts every "
        "round of speculative decoding; the running decoder then checks the prediction."
    )


def study_view(study: StudyFolder) -> dict[str, Any]:
    """What the template shows of a study, by the names that it uses."""
    summary = study.summary
    versions = summary.get("versions") or {}
    machine = summary.get("machine") or {}
    return {
        "models": [_recommendation(study, model) for model in study.models],
        "unspeculated": any(study.chosen(model) is None for model in study.models),
        "ranked": any((entry.get("choice") or {}).get("way") for entry in study.entries),
        "layers": [row for model in study.models for row in _layer_rows(study, model)],
        "cells_note": _cells_note(study),
        "validation": [
            (entry["label"], [_validation_row(cell) for cell in validated_cells(entry)])
            for entry in study.entries
            if validated_cells(entry)
        ],
        "costs": [row for model in study.models for row in _cost_rows(study, model)],
        "costs_note": _costs_note(study),
        "not_measured": not_measured(study.trace(study.models[0]).manifest.settings, study.entries),
        "created": summary.get("created", "at an unknown time"),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()) or "unknown versions",
        "machine": ", ".join(f"{name}: {value}" for name, value in machine.items() if value not in (None, "")),
        "settings": json.dumps(summary.get("settings") or {}, indent=2, ensure_ascii=False),
        "provenance": _provenance(study),
    }


def _recommendation(study: StudyFolder, model: str) -> dict[str, Any]:
    entry, pair = study.entry(model), study.chosen(model)
    choice = entry.get("choice") or {}
    runners_up = choice.get("runners_up") or []
    cell = next((cell for cell in validated_cells(entry) if (cell["exit_layer"], cell["draft_length"]) == pair), {})
    return {
        "label": entry["label"],
        "sentence": capital(entry["sentence"].removeprefix(f"{entry['label']}: ")),
        "pair": pair and {"drafter": drafter_name(pair[0], choice), "length": pair[1]},
        "way": _fastest_way(entry),
        "predicted": choice.get("speedup") if pair else None,
        "interval": choice.get("interval") if pair else None,
        "measured": cell.get("speedup_measured"),
        "measured_span": cell.get("speedup_measured_quantiles"),
        "next": next_steps(entry, study.folder / str(entry["trace"]), study.trace(model).sampling),
        "runners_up": [
            {
                "words": f"E {drafter_name(each['exit_layer'], each)}, K {each['draft_length']}",
                "speedup": each["speedup"],
            }
            for each in runners_up
        ],
    }


def _fastest_way(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The best of all ways: in words, its predicted speedup, and the measured one where the decoder ran it."""
    way = (entry.get("choice") or {}).get("way")
    if way is None or way["policy"] == "none":
        return None
    by = "" if way["policy"] == "fixed" else f" by {way['policy']}"
    ran = (entry.get("ways") or {}).get("validated") or [{}]  # the best first
    return {
        "words": f"{way_label(way)}{by}, K {way['draft_length']}",
        "speedup": way["speedup"],
        "interval": way["interval"],
        "measured": ran[0].get("speedup_measured"),
    }


def way_label(row: Mapping[str, Any]) -> str:
    """Who drafts, as a person reads it: `layer 3`, `layer 3, tree:2x1`, `ngram:2`."""
    exit_layer, drafter = row["exit_layer"], str(row["drafter"])
    if exit_layer is None:
        return drafter
    return f"layer {exit_layer}" if drafter == "self" else f"layer {exit_layer}, {drafter}"


def capital(sentence: str) -> str:
    """The sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def drafter_name(exit_layer: int | None, document: Mapping[str, Any]) -> str:
    """The exit layer, or the draft model's name where a cell has none."""
    return str(exit_layer) if exit_layer is not None else str(document.get("drafter") or "draft model")


def _layer_rows(study: StudyFolder, model: str) -> Iterator[dict[str, Any]]:
    rows, label = study.of("layers", model), study.label(model)
    raw = rows[rows["lens"] == "raw"].set_index("layer")["agreement"]
    for row in rows[rows["lens"] == "final-norm"].sort_values("layer").itertuples():
        yield {
            "model": label,
            "layer": row.layer,
            "agreement": number(row.agreement),
            "interval": (number(row.agreement_low), number(row.agreement_high)),
            "raw": number(raw.get(row.layer)),
            "echo": number(row.echo),
            "entropy": number(row.entropy),
            "kl": number(row.kl),
        }


def _cells_note(study: StudyFolder) -> str:
    cells = study.table("cells")
    first = ", ".join(sorted(cells["first_round"].astype(str).unique()))
    return f"Predicted from the {cells['prompts'].max():.0f} texts that the choice was made on; first round: {first}."


def validated_cells(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells that the decoder ran; none where the study validated nothing."""
    return (entry.get("validation") or {}).get("cells") or []


def _validation_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "drafter": drafter_name(cell["exit_layer"], cell),
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


def _cost_rows(study: StudyFolder, model: str) -> Iterator[dict[str, Any]]:
    """The steps at the chosen pair, or at the best pair that was found where speculation does not pay."""
    entry = study.entry(model)
    costs = costs_of(entry)
    if costs is None:
        return
    choice = entry["choice"]
    best: Mapping[str, Any] = next(iter(choice.get("runners_up") or []), {})
    exit_layer, drafts = study.chosen(model) or (best.get("exit_layer"), best.get("draft_length"))
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
    known = [costs for costs in (costs_of(entry) for entry in study.entries) if costs is not None]
    kinds = dict.fromkeys((costs.source, costs.device, costs.dtype, costs.context) for costs in known)
    ways = {"measured": "Measured on {}", "roofline": "From a roofline of {} (bytes over bandwidth)"}
    words = (
        f"{ways.get(source, source).format(device)}, {dtype}, {context} tokens in the cache."
        for source, device, dtype, context in kinds
    )
    return " ".join(words)


def _provenance(study: StudyFolder) -> list[tuple[str, list[str]]]:
    """(name, one value a model): what each trace was made with, and what it found out about itself."""
    columns = [_provenance_of(study.entry(model), study.trace(model)) for model in study.models]
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def _provenance_of(entry: Mapping[str, Any], trace: Trace) -> dict[str, str]:
    manifest, model, timings = trace.manifest, trace.manifest.model, entry.get("timings") or {}
    asked, read, measured = manifest.settings, manifest.provenance, manifest.measured
    decoding = ", ".join(f"{name} {value:g}" for name, value in asked.decoding.items())
    order, rows = asked.draft_vocabulary, (entry.get("choice") or {}).get("draft_rows")
    looped = np.average(trace.texts["looped"], weights=trace.texts["new_tokens"])
    return {
        "reference": model.reference + (f" @ {model.revision}" if model.revision else ""),
        "weights": model.weights_hash or "not hashed",
        "shape": f"{model.depth} layers × {model.width}, vocabulary {model.vocabulary}",
        "parameters": f"{model.parameters:,}",
        "embeddings": model.embeddings or ("tied" if model.tied else "untied"),
        "drafter": manifest.drafter.name if manifest.drafter else "none",
        "exit heads": _exit_heads(manifest),
        "draft head": f"{rows:,} rows, the most frequent tokens of {order.source}" if rows and order else "all rows",
        "arithmetic": f"{asked.dtype} on {asked.device}",
        "text": f"{asked.text} ({decoding}), seed {asked.seed}, at most {asked.max_new_tokens} new tokens",
        "prompts": f"{manifest.prompt_count} from {read.prompts_source}, hash {read.prompts_hash}",
        "repeated text": f"{looped:.1%} of the generated tokens lie in a repeated run of 8".replace("%", " %"),
        "noise of a logit": "not measured" if measured.noise is None else f"{measured.noise:.2g}",
        "processors not applied": ", ".join(read.ignored_processors) or "none",
        **({"remarks": " ".join(read.remarks)} if read.remarks else {}),
        "back-offs for memory": str(len(measured.backoffs)),
        "time": _took(timings),
        "traced with": ", ".join(f"{name} {value}" for name, value in read.versions.items()) or "unknown versions",
    }


def _exit_heads(manifest: Manifest) -> str:
    heads = manifest.settings.exit_heads
    return "none" if heads is None else f"{heads.fingerprint}, of exits {listed([str(each) for each in heads.exits])}"


def _took(timings: Mapping[str, Any]) -> str:
    """What the text took, and what it took to read it and to tabulate every exit and draft length."""
    if timings.get("generation_s") is None or timings.get("agreement_trace_s") is None:
        return "not timed"
    return (
        f"{timings['generation_s']:.1f} s to generate {timings['prompts']:.0f} texts, one at a time; "
        f"{timings['agreement_trace_s']:.1f} s to trace their agreement and to predict every pair"
    )


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def costs_of(entry: Mapping[str, Any]) -> Costs | None:
    """The costs that the choice was made with."""
    document = (entry.get("choice") or {}).get("costs")
    return Costs.from_json(document) if document else None
