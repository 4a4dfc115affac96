"""Plausible random traces without a model: for tests of everything that reads a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

from probekit.traces.manifest import Manifest, ModelRecord
from probekit.traces.schema import LENSES
from probekit.traces.token_text import looped
from probekit.traces.trace import Trace


def record(depth: int = 6, vocabulary: int = 50, name: str = "fabricated") -> ModelRecord:
    return ModelRecord(
        name=name,
        reference=name,
        revision=None,
        weights_hash=f"hash-of-{name}",
        depth=depth,
        width=16,
        vocabulary=vocabulary,
        tied=False,
        parameters=1000 * depth,
        context=2048,
        eos_ids=(0,),
    )


def fabricate(
    depth: int = 6,
    prompts: int = 4,
    tokens: int = 24,
    seed: int = 0,
    *,
    text: str = "greedy",
    statistics: str = "all",
    drafter: bool = False,
    dtype: str = "float32",
    vocabulary: int = 50,
    agreement: Sequence[float] | None = None,
    lenses: Sequence[str] = LENSES,
    top: int = 0,
) -> Trace:
    """A trace in which layers agree with the model more and more often, up to layer L, which always does.

    depth: L. tokens: the budget M; about a third of the texts end earlier, by an end-of-sequence token (id 0).
    agreement: chance of agreement at layers 0..L-1; rising from .05 to .9 by default. top: first prompts with a
    table of ten top tokens.
    """
    random = np.random.default_rng(seed)
    chances = np.append(np.linspace(0.05, 0.9, depth) if agreement is None else np.asarray(agreement), 1.0)
    lenses = tuple(lenses) if statistics == "all" else lenses[:1]
    texts, token_rows, layer_rows, top_rows, drafter_rows = [], [], [], [], []
    for prompt in range(prompts):
        P = int(random.integers(2, 9))
        early = text != "given" and random.random() < 1 / 3
        N = int(random.integers(1, tokens + 1)) if early else tokens
        sequence = random.integers(1, vocabulary, size=P + N)
        if early:
            sequence[-1] = 0
        rows = P + N - 1
        position = np.arange(rows)
        output = position - (P - 1)
        texts.append(
            {
                "prompt": prompt,
                "kind": ("story", "list")[prompt % 2],
                "text": " ".join(f"w{token}" for token in sequence[:P]),
                "continuation": " ".join(f"w{token}" for token in sequence[P:]),
                "prompt_tokens": P,
                "new_tokens": N,
                "ended": "given" if text == "given" else "eos" if early else "budget",
                "looped": looped(sequence[P:].tolist()),
            }
        )
        token_rows.append(
            pd.DataFrame(
                {
                    "prompt": prompt,
                    "position": position,
                    "output": output,
                    "generated": output >= 0,
                    "input_id": sequence[:-1],
                    "text_id": sequence[1:],
                    "text": [f"␣w{token}" for token in sequence[1:]],
                }
            )
        )
        model = sequence[1:] if text == "greedy" else random.integers(1, vocabulary, size=rows)
        for lens in lenses:
            for layer in range(depth + 1):
                columns = _columns(random, chances[layer], model, sequence, vocabulary, text)
                if statistics == "agreement":
                    columns = {name: columns[name] for name in ("agrees", "near_tie")}
                elif dtype != "float32":
                    columns |= {"argmax_rounded": columns["argmax"], "agrees_rounded": columns["agrees"]}
                keys = {"prompt": prompt, "position": position, "output": output, "lens": lens, "layer": layer}
                layer_rows.append(pd.DataFrame({**keys, **columns}))
                if prompt < top:
                    top_rows.append(_top(random, keys, vocabulary))
        if drafter:
            columns = _columns(random, 0.6, model, sequence, vocabulary, text)
            kept = ("argmax", "agrees", "margin", "near_tie", "overlap", "accept_probability")
            keys = {"prompt": prompt, "position": position, "output": output}
            drafter_rows.append(pd.DataFrame(keys | {name: columns[name] for name in kept if name in columns}))
    manifest = Manifest.of(
        model=record(depth, vocabulary),
        prompts_hash=f"hash-{seed}",
        prompts_source="fabricated",
        batches=(tuple(range(prompts)),),
        drafter=record(2, vocabulary, "fabricated-drafter") if drafter else None,
        text=text,
        decoding={"temperature": 0.8 if text == "sampled" else 0.0, "top_k": 0, "top_p": 1.0},
        seed=seed,
        max_new_tokens=tokens,
        statistics=statistics,
        lenses=lenses,
        dtype=dtype,
        top_prompts=top,
        noise=0.001,
        timings={"generation_s": 1.0, "trace_s": 0.5, "tokens": sum(row["new_tokens"] for row in texts)},
    )
    return Trace.from_frames(
        manifest,
        pd.DataFrame(texts),
        pd.concat(token_rows, ignore_index=True),
        pd.concat(layer_rows, ignore_index=True),
        top=pd.concat(top_rows, ignore_index=True) if top_rows else None,
        drafter=pd.concat(drafter_rows, ignore_index=True) if drafter_rows else None,
    )


def list_again(folder: Path) -> None:
    """Put the checksums of a run's files, as they are now, into its manifest: to test what is behind that check."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["files"] = {name: sha256((folder / name).read_bytes()).hexdigest() for name in document["files"]}
    path.write_text(json.dumps(document))


