"""The tables of one part, made of what its rows gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from einops import repeat

from probekit.lens.lens import KINDS
from probekit.traces.manifest import Manifest
from probekit.traces.token_text import looped, spelled_bytes, visible
from probekit.tracing.continuation import ContinuedText
from probekit.tracing.prompts import Encoded
from probekit.tracing.reading import RowBlock, TopTokens


class PartTables:
    """Makes the frames of a run's parts; the text of a token is made once."""

    def __init__(self, manifest: Manifest, tokenizer: Any, encoded: Mapping[int, Encoded]) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.encoded = encoded
        self._token_texts: dict[int, str] = {}

    def frames(self, texts: Sequence[ContinuedText], blocks: Sequence[RowBlock]) -> dict[str, pd.DataFrame]:
        manifest = self.manifest
        tokens = pd.concat([pd.DataFrame(block.keys) for block in blocks], ignore_index=True)
        tokens["generated"] = tokens["output"] >= 0
        tokens["text"] = self._shown(tokens["text_id"].to_numpy())
        layers = []
        for block in blocks:
            frame = _by_layer(block.keys, manifest.settings.lenses, self.manifest.depth)
            for name, values in block.statistics.items():
                frame[name] = values.numpy().ravel()
            layers.append(frame)
        frames = {
            "texts": pd.DataFrame([self._text_row(text) for text in texts]),
            "tokens": tokens,
            "layers": pd.concat(layers, ignore_index=True),
        }
        if self.manifest.drafter is not None:
            frames["drafter"] = pd.concat(
                [
                    pd.DataFrame(
                        {name: block.keys[name] for name in ("prompt", "position", "output")}
                        | {name: values.numpy() for name, values in (block.drafter or {}).items()}
                    )
                    for block in blocks
                ],
                ignore_index=True,
            )
        if self.manifest.settings.draft_vocabulary is not None:
            frames["draft_head"] = pd.concat(
                [_draft_head_frame(block, self.manifest.depth) for block in blocks], ignore_index=True
            )
        if manifest.settings.top_prompts:
            tops = [self._top(block.top) for block in blocks if block.top is not None]
            empty = pd.DataFrame(columns=[*_by_layer_columns(), "place", "token", "token_text", "probability"])
            frames["top"] = pd.concat(tops, ignore_index=True) if tops else empty
        return frames

    def _top(self, found: TopTokens) -> pd.DataFrame:
        size = found.ids.shape[-1]
        frame = _by_layer(found.keys, self.manifest.settings.lenses, self.manifest.depth, repeated=size)
        frame["place"] = np.tile(np.arange(size, dtype=np.int8), len(frame) // size)
        frame["token"] = found.ids.ravel()
        frame["token_text"] = self._shown(found.ids.ravel())
        frame["probability"] = found.shares.ravel()
        return frame

    def _text_row(self, text: ContinuedText) -> dict[str, Any]:
        one = self.encoded[text.prompt]
        return {
            "prompt": text.prompt,
            "kind": one.prompt.kind,
            "text": one.text or self._decoded_text(text.sequence[: text.context]),
            "continuation": self._continuation(text),
            "prompt_tokens": text.context,
            "new_tokens": len(text.tokens),
            "ended": text.ended,
            "looped": looped(text.tokens),
        }

    def _continuation(self, text: ContinuedText) -> str:
        """The continuation as it reads after its prompt, special tokens left out."""
        whole, prompt = self._decoded_text(text.sequence), self._decoded_text(text.sequence[: text.context])
        return whole[len(prompt) :] if whole.startswith(prompt) else self._decoded_text(text.tokens)

    def _decoded_text(self, ids: Sequence[int]) -> str:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return " ".join(map(str, ids))
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _shown(self, ids: np.ndarray) -> list[str]:
        """Each token's own text, white space made visible; its bytes where it is no whole character."""
        tokenizer = self.tokenizer
        for token in set(ids.tolist()) - set(self._token_texts):
            text = str(token)
            if tokenizer is not None:
                text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
                if not text or "\ufffd" in text:
                    text = spelled_bytes(str(tokenizer.convert_ids_to_tokens([token])[0]))
            self._token_texts[token] = visible(text)
        return [self._token_texts[token] for token in ids.tolist()]

    def shard(self, blocks: Sequence[RowBlock]) -> bytes | None:
        """Kept residuals, (rows, width) each, with the prompt and position of every row beside them."""
        if not self.manifest.settings.keep_residuals:
            return None
        names = blocks[0].residuals
        return safetensors.torch.save(
            {name: torch.cat([block.residuals[name] for block in blocks]).contiguous() for name in names}
        )


def _by_layer_columns() -> tuple[str, ...]:
    return ("prompt", "position", "output", "lens", "layer")


def _by_layer(keys: Mapping[str, np.ndarray], lenses: Sequence[str], depth: int, repeated: int = 1) -> pd.DataFrame:
    """The keys of (lenses, layers, rows, repeated) figures, flattened."""
    shape = {"lens": len(lenses), "layer": depth + 1, "row": len(keys["prompt"]), "again": repeated}
    columns: dict[str, Any] = {
        name: repeat(keys[name], "row -> (lens layer row again)", **shape) for name in ("prompt", "position", "output")
    }
    lens = repeat(np.arange(len(lenses)), "lens -> (lens layer row again)", **shape)
    columns["lens"] = pd.Categorical.from_codes(lens, dtype=pd.CategoricalDtype(list(lenses)))
    columns["layer"] = repeat(np.arange(depth + 1, dtype=np.int16), "layer -> (lens layer row again)", **shape)
    return pd.DataFrame(columns)


def _draft_head_frame(block: RowBlock, depth: int) -> pd.DataFrame:
    generated = block.keys["output"] >= 0
    keys = {name: values[generated] for name, values in block.keys.items()}
    figures = {name: values.numpy().ravel() for name, values in (block.draft_head or {}).items()}
    return _by_layer(keys, KINDS[:1], depth).drop(columns="lens").assign(**figures)
