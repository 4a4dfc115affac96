"""Change the head of one and the same model, and see what the lens makes of it: the cause, not a correlate.

Heads that take the place of the model's own:
    rotated     W Q, Q a random rotation: an untied head of the same geometry, its bond with the embedding cut
    swapped     rows of W dealt out to other tokens: an untied head that reads the same directions for other tokens
    embedding   the embedding in place of the head, at the head's scale: tied

Two things can be changed, and both are reported:
    lens             only what reads the layers is changed; the model and its text stay. What it says is compared with
                     the model's own output.
    model and lens   the model speaks with the changed head as well, writes another text, and is compared with that.
The residual stream of a given text is the same in both: the head reads it and does not write to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.models.anatomy import Anatomy, anatomy
from probekit.prediction.intervals import SHARE, UNBOUNDED, Share, difference
from probekit.prediction.predict import predict
from probekit.tying.shares import layer_means

if TYPE_CHECKING:
    from probekit.models.loaded import Loaded
    from probekit.traces.trace import Trace

OWN = "own"
_BLOCK_BYTES = 64 * 2**20


@torch.no_grad()
def rotated_head(parts: Anatomy, seed: int = 0) -> Tensor:
    """(vocabulary, width): the head's rows, all turned by one random rotation."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(parts.width, parts.width, generator=generator, dtype=torch.float64)
    rotation, triangle = torch.linalg.qr(square)
    rotation = rotation * triangle.diagonal().sign()  # uniform over the orthogonal matrices
    return (parts.head_rows.double().cpu() @ rotation).to(parts.head_rows)


@torch.no_grad()
def swapped_head(parts: Anatomy, seed: int = 0) -> Tensor:
    """(vocabulary, width): the head's rows, each given to another token (one random cycle: no token keeps its own)."""
    order = torch.randperm(parts.vocabulary, generator=torch.Generator().manual_seed(seed))
    target = torch.empty_like(order)
    target[order] = order.roll(1)
    return parts.head_rows[target.to(parts.device)].clone()


@torch.no_grad()
def embedding_head(parts: Anatomy) -> Tensor:
    """(vocabulary, width): the embedding, scaled so that its rows are as long as the head's (root mean square)."""
    embedding, head = parts.embedding.weight, parts.head_rows
    return embedding * (head.float().square().mean() / embedding.float().square().mean()).sqrt().to(embedding)


def standard_heads(parts: Anatomy, seed: int = 0) -> dict[str, Tensor]:
    """{name: head}: the heads that make a difference for this model; a tied one needs no embedding for a head."""
    heads = {"rotated": rotated_head(parts, seed), "swapped": swapped_head(parts, seed)}
    return heads if parts.tied else {**heads, "embedding": embedding_head(parts)}


@contextmanager
def changed_head(loaded: Loaded, weight: Tensor, name: str) -> Iterator[Loaded]:
    """The model with another head for a while; the model's own weights are never written to.

    weight: (vocabulary, width). Yields a Loaded called "<model>+<name>"; the head comes back on the way out, also
    after an exception.
    """
    parts = loaded.anatomy
    if weight.shape != parts.head_rows.shape:
        raise InputError(
            f"a head of shape {tuple(weight.shape)} does not fit: expected {tuple(parts.head_rows.shape)}."
        )
    if parts.head.bias is not None:
        raise InputError("this model's head has a bias; a changed head has none.")
    head = nn.Linear(parts.width, parts.vocabulary, bias=False, device="meta")
    head.weight = nn.Parameter(weight.to(parts.head_rows), requires_grad=False)
    own = loaded.model.lm_head
    loaded.model.lm_head = head
    try:
        yield replace(
            loaded,
            anatomy=anatomy(loaded.model),
            name=f"{loaded.name}+{name}",
            weights_hash=f"{loaded.weights_hash}+{name}",
        )
    finally:
        loaded.model.lm_head = own


