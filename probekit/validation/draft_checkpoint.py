"""A draft checkpoint held against the lens: its logits are those of the exit layer that it was cut at."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from probekit.errors import InputError
from probekit.hooks.capture import Capture
from probekit.lens.lens import CHECK_TOLERANCE, Lens
from probekit.models.checkpoint import Source, read_weights
from probekit.models.loaded import Loaded, silent


def check_draft_checkpoint(loaded: Loaded, exit_layer: int, folder: str | Path, ids: Sequence[int]) -> float:
    """The largest difference, relative to the largest logit, between a cut checkpoint and the lens at its exit.

    ids: a text of the model, (tokens,); logits are compared at every position.

    Raises InputError where it is more than the arithmetic's noise: what the checkpoint would draft is not what the exit
    layer drafts, for instance where a model scales its layers by their number.
    """
    tokens = torch.tensor([list(ids)], device=loaded.device)
    with torch.inference_mode():
        with Capture(loaded.anatomy, [exit_layer]) as capture:
            loaded.model(tokens)
        expected = Lens(loaded.anatomy)(capture[exit_layer][0], exit_layer)
        with silent():
            cut = read_weights(Source(Path(folder), None, Path(folder).name, str(folder)), loaded.device, loaded.dtype)
        found = cut.eval()(tokens).logits[0].float()
    del cut
    gc.collect()  # two models were in memory
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not apart <= CHECK_TOLERANCE[loaded.dtype]:
        raise InputError(
            f"the first {exit_layer} layers of {loaded.name} as a checkpoint of their own say something else than the "
            f"lens at layer {exit_layer}: logits differ by {apart:.2g} of the largest.",
            f"Models of the family {loaded.anatomy.family.model_type!r} do not fit into a draft checkpoint; use "
            "--engine transformers, whose early exit needs none.",
        )
    return apart
