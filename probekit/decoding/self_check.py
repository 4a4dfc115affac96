"""The engine checks itself on a model before it believes itself: once, against the model's own forward."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from probekit.decoding.engine import Engine
from probekit.errors import InputError, SelfCheckError
from probekit.hooks.sites import open_hooks
from probekit.models.loaded import Loaded
from probekit.models.states import devices_of, signature

# Of the row's largest logit: a deep model in 16 bits may be off by more than one product is.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}
SHORT = 12  # tokens that are read where no layer has a window
PAST = 5  # tokens past a window
LONGEST = 512  # a longer window is not checked to its end: it would cost a prompt of that length
STEPS, ROUND = 2, 3  # the last tokens: steps of one, then a round through an exit

_checked: WeakKeyDictionary[object, str] = WeakKeyDictionary()


def check_engine(loaded: Loaded) -> None:
    """Hold the engine's logits against the model's, past its window: a prompt, steps, and a round through an exit.

    Done once for each model; not in training mode, and not while somebody else's hooks are open, which would see it.

    Raises SelfCheckError where they differ by more than arithmetic does, and InputError for weights that give NaN.
    """
    parts = loaded.anatomy
    around = f"{parts.dtype} {parts.device} {parts.model.config._attn_implementation}"
    state = f"{parts.family.model_type} {around} {signature(loaded.model)}"
    if _checked.get(loaded.model) == state or open_hooks(loaded.model) or loaded.model.training:
        return
    if len(places := devices_of(loaded.model)) > 1:
        raise SelfCheckError(
            f"the layers of {loaded.name} are spread over {', '.join(sorted(map(str, places)))}; the engine keeps its "
            "cache on one device.",
            "Trace it, or read its lens; to decode it, load it on one device.",
        )
    windows = [kind.window for kind in parts.family.kinds(parts.model.config) if kind.window is not None]
    length = min([parts.context, LONGEST, max([SHORT, *(window + PAST for window in windows)])])
    if length > STEPS + ROUND:
        _compare(loaded, length)
    _checked[loaded.model] = state


def reproduces(loaded: Loaded) -> bool:
    """Whether the engine may decode this model; if not, its texts come from its own `generate`."""
    try:
        check_engine(loaded)
    except SelfCheckError:
        return False
    return True


@torch.inference_mode()
def _compare(loaded: Loaded, length: int) -> None:
    parts = loaded.anatomy
    ids = (torch.arange(length, device=parts.device)[None] * 7919 + 13) % parts.vocabulary
    expected = loaded.model(ids, use_cache=False).logits[0].float()
    engine = Engine(parts, 1, length)
    first = length - STEPS - ROUND
    found = [engine.logits(engine.full(ids[:, :first], engine.places([0], first)))]
    for at in range(first, first + STEPS):
        found.append(engine.logits(engine.full(ids[:, at : at + 1], engine.places([at], 1))))
    at, exit_layer = first + STEPS, max(1, parts.depth // 2)
    if parts.depth > 1:
        early = [engine.early(ids[:, at + step : at + step + 1], engine.places([at + step], 1), exit_layer)
                 for step in range(ROUND)]  # fmt: skip
        found.append(engine.logits(engine.late(torch.cat(early, dim=1), engine.places([at], ROUND), exit_layer)))
    if not expected.isfinite().all():
        raise InputError(
            f"{loaded.name} gives logits that are not finite (NaN).",
            "Its weights are damaged, or too large for this dtype: try --dtype float32.",
        )
    mine = torch.cat(found, dim=1)[0].float()
    expected = expected[: len(mine)]
    allowed = TOLERANCE[parts.dtype] * expected.abs().amax(-1).clamp(min=1.0)
    apart = (mine - expected).abs().amax(-1)
    if not (apart <= allowed).all():
        row = int((apart - allowed).argmax())
        raise SelfCheckError(
            f"the engine does not reproduce {loaded.name}: its logits at token {row} are {apart[row]:.3g} from the "
            f"model's own, where {allowed[row]:.3g} is allowed.",
            "Its arithmetic may depend on what is computed together, as with dynamic quantisation, or it does what its "
            "family does not: trace it, or read its lens, but do not decode it here.",
        )