def weights_digest(model: Any) -> str:
    """sha256 of every weight of a model, to show that it is the same as before."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class HeadReading:
    """What a changed lens says of the model's own text, compared with the model's own output.

    echo, agreement, kl: (L+1,) shares and means over the generated positions; kl in nats, KL(model || lens).
    agrees: {prompt: (L+1, N) bool}.
    """

    echo: Share
    agreement: Share
    kl: Share
    agrees: dict[int, np.ndarray]


@torch.no_grad()
def read_with(loaded: Loaded, trace: Trace, weight: Tensor) -> HeadReading:
    """Read every layer of a trace's own texts with norm and another head. weight: (vocabulary, width)."""
    parts = loaded.anatomy
    block = max(1, _BLOCK_BYTES // (4 * parts.vocabulary))
    weight = weight.to(parts.device).float()
    sums: dict[str, list[np.ndarray]] = {"echo": [], "agreement": [], "kl": []}
    agrees = {}
    for prompt in trace.prompts:
        context, output = trace.prompt_ids(prompt), trace.outputs(prompt)
        ids = torch.from_numpy(np.concatenate([context, output])[:-1].astype(np.int64)).to(parts.device)
        first = len(context) - 1
        with Capture(parts) as capture:
            parts.decoder(input_ids=ids[None], use_cache=False)
        states = torch.stack([parts.norm(capture[site][0, first:]) for site in parts.sites]).float()
        said = torch.empty(states.shape[:2], dtype=torch.int64)  # (L+1, N)
        kl = torch.empty(states.shape[:2])
        own = torch.empty(states.shape[1], dtype=torch.int64)
        for start in range(0, states.shape[1], block):
            rows = slice(start, start + block)
            model = (states[-1, rows] @ parts.head_rows.float().T).log_softmax(-1)
            own[rows] = model.argmax(-1).cpu()
            for site in parts.sites:
                lens = (states[site, rows] @ weight.T).log_softmax(-1)
                said[site, rows] = lens.argmax(-1).cpu()
                kl[site, rows] = (model.exp() * (model - lens)).sum(-1).cpu()
        agrees[prompt] = (said == own).numpy()
        sums["echo"].append((said == ids[first:].cpu()).sum(dim=1).double().numpy())
        sums["agreement"].append(agrees[prompt].sum(axis=1).astype(float))
        sums["kl"].append(kl.double().sum(dim=1).numpy())
    tokens = np.array([len(trace.outputs(prompt)) for prompt in trace.prompts], dtype=float)
    prompts = tuple(trace.prompts)
    shares = {
        name: Share(np.stack(each, axis=-1), tokens, prompts, UNBOUNDED if name == "kl" else SHARE)
        for name, each in sums.items()
    }
    return HeadReading(**shares, agrees=agrees)


def head_effects(
    loaded: Loaded,
    trace: Trace,
    heads: Mapping[str, Tensor],
    *,
    exit_layers: Iterable[int] | None = None,
    draft_length: int = 4,
    speak: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The effect of each head on echo, agreement, KL and predicted acceptance.

    trace: of `loaded`, greedy. heads: {name: (vocabulary, width)}. speak: let the model write with each head as well;
    otherwise only the lens is changed.

    Returns a table by layer: model, head, changed ("nothing", "lens", "model and lens"), layer, echo, agreement, kl
    with `_low` and `_high`, echo_change and agreement_change (head minus own, paired over prompts) with theirs; and a
    table by exit: model, head, changed, exit_layer, draft_length, acceptance_rate, tokens_per_round with intervals.
    """
    from probekit.tracing.prompts import Prompt
    from probekit.tracing.tracer import trace as trace_again

    if trace.manifest.settings.text != "greedy":
        raise InputError("the effects of a head are read off greedy text.", "Trace without a temperature.")
    exits = list(loaded.anatomy.exits) if exit_layers is None else list(exit_layers)
    before = {name: layer_means(trace, name) for name in ("echo", "agrees", "kl")}
    layers = [_layer_rows(trace, OWN, "nothing", before["echo"], before["agrees"], before["kl"], before)]
    cells = [_cell_rows(predict(trace, exits, [draft_length]), trace, OWN, "nothing")]
    prompts = [Prompt(prompt, trace.text(prompt)) for prompt in trace.prompts]
    for name, weight in heads.items():
        read = read_with(loaded, trace, weight)
        layers.append(_layer_rows(trace, name, "lens", read.echo, read.agreement, read.kl, before))
        lens_only = predict(trace, exits, [draft_length], agreement=read.agrees.__getitem__)
        cells.append(_cell_rows(lens_only, trace, name, "lens"))
        if not speak:
            continue
        with changed_head(loaded, weight, name) as changed:
            spoken = trace_again(changed, prompts, max_new_tokens=trace.manifest.settings.max_new_tokens, top_prompts=0)
        after = {column: layer_means(spoken, column) for column in ("echo", "agrees", "kl")}
        layers.append(_layer_rows(trace, name, "model and lens", after["echo"], after["agrees"], after["kl"], before))
        cells.append(_cell_rows(predict(spoken, exits, [draft_length]), trace, name, "model and lens"))
    return pd.concat(layers, ignore_index=True), pd.concat(cells, ignore_index=True)


def _layer_rows(
    trace: Trace, head: str, changed: str, echo: Share, agreement: Share, kl: Share, before: Mapping[str, Share]
) -> pd.DataFrame:
    columns: dict[str, Any] = {"model": trace.manifest.model.name, "head": head, "changed": changed}
    columns["layer"] = np.arange(trace.depth + 1)
    for name, share in (("echo", echo), ("agreement", agreement), ("kl", kl)):
        low, high = share.interval()
        columns |= {name: share.values, f"{name}_low": low, f"{name}_high": high}
    for name, share, own in (("echo", echo, before["echo"]), ("agreement", agreement, before["agrees"])):
        change = difference(share, own)
        columns |= {
            f"{name}_change": change.values,
            f"{name}_change_low": change.low,
            f"{name}_change_high": change.high,
        }
    return pd.DataFrame(columns)


def _cell_rows(prediction: Any, trace: Trace, head: str, changed: str) -> pd.DataFrame:
    kept = ["exit_layer", "draft_length"]
    for name in ("acceptance_rate", "tokens_per_round"):
        kept += [name, f"{name}_low", f"{name}_high"]
    frame = prediction.to_pandas()[kept]
    frame.insert(0, "model", trace.manifest.model.name)
    frame.insert(1, "head", head)
    frame.insert(2, "changed", changed)
    return frame
