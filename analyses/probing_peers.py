"""Do other packages find the same in the same stream? Largest differences, on the same weights, in float32.

    python analyses/probing_peers.py tuned-lens tales-untied -o docs/results/trust/peers
    python analyses/probing_peers.py transformer-lens tales-untied tales-tied -o docs/results/trust/peers

tuned-lens: lenses that probekit writes are read and applied by the package, and lenses that the package writes are read
and applied here. transformer-lens: activation patching at every residual, attention and MLP site and position,
attribution of each token's logit, and the Jacobian lens. Each model leaves one record, PACKAGE-MODEL.json, with the
versions. The packages ask for other versions of other things, so each is best run in an environment of its own. They
are given the weights that are in memory: no hub is needed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from probekit.hooks.capture import Capture
from probekit.hooks.sites import open_hooks
from probekit.lens.exit_heads import fit_heads, load_heads, save_tuned_lens
from probekit.lens.jacobian import fit_jacobian
from probekit.lens.lens import Lens
from probekit.models.loaded import Loaded, load
from probekit.probing.attribution import attribute
from probekit.probing.patching import patch
from probekit.tracing.prompts import bundled_prompts_for

SCHEMA = "probekit/probing-peers/1"
PATCHED_TOKENS = 6  # of each text: a peer runs the whole model for every site and position
LONGEST, SKIP = 48, 16  # tokens of a text that a Jacobian is taken on, and those that are passed over
WIDE = 256  # above this width the Jacobian of the last three exits is enough


def main(
    package: Annotated[str, typer.Argument(help="tuned-lens or transformer-lens.")],
    models: Annotated[list[str], typer.Argument(help="Bundled names, folders or GGUF files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives PACKAGE-MODEL.json.")] = Path("peers"),
) -> None:
    """Largest differences between what a package finds and what probekit finds."""
    for reference in models:
        loaded = load(reference, device="cpu", dtype="float32")
        found = COMPARED[package](loaded)
        assert open_hooks(loaded.model) == [], "a comparison left its hooks on the model"
        record = {
            "schema": SCHEMA, "package": package, "model": loaded.name, "weights_hash": loaded.weights_hash,
            "dtype": "float32", "device": "cpu",
            "versions": {each: version(each) for each in ("probekit", package, "torch", "transformers")},
            "compared": found,
        }  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{package}-{loaded.name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"{path}: {json.dumps(found)}")


def texts_of(loaded: Loaded, count: int) -> list[Tensor]:
    """(1, tokens) ids of prompts that hold LONGEST tokens at most, repeated where they are short."""
    found = []
    for prompt in bundled_prompts_for(loaded.name)[:count]:
        ids = loaded.tokenizer(prompt.text)["input_ids"]
        found.append(torch.tensor([(ids * (1 + LONGEST // len(ids)))[:LONGEST]]))
    return found


# ------------------------------------------------------------------------------------------------ tuned-lens
@torch.no_grad()
def with_tuned_lens(loaded: Loaded) -> dict[str, Any]:
    """Logits of every exit through one and the same lens, read by both; written by the one, then by the other."""
    from tuned_lens.nn.lenses import TunedLens

    parts, ids = loaded.anatomy, texts_of(loaded, 4)
    with Capture(parts) as capture:
        loaded.model(ids[0])
    residuals = {layer: capture[layer][0] for layer in parts.exits}

    def apart(folder: Path, theirs: Any) -> dict[str, Any]:
        ours = Lens(parts, heads=load_heads(folder, parts))
        pairs = [(ours(h, layer), theirs(h, layer).float()) for layer, h in residuals.items()]
        return {
            "exits": len(pairs),
            "positions": ids[0].shape[1],
            "largest_difference": max(float((one - other).abs().max()) for one, other in pairs),
            "largest_logit": max(float(one.abs().max()) for one, _ in pairs),
            "same_top_token": all(bool((one.argmax(-1) == other.argmax(-1)).all()) for one, other in pairs),
        }

    with tempfile.TemporaryDirectory() as place:
        ours = save_tuned_lens(Path(place) / "ours", fit_heads(parts, ids), parts, loaded.name)
        read_there = apart(ours, TunedLens.from_model_and_pretrained(loaded.model, str(ours)))
        theirs = TunedLens.from_model(loaded.model)
        torch.manual_seed(0)
        for translator in theirs:
            translator.weight.normal_(std=0.3 / parts.width**0.5)
            translator.bias.normal_(std=0.1)
        theirs.save(Path(place) / "theirs")
        read_here = apart(Path(place) / "theirs", theirs)
    return {"written here, read there": read_there, "written there, read here": read_here}


# ------------------------------------------------------------------------------------------------ transformer-lens
def with_transformer_lens(loaded: Loaded) -> dict[str, Any]:
    """Patches, shares of logits and Jacobians of the same weights in a bridge."""
    import copy

    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        loaded.model.config._name_or_path or loaded.name, hf_model=copy.deepcopy(loaded.model),
        tokenizer=copy.deepcopy(loaded.tokenizer), device=loaded.device, dtype=loaded.dtype,
    )  # fmt: skip
    return {
        "activation patching": patched(loaded, bridge),
        "attribution": attributed(loaded, bridge),
        "jacobian lens": derived(loaded, bridge),
    }


def patched(loaded: Loaded, bridge: Any) -> dict[str, Any]:
    """Logit differences of every patch, and how far the two packages' are apart."""
    from transformer_lens import patching

    clean = texts_of(loaded, 1)[0][0, :PATCHED_TOKENS]
    corrupted = clean.clone()
    corrupted[PATCHED_TOKENS // 2] = texts_of(loaded, 2)[1][0, 3]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean[None])
        right, wrong = (int(bridge(ids[None])[0, -1].argmax()) for ids in (clean, corrupted))
        if right == wrong:
            wrong = int(bridge(corrupted[None])[0, -1].topk(2).indices[1])

        def difference(logits: Tensor) -> Tensor:
            return logits[0, -1, right] - logits[0, -1, wrong]

        depth, found, most = loaded.depth, {}, 0.0
        sweeps = {"residual": patching.get_act_patch_resid_pre, "attention": patching.get_act_patch_attn_out,
                  "mlp": patching.get_act_patch_mlp_out}  # fmt: skip
        for kind, sweep in sweeps.items():
            theirs = np.asarray(sweep(bridge, corrupted[None], cache, difference).cpu(), dtype=float)
            ours = patch(loaded, clean.tolist(), corrupted.tolist(), [f"{kind}:{layer}" for layer in range(depth)],
                         answers=(right, wrong))  # fmt: skip
            values = ours.patched.difference
            most = max(most, float(np.abs(values - theirs).max()))
            found[kind] = {"patches": values.size, "largest_change": float(np.abs(ours.change).max())}
    return {**found, "largest_difference": most}


@torch.no_grad()
def attributed(loaded: Loaded, bridge: Any) -> dict[str, Any]:
    """Shares of the most probable tokens' logits: the embedding's, and each attention's and MLP's."""
    ids = texts_of(loaded, 1)[0][:, :12]
    ours = attribute(loaded, ids[0].tolist())
    _, cache = bridge.run_with_cache(ids)
    stack, labels = cache.decompose_resid(layer=-1, return_labels=True)
    scaled = cache.apply_ln_to_stack(stack, layer=-1)[:, 0]  # (terms, positions, width)
    gain = loaded.anatomy.family.gain(loaded.anatomy.norm)
    rows = loaded.anatomy.head_rows[list(ours.tokens)].float()
    theirs = (scaled * gain * rows).sum(-1).T.double().numpy()
    names = {"embed": "embedding"} | {
        f"{layer}_{theirs}": f"{kind}:{layer}"
        for layer in range(loaded.depth)
        for kind, theirs in (("attention", "attn_out"), ("mlp", "mlp_out"))
    }
    columns = [ours.terms.index(names[label]) for label in labels]
    return {
        "shares": theirs.size,
        "largest_share": float(np.abs(ours.values).max()),
        "largest_difference": float(np.abs(ours.values[:, columns] - theirs).max()),
        "our_shares_less_the_logit": float(np.abs(ours.values.sum(1) - ours.logits).max()),
        "their_shares_less_the_logit": float(np.abs(theirs.sum(1) - ours.logits).max()),
    }


def derived(loaded: Loaded, bridge: Any) -> dict[str, Any]:
    """Jacobians of the exits, entry by entry, relative to the largest entry of each."""
    from transformer_lens.tools.analysis import JacobianLens

    exits = list(loaded.anatomy.exits)
    exits = exits if loaded.anatomy.width <= WIDE else exits[-3:]
    prompts = [loaded.tokenizer.decode(ids[0], skip_special_tokens=True) for ids in texts_of(loaded, 2)]
    theirs = JacobianLens.fit(
        bridge, prompts, corpus="bundled prompts", source_layers=[layer - 1 for layer in exits], max_seq_len=LONGEST,
        skip_first_positions=SKIP, show_progress=False,
    )  # fmt: skip
    read = [bridge.to_tokens(prompt)[:, :LONGEST] for prompt in prompts]
    ours = fit_jacobian(loaded.anatomy, read, exits, skip=SKIP, longest=LONGEST)
    apart = []
    for layer, head in ours.items():
        own, other = head.change + torch.eye(len(head.offset)), theirs.jacobians[layer - 1].float()
        apart.append(float((own - other).abs().max() / other.abs().max()))
    return {"exits": exits, "texts": len(read), "tokens": int(sum(ids.shape[1] for ids in read)),
            "largest_relative_difference": max(apart)}  # fmt: skip


COMPARED: dict[str, Callable[[Loaded], dict[str, Any]]] = {
    "tuned-lens": with_tuned_lens,
    "transformer-lens": with_transformer_lens,
}


if __name__ == "__main__":
    typer.run(main)
