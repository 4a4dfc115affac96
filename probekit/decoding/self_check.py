"""The engine checks itself on a model before it believes itself: once, against the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig

from probekit.decoding.batch_invariant import open_engine
from probekit.errors import InputError, SelfCheckError
from probekit.hooks.sites import open_hooks
from probekit.models import families
from probekit.models.anatomy import Anatomy, check_unchanged
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
    parts_at = [id(part) for part in (parts.embedding, parts.layers, parts.norm, parts.head)]
    around = f"{parts.dtype} {parts.device} {parts.config._attn_implementation} {parts.config.to_dict()}"
    state = f"{parts_at} {around} {parts.batch_invariant} {signature(loaded.model)}"
    if _checked.get(loaded.model) == state or open_hooks(loaded.model) or loaded.model.training:
        return
    if len(places := devices_of(loaded.model)) > 1:
        raise SelfCheckError(
            f"the layers of {loaded.name} are spread over {', '.join(sorted(map(str, places)))}; the engine keeps its "
            "cache on one device.",
            "Trace it, or read its lens; to decode it, load it on one device.",
        )
    length = checked_length(parts)
    if length > STEPS + ROUND:
        try:
            _compare(loaded, length)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:  # layers that take or keep other things
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise SelfCheckError(
                f"the engine cannot run {loaded.name} layer by layer ({what}).", "Trace it, or read its lens."
            ) from error
    _checked[loaded.model] = state


def check_decodable(loaded: Loaded) -> None:
    """What every door to the decoder asks first.

    Raises InputError for a model that has changed since it was read, and for one of a family that is not decoded.
    """
    check_unchanged(loaded.anatomy)
    families.check_decodes(loaded.anatomy.family, loaded.name)


def reproduces(loaded: Loaded) -> bool:
    """Whether the engine may decode this model; if not, its texts come from its own `generate`."""
    if not loaded.anatomy.family.decodes:
        return False
    try:
        check_engine(loaded)
    except SelfCheckError:
        return False
    return True


@torch.inference_mode()
def generated(loaded: Loaded, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """The model's own greedy continuation, by its `generate` without any processor: for what the engine cannot run."""
    eos, model = sorted(loaded.eos_ids), loaded.model
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos or None, pad_token_id=eos[0] if eos else -1
    )
    ids = torch.tensor([list(prompt_ids)], device=loaded.device)
    own, model.generation_config = model.generation_config, config  # what it leaves out is taken from the model's own
    try:
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = own
    return whole[0, len(prompt_ids) :].tolist()


@torch.inference_mode()
def _compare(loaded: Loaded, length: int) -> None:
    parts = loaded.anatomy
    ids = (torch.arange(length, device=parts.device)[None] * 7919 + 13) % parts.vocabulary
    expected = loaded.model(ids, use_cache=False).logits[0].float()
    engine = open_engine(parts, 1, length)
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
    if (expected.amax(-1) == expected.amin(-1)).all():  # an overflow in the last norm leaves nothing but zeros
        raise InputError(f"{loaded.name} gives every token the same logit.", "Its weights are damaged, or too large.")
    mine = torch.cat(found, dim=1)[0].float()
    if how := difference(mine, expected[: len(mine)], parts.dtype):
        raise SelfCheckError(
            f"the engine does not reproduce {loaded.name}: {how}.",
            "Its arithmetic may depend on what is computed together, as with dynamic quantisation, or it does what its "
            "family does not: trace it, or read its lens, but do not decode it here.",
        )


def difference(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """How logits differ, where they do by more than arithmetic in `dtype` explains. (tokens, vocabulary), float32."""
    allowed = TOLERANCE[dtype] * expected.abs().amax(-1).clamp(min=1.0)
    apart = (found - expected).abs().amax(-1)
    if bool((apart <= allowed).all()):
        return None
    row = int((apart - allowed).argmax())
    return f"its logits at token {row} are {apart[row]:.3g} from the model's own, where {allowed[row]:.3g} is allowed"


def checked_length(parts: Anatomy) -> int:
    """Tokens that a check reads: past the longest window, if that is not too long."""
    windows = [kind.window for kind in parts.family.kinds(parts.model.config) if kind.window is not None]
    return min([parts.context, LONGEST, max([SHORT, *(window + PAST for window in windows)])])
