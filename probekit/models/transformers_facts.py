"""What probekit relies on in transformers, fact by fact, and a check of each when a model is loaded.

Nothing here looks at a version: a model of one layer (`one_layer`) runs once for each class of model. So a release that
moves a part, renames a keyword or returns something else is named by the first model that is loaded, and not by wrong
figures. `tests/models/test_transformers_facts.py` breaks each fact.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from probekit.errors import SelfCheckError
from probekit.models.families import FAMILIES
from probekit.models.family import CACHE
from probekit.models.one_layer import TOKENS, OneLayer, first_of

TESTED = {"transformers": ("5.17.0", "5.24.0"), "torch": ("2.11.0", "2.13.0")}
"""The oldest and the newest releases that the tests pass with (docs/results/tests/versions.json)."""
_UNKNOWN = ("meta", "data-dependent")  # what an error says that only stands for the lack of numbers


class Fact(NamedTuple):
    """One thing that transformers does. used_by: files that rely on it. holds: whether it still does; raises, too."""

    name: str
    says: str
    used_by: str
    holds: Callable[[OneLayer], bool]


# ------------------------------------------------------------------------------------------------------ the facts
def _has_parts(seen: OneLayer) -> bool:
    names = seen.family.names
    inner = (names.embedding, names.layers, names.norm, names.rotary)
    there = all(getattr(seen.decoder, name, None) is not None for name in inner) and len(seen.part("layers")) == 1
    return there and getattr(seen.model, names.head, None) is not None


def _rotates(seen: OneLayer) -> bool:
    cos, sin = seen.rotated
    return cos.shape == sin.shape == (1, TOKENS, cos.shape[-1]) and cos.shape[-1] <= seen.cached_shape[-1]


def _calls_layer(seen: OneLayer) -> bool:
    args, named, _ = seen.whole.layer
    first = args[0] if args else named.get("hidden_states")
    known = {"attention_mask", "position_ids", "position_embeddings", seen.family.names.cache}
    return isinstance(first, Tensor) and first.shape == (1, TOKENS, seen.width) and known <= set(named)


def _gives_residual(seen: OneLayer) -> bool:
    output = first_of(seen.whole.layer.output)
    return isinstance(output, Tensor) and output.shape == (1, TOKENS, seen.width)


def _norms_last(seen: OneLayer) -> bool:
    args, _, output = seen.whole.norm
    return bool(args) and args[0] is first_of(seen.whole.layer.output) and seen.whole.last is output


def _fills_cache(seen: OneLayer) -> bool:
    output, calls, _ = seen.alone
    shapes = [(tuple(keys.shape), tuple(values.shape), number) for keys, values, number in calls]
    if shapes != [(seen.cached_shape, seen.cached_shape, 0)]:
        return False
    if isinstance(output, Exception):
        raise output
    return True


def _keeps_cache(seen: OneLayer) -> bool:
    keys, length = seen.whole.cached
    return tuple(keys.shape) == seen.cached_shape and length == TOKENS


def _has_branches(seen: OneLayer) -> bool:
    layer = seen.part("layers")[0]
    layer = getattr(layer, "inner", layer)
    return seen.family.branches is None or all(layer.get_submodule(path) is not None for path in seen.family.branches)


def _names_attention(seen: OneLayer) -> bool:
    return seen.config._attn_implementation in ("sdpa", "eager") and "sdpa" in ALL_ATTENTION_FUNCTIONS


def _has_llama_attention(_: OneLayer) -> bool:
    kind = modeling_llama.LlamaAttention
    with torch.device("meta"):
        made = kind(transformers.LlamaConfig(hidden_size=8, num_attention_heads=2), layer_idx=0)
    own = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx")
    asked = ("hidden_states", "position_embeddings", "attention_mask", CACHE)
    return all(hasattr(made, name) for name in own) and set(asked) <= set(signature(kind.forward).parameters)


def _rotates_halves(_: OneLayer) -> bool:
    numbers = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
    cos, sin = torch.arange(2.0, 6.0).view(1, 1, 4), torch.arange(3.0, 7.0).view(1, 1, 4)
    turned = torch.tensor([-3.0, -4.0, 1.0, 2.0])
    found = modeling_llama.apply_rotary_pos_emb(numbers, 2 * numbers, cos, sin)
    expected = numbers * cos + turned * sin
    return torch.equal(found[0], expected) and torch.equal(found[1], 2 * expected)


def _norms_by_squares(_: OneLayer) -> bool:
    norm = modeling_llama.LlamaRMSNorm(4, eps=1e-3)
    numbers = torch.arange(1.0, 5.0)
    return torch.equal(norm(numbers), torch.rms_norm(numbers, (4,), norm.weight, norm.variance_epsilon))


FACTS = (
    Fact(
        "parts",
        "a model keeps its decoder, embedding, layers, final norm, rotary embedding and head under the names that its "
        "family has for them",
        "models/anatomy",
        _has_parts,
    ),
    Fact(
        "rotary call",
        "a rotary embedding takes a tensor and positions, and the kind of a layer where kinds differ, and gives "
        "(rows, tokens, at most a head's width) of cosines and of sines",
        "models/family, decoding/engine",
        _rotates,
    ),
    Fact(
        "layer call",
        "the decoder calls each layer with the residual, and hands it mask, positions, rotary embeddings and cache by "
        "their names",
        "hooks/layer_stack, decoding/engine",
        _calls_layer,
    ),
    Fact(
        "layer output",
        "a layer returns the residual stream, alone or first in a tuple",
        "hooks/layer_stack, hooks/stop_resume",
        _gives_residual,
    ),
    Fact(
        "layer forward",
        "to call a layer is to run the forward of that very module, also where it was replaced",
        "hooks/layer_stack",
        lambda seen: seen.alone[2],
    ),
    Fact(
        "final norm",
        "the decoder's `last_hidden_state` is the final norm of what the last layer returned",
        "lens/lens, hooks/stop_resume",
        _norms_last,
    ),
    Fact(
        "mask",
        "an additive mask of four dimensions reaches the layers as it was given",
        "hooks/stop_resume, decoding/engine",
        lambda seen: seen.whole.layer.named["attention_mask"] is seen.whole.mask,
    ),
    Fact(
        "logits",
        "with `logits_to_keep=1` a model gives the logits of the last place only",
        "tracing/backend",
        lambda seen: seen.whole.logits.shape[:2] == (1, 1),
    ),
    Fact(
        "cache",
        "a layer hands keys and values, (rows, key-value heads, tokens, head width), and its number to the cache's "
        "`update`, and attends to what that gives back",
        "decoding/caches",
        _fills_cache,
    ),
    Fact(
        "dynamic cache",
        "`DynamicCache(config=..)` holds the keys of each layer, and counts the tokens in it",
        "tracing/reading, tracing/self_check",
        _keeps_cache,
    ),
    Fact(
        "branches",
        "a layer keeps its attention and its MLP, or the norms behind them, under the names that its family has",
        "hooks/components",
        _has_branches,
    ),
    Fact(
        "attention names",
        "`config._attn_implementation` says which attention a model computes: sdpa or eager",
        "decoding/engine, hooks/fast_forward",
        _names_attention,
    ),
    Fact(
        "Llama attention",
        "`LlamaAttention` projects by q_proj, k_proj, v_proj and o_proj, and takes residual, rotary embeddings, mask "
        "and cache",
        "hooks/fast_forward",
        _has_llama_attention,
    ),
    Fact(
        "Llama rotation",
        "queries and keys x become x cos + (-x2, x1) sin, x1 and x2 being their halves",
        "hooks/fast_forward",
        _rotates_halves,
    ),
    Fact(
        "Llama norm",
        "`LlamaRMSNorm` is torch's rms_norm with its `weight` and `variance_epsilon`, bit for bit in float32",
        "hooks/fast_forward",
        _norms_by_squares,
    ),
)

_held: WeakSet[type] = WeakSet()  # classes of models of which every fact was seen to hold


def check_facts(model: Any) -> None:
    """Look at every fact, once for each class of model of a known family that is transformers' own.

    Raises SelfCheckError for the first that does not hold: which, in which release, and what to do.
    """
    kind, model_type = type(model), getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(str(model_type))
    own = kind.__module__.startswith("transformers.models.")
    if family is None or not own or kind in _held or getattr(kind.config_class, "model_type", None) != model_type:
        return
    seen = OneLayer(model, family)
    for fact in FACTS:
        if problem := _problem(fact, seen):
            raise _broken(fact, kind.__name__, problem)
    _held.add(kind)


def _problem(fact: Fact, seen: OneLayer) -> str:
    """What is wrong with a fact; empty where it holds, or where a pass without numbers cannot tell."""
    try:
        return "" if fact.holds(seen) else "it does something else"
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        unknown = isinstance(error, (RuntimeError, NotImplementedError)) and any(
            word in said.lower() for word in _UNKNOWN
        )
        return "" if unknown else f"{type(error).__name__}: {said}"


def _broken(fact: Fact, kind: str, problem: str) -> SelfCheckError:
    release, (oldest, newest) = transformers.__version__, TESTED["transformers"]
    numbers = [tuple(map(int, each.split(".")[:2])) for each in (oldest, release, newest)]
    hint = f"Install transformers {oldest} to {newest}, with which probekit is tested, or a newer probekit."
    if numbers == sorted(numbers):
        hint = f"probekit is tested with {oldest} to {newest}: does another library change transformers here?"
    return SelfCheckError(
        f"transformers {release} does not do what probekit relies on ({fact.name}): {fact.says}; of {kind}: {problem}.",
        hint,
    )
