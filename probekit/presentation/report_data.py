"""Traces as the page's scripts read them: token texts in one list, numbers and bits in base64, within a size.

The replay needs little: a bit for each exit layer and token. Lens tables and drafted tokens are added while there is
room, the models in turn.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probekit.costs.profile import Costs
from probekit.presentation.report_replays import Played
from probekit.presentation.tokens import shown
from probekit.traces.token_text import visible
from probekit.traces.trace import Trace

if TYPE_CHECKING:
    from probekit.presentation.study_folder import Written
    from probekit.probing.attribution import Attribution

LIMIT_BYTES = 5_000_000
_ROOM_FOR_THE_REST = 400_000  # tables, scripts and styles
FIGURES = ("speedup", "acceptance_rate", "tokens_per_round")
"""What the table over exit layers and draft lengths can show; each with `_low` and `_high`."""


def safe_json(document: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def number(value: Any) -> float | None:
    """A figure of a table as JSON can hold it."""
    return None if value is None or pd.isna(value) else float(value)


@dataclass(frozen=True, eq=False)
class Source:
    """What the replay and the lens tables of one model are made from; without cells there is no replay.

    attributions: of texts by their prompt, of the model's tokens at each row.
    """

    label: str
    trace: Trace
    cells: pd.DataFrame | None = None
    costs: Costs | None = None
    pair: tuple[int | None, int] | None = None
    ways: Sequence[Played] = ()
    attributions: Mapping[int, Attribution | Written] = field(default_factory=dict)

    @property
    def draft_rows(self) -> int | None:
        """Rows of the head that exit layers draft with; None: all."""
        return None if self.costs is None else self.costs.draft_rows


def pack_models(sources: Sequence[Source], limit: int = LIMIT_BYTES - _ROOM_FOR_THE_REST) -> list[dict[str, Any]]:
    """The models as the page's scripts read them, in at most `limit` bytes where that is possible.

    Every text can be replayed by pairs. Lens tables of the texts whose top ten were kept come next, then the rounds of
    other ways, what was drafted, and the other lens tables, the models in turn, until the page is full.
    """
    packers = [_Packer(source) for source in sources]
    spent = sum(packer.bytes for packer in packers)
    most = max(len(packer.prompts) for packer in packers)
    kept = max(source.trace.manifest.settings.top_prompts for source in sources)
    wanted = [("lens", range(kept)), ("ways", range(most)), ("drafts", range(most)), ("lens", range(kept, most))]
    for part, places in wanted:
        for place in places:
            for packer in packers:
                if place >= len(packer.prompts) or (part != "lens" and packer.source.cells is None):
                    continue
                piece = getattr(packer, part)(place)
                size = len(safe_json(piece))
                if spent + size <= limit:
                    packer.prompts[place][part] = piece
                    spent += size
    return [packer.document() for packer in packers]


class _Packer:
    """One model's texts, packed piece by piece; token texts are collected in one list."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.trace = source.trace
        self.manifest = source.trace.manifest
        self._names = token_texts(source.trace)
        self._places: dict[int, int] = {}
        self._layers = source.trace.layers.groupby("prompt")
        self._top = None if source.trace.top is None else source.trace.top.groupby("prompt")
        self.prompts = [self._text(row) for row in source.trace.texts.to_dict("records")]
        self.bytes = len(safe_json(self.prompts)) + 12 * len(self._names)

    def document(self) -> dict[str, Any]:
        """The whole model."""
        cells, costs, pair = self.source.cells, self.source.costs, self.source.pair
        longest = 1 if cells is None else int(cells["draft_length"].max())
        exits: list[int | None] = [*range(1, self.trace.depth), *([None] if self.manifest.drafter else [])]
        return {
            "label": self.source.label,
            "depth": self.trace.depth,
            "vocabulary": self.manifest.model.vocabulary,
            "text": self.manifest.settings.text,
            "budget": max(self.manifest.settings.max_new_tokens, int(self.trace.texts["new_tokens"].max())),
            "drafter": self.manifest.drafter.name if self.manifest.drafter else None,
            "longest": longest,
            "chosen": pair,
            "cells": [] if cells is None else [_cell(row) for row in cells.to_dict("records")],
            "costs": costs and {
                "autoregressive": costs.autoregressive_s,
                "rounds": [[_seconds(costs, each, drafts) for drafts in range(longest + 1)] for each in exits],
            },
            "ways": [way.describe() for way in self.source.ways],
            "prompts": self.prompts,
            "tokens": [self._names.get(token) or f"#{token}" for token in self._places],
        }  # fmt: skip

    def _text(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        prompt = int(row["prompt"])
        ids = np.concatenate([self.trace.prompt_ids(prompt), self.trace.outputs(prompt)])
        kept = ("prompt", "kind", "text", "prompt_tokens", "new_tokens", "ended")
        signal = None if self.source.cells is None else packed(self._signal(prompt))
        known = {name: row[name] for name in kept}
        return {**known, "ids": self._tokens(ids), "signal": signal, "drafts": None, "lens": None, "ways": None,
                "attribution": self._attribution(prompt)}  # fmt: skip

    def _attribution(self, prompt: int) -> dict[str, Any] | None:
        """Logit of the model's token at each row, (rows,), and who wrote it: (layers + 1, rows) each, as tables run."""
        found = self.source.attributions.get(prompt)
        if found is None:
            return None
        rows, depth = len(found.logits), self.trace.depth
        written = {name: np.zeros((depth + 1, rows), np.float32) for name in ("embedding", "attention", "mlp")}
        other = np.zeros(rows, np.float32)
        for term, values in zip(found.terms, found.values.T, strict=True):
            kind, _, layer = term.partition(":")
            if kind in written:
                written[kind][int(layer) + 1 if layer else 0] += values
            else:
                other += values
        return {
            **{name: packed(values) for name, values in written.items()},
            "other": packed(other), "logits": packed(found.logits.astype(np.float32)),
        }  # fmt: skip

    def _signal(self, prompt: int) -> np.ndarray:
        """(exits, N), the draft model last: agreement, bool, for greedy text, else chances of acceptance."""
        trace, rounded, kept = self.trace, self._rounded, self.source.draft_rows
        greedy = self.manifest.settings.text == "greedy"
        if kept is not None:
            rows = trace.draft_head_agreement(prompt, kept, rounded=True)
        else:
            rows = trace.agreement(prompt, rounded=rounded) if greedy else trace.accept_probability(prompt)
        rows = rows[1:-1]
        if self.manifest.drafter is None:
            return rows
        own = trace.drafter_agreement(prompt, rounded=rounded) if greedy else trace.drafter_accept_probability(prompt)
        return np.concatenate([rows, own[None]])

    @property
    def _rounded(self) -> bool:
        """A decoder that runs in a 16-bit type compares rounded logits."""
        return self.manifest.settings.dtype != "float32" and self.manifest.settings.statistics == "all"

    def drafts(self, place: int) -> dict[str, Any] | None:
        """(exits, N) tokens that each exit layer, and last the draft model, would draft.

        A trace knows whether a draft head of fewer rows agrees, not what it says instead.
        """
        if self.manifest.settings.statistics != "all" or self.source.draft_rows is not None:
            return None
        prompt, column = self.prompts[place]["prompt"], "argmax_rounded" if self._rounded else "argmax"
        rows = self.trace.values(prompt, column)[1:-1]
        if self.manifest.drafter is not None:
            rows = np.concatenate([rows, self.trace.drafter_values(prompt, column)[None]])
        return self._tokens(rows)

    def ways(self, place: int) -> list[dict[str, Any]]:
        """The rounds of each way on a text, and their predicted seconds; rejected drafts as places of token texts."""
        prompt, found = self.prompts[place]["prompt"], []
        for way in self.source.ways:
            rounds = way.of(prompt)
            wrong = rounds[:, 4]
            wrong[wrong > 0] = [1 + self._places.setdefault(token - 1, len(self._places)) for token in wrong if token]
            found.append({"rounds": packed(rounds.astype(np.uint32)), "seconds": way.seconds[prompt]})
        return found

    def lens(self, place: int) -> dict[str, Any] | None:
        """{lens: figures over (layer, row)}; with the top ten where the run kept them."""
        if self.manifest.settings.statistics != "all":
            return None
        prompt = self.prompts[place]["prompt"]
        layers = self._layers.get_group(prompt).sort_values(["lens", "layer", "position"])
        top = self._top.get_group(prompt) if self._top is not None and prompt in self._top.groups else None
        pieces: dict[str, Any] = {}
        for lens in self.manifest.settings.lenses:
            rows = layers[layers["lens"] == lens]
            piece = {name: packed(rows[name].to_numpy(), "f16") for name in ("probability", "entropy", "kl")}
            piece |= {"argmax": self._tokens(rows["argmax"].to_numpy()), "rank": packed(rows["rank"].to_numpy())}
            if top is not None:
                best = top[top["lens"] == lens].sort_values(["layer", "position", "place"])
                tokens, shares = self._tokens(best["token"].to_numpy()), packed(best["probability"].to_numpy(), "f16")
                piece["top"] = {"tokens": tokens, "probabilities": shares}
            pieces[lens] = piece
        return pieces

    def _tokens(self, ids: np.ndarray) -> dict[str, Any]:
        """Token ids as places in the list of token texts."""
        unique, inverse = np.unique(ids, return_inverse=True)
        places = [self._places.setdefault(token, len(self._places)) for token in unique.tolist()]
        return packed(np.array(places, dtype=np.uint32)[inverse.ravel()])


def token_texts(trace: Trace) -> dict[int, str]:
    """{token id: its text, visible}, of the tokens whose text the trace keeps: those of its texts and its top tens."""
    names: dict[int, str] = {}
    if trace.top is not None:
        top = trace.top.drop_duplicates("token")
        names |= dict(zip(top["token"].tolist(), top["token_text"].tolist(), strict=True))
    tokens = trace.tokens.drop_duplicates("text_id")
    names |= dict(zip(tokens["text_id"].tolist(), tokens["text"].tolist(), strict=True))
    for prompt in trace.prompts:
        # No row predicts a sequence's first token: it is what the others leave of the prompt.
        first, *others = trace.prompt_ids(prompt).tolist()
        rest, whole = "".join(names[token] for token in others), visible(trace.text(prompt))
        if first not in names and whole.endswith(rest) and len(rest) < len(whole):
            names[first] = whole.removesuffix(rest)
    return {token: shown(text) for token, text in names.items()}


def _cell(row: Mapping[Any, Any]) -> dict[str, Any]:
    figures = {name: [number(row.get(f"{name}{end}")) for end in ("", "_low", "_high")] for name in FIGURES}
    exit_layer = number(row["exit_layer"])
    return {"exit": None if exit_layer is None else int(exit_layer), "length": int(row["draft_length"]), **figures}


def _seconds(costs: Costs, exit_layer: int | None, drafts: int) -> float | None:
    known = exit_layer in costs.early_s if exit_layer is not None else costs.draft_model is not None
    return costs.round_seconds(exit_layer, drafts) if known and drafts <= costs.longest_draft else None


def packed(values: np.ndarray, kind: str | None = None) -> dict[str, Any]:
    """An array in base64, little-endian, row after row.

    kind: "bits" for bool (first bit highest), "u16" or "u32" for counts, "f32" for other numbers, by default; "f16"
    when asked for.
    """
    values = np.ascontiguousarray(values).ravel()
    if values.dtype == bool:
        return {"kind": "bits", "length": len(values), "data": _base64(np.packbits(values))}
    if kind is None:
        whole = np.issubdtype(values.dtype, np.integer)
        kind = "f32" if not whole else "u16" if values.max(initial=0) < 2**16 else "u32"
    if kind == "f16":
        values = np.clip(values, -65504, 65504)
    return {"kind": kind, "data": _base64(values.astype(f"<{kind[0]}{int(kind[1:]) // 8}"))}


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