def _columns(
    random: np.random.Generator,
    chance: float,
    model: np.ndarray,
    sequence: np.ndarray,
    vocabulary: int,
    text: str,
) -> dict[str, np.ndarray]:
    """Columns of one lens at one layer: (rows,) each, related to each other as real ones are."""
    rows = len(model)
    agrees = random.random(rows) < chance
    argmax = np.where(agrees, model, (model + random.integers(1, vocabulary, size=rows)) % vocabulary)
    probability = random.uniform(0.1, 1.0, rows)
    hit = argmax == sequence[1:]
    margin = random.exponential(1.0, rows)
    columns = {
        "argmax": argmax,
        "probability": probability,
        "margin": margin,
        "agrees": agrees,
        "log_probability": np.where(hit, np.log(probability), np.log1p(-probability * 0.99) - 1.0),
        "rank": np.where(hit, 0, random.integers(1, vocabulary, size=rows)),
        "model_rank": np.where(agrees, 0, random.integers(1, vocabulary, size=rows)),
        "entropy": random.uniform(0.0, np.log(vocabulary), rows),
        "kl": np.zeros(rows) if chance == 1 else random.exponential(2.0 * (1.05 - chance), rows),
        "overlap": np.ones(rows) if chance == 1 else random.beta(1 + 8 * chance, 3, rows),
        "echo": argmax == sequence[:-1],
        "near_tie": margin < 0.001,
    }
    if text != "greedy":
        accept = random.beta(1 + 8 * chance, 2, rows) * (random.random(rows) < 0.95)
        columns["accept_probability"] = np.ones(rows) if chance == 1 else accept
    return columns


def _top(random: np.random.Generator, keys: dict, vocabulary: int) -> pd.DataFrame:
    rows = len(keys["position"])
    shares = -np.sort(-random.dirichlet(np.ones(12), size=rows), axis=1)[:, :10]
    tokens = np.stack([random.permutation(vocabulary)[:10] for _ in range(rows)])
    return pd.DataFrame(
        {
            "prompt": keys["prompt"],
            "position": np.repeat(keys["position"], 10),
            "output": np.repeat(keys["output"], 10),
            "lens": keys["lens"],
            "layer": keys["layer"],
            "place": np.tile(np.arange(10), rows),
            "token": tokens.ravel(),
            "token_text": [f"␣w{token}" for token in tokens.ravel()],
            "probability": shares.ravel(),
        }
    )
