"""Traces written out by hand: agreement, echo and the rank of the lens's word, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from traces.fabricate import record

from probekit.traces.manifest import Manifest
from probekit.traces.token_text import looped
from probekit.traces.trace import Trace


def toy(
    agrees: Sequence[Sequence[Sequence[int]]],
    *,
    echo: Sequence[Sequence[Sequence[int]]] | None = None,
    model_rank: Sequence[Sequence[Sequence[int]]] | None = None,
    raw: Sequence[Sequence[Sequence[int]]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    words: Sequence[Sequence[str]] | None = None,
    kinds: Sequence[str] | None = None,
    accept: Sequence[Sequence[Sequence[float]]] | None = None,
    name: str = "toy",
    prompts_hash: str = "hash",
) -> Trace:
    """A trace of texts after one-token prompts. agrees: [prompt][layer 0..L-1][position]; layer L always agrees.

    raw: agreement of the raw lens (the final-norm lens's by default). outputs: token ids; words: their texts. accept:
    w, for sampled text. Without `model_rank`, what disagrees is far from the model's words.
    """
    depth = len(agrees[0])
    texts, tokens, layers = [], [], []
    for prompt, by_layer in enumerate(agrees):
        N = len(by_layer[0])
        ids = np.asarray(outputs[prompt]) if outputs else np.arange(1, N + 1) + 100 * prompt
        position = np.arange(N)
        keys = {"prompt": prompt, "position": position, "output": position}
        texts.append(
            {
                "prompt": prompt, "kind": kinds[prompt] if kinds else "", "text": "p", "continuation": "c",
                "prompt_tokens": 1, "new_tokens": N, "ended": "budget", "looped": looped(ids.tolist()),
            }
        )  # fmt: skip
        text = list(words[prompt]) if words else [f"␣w{token}" for token in ids]
        read = np.append([99], ids[:-1])
        tokens.append(pd.DataFrame({**keys, "generated": True, "input_id": read, "text_id": ids, "text": text}))
        for lens in ("final-norm", "raw"):
            chosen = raw if lens == "raw" and raw is not None else agrees
            for layer in range(depth + 1):
                own = np.asarray(chosen[prompt][layer], bool) if layer < depth else np.ones(N, bool)
                said = np.asarray(echo[prompt][layer], bool) if echo and layer < depth else np.zeros(N, bool)
                rank = np.asarray(model_rank[prompt][layer]) if model_rank and layer < depth else np.full(N, 1000)
                rank = np.where(own, 0, rank)
                columns = {
                    "argmax": 1, "probability": 0.5, "margin": 1.0, "agrees": own, "log_probability": -1.0, "rank": 0,
                    "model_rank": rank, "entropy": 1.0, "kl": np.where(own, 0.0, 2.0), "overlap": 0.5, "echo": said,
                    "near_tie": False,
                }  # fmt: skip
                if accept is not None:
                    columns["accept_probability"] = accept[prompt][layer] if layer < depth else np.ones(N)
                layers.append(pd.DataFrame({**keys, "lens": lens, "layer": layer, **columns}))
    manifest = Manifest.of(
        model=replace(record(depth, name=name), eos_ids=(0,)),
        prompts_hash=prompts_hash,
        prompts_source="toy",
        batches=(tuple(range(len(agrees))),),
        text="greedy" if accept is None else "sampled",
        decoding={"temperature": 0.0 if accept is None else 1.0, "top_k": 0, "top_p": 1.0},
        max_new_tokens=max(len(by_layer[0]) for by_layer in agrees),
    )
    return Trace.from_frames(manifest, pd.DataFrame(texts), pd.concat(tokens), pd.concat(layers))
