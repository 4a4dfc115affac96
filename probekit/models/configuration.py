"""A model's `config.json` from strangers: its types and bounds, and its size against the weights' headers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError
from safetensors import SafetensorError, safe_open

from probekit.errors import InputError
from probekit.foreign.json import read_object

Size = Annotated[int, Field(ge=1, le=2**24)]
Token = Annotated[StrictInt, Field(ge=-1, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0, le=2**50, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Labels = Annotated[dict[Any, Any], Field(max_length=10_000)]
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class Configuration(BaseModel):
    """What transformers builds a model by, within bounds; keys that are not named here are transformers' to judge.

    The implementation of the attention is ours to choose: a name there can also make transformers fetch code.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_type: str | None = None
    architectures: list[str] | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    hidden_size: Size | None = None
    vocab_size: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    num_labels: Annotated[int, Field(ge=0, le=10_000)] | None = None
    id2label: Labels | None = None
    label2id: Labels | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**40)] | None = None
    rope_theta: Positive | None = None
    rms_norm_eps: Epsilon | None = None
    layer_norm_eps: Epsilon | None = None
    layer_norm_epsilon: Epsilon | None = None
    norm_eps: Epsilon | None = None
    norm_epsilon: Epsilon | None = None
    output_hidden_states: StrictBool | None = None
    output_attentions: StrictBool | None = None
    return_dict: StrictBool | None = None
    use_cache: StrictBool | None = None
    tie_word_embeddings: StrictBool | None = None
    eos_token_id: Token | list[Token] | None = None
    bos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | list[Token] | None = None
    attn_implementation: Literal["eager", "sdpa"] | None = None
    attn_implementation_internal: Literal["eager", "sdpa"] | None = Field(None, alias="_attn_implementation")


class Rope(BaseModel):
    """Rotary embeddings: numbers with which no angle is NaN, infinite or the same at every position."""

    model_config = ConfigDict(extra="allow")

    rope_theta: Positive | None = None
    factor: Positive | None = None
    attention_factor: Positive | None = None
    partial_rotary_factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Positive | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    beta_fast: NotNegative | None = None
    beta_slow: NotNegative | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None


class Generation(BaseModel):
    """What is read of generation_config.json."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    eos_token_id: Token | list[Token] | None = None
    bos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | list[Token] | None = None


class TokenizerConfiguration(BaseModel):
    """What transformers takes on trust of tokenizer_config.json."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_max_length: Annotated[float, Field(ge=0, strict=True)] | None = None


_BESIDE: Mapping[str, type[BaseModel]] = {
    "generation_config.json": Generation, "tokenizer_config.json": TokenizerConfiguration,
}  # fmt: skip


def check_configuration(config: dict[str, Any], path: Path) -> None:
    """Raise InputError, which names file and key, for a wrong type and for numbers out of bounds, also in the smaller
    files beside a configuration."""
    check_values(config, path)
    for name, kind in _BESIDE.items():
        beside = path.with_name(name)
        if beside.exists():
            _check(kind, read_object(beside, "Fetch it again."), beside)


def check_values(config: dict[str, Any], what: Path | str) -> None:
    """The same for the configuration alone. what: it stands in, for the message."""
    _check(Configuration, config, what)
    for rope in _ropes(config):
        _check(Rope, rope, what)
    layers = config.get("layer_types")
    if isinstance(layers, list) and "sliding_attention" in layers and config.get("sliding_window") is None:
        raise InputError(f"{what} is no usable configuration: it has layers with a window, and no sliding_window.")


def _check(kind: type[BaseModel], document: dict[str, Any], path: Path | str) -> None:
    try:
        kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} is no usable configuration: {where}: {first['msg']}.", "Fetch it again.") from None


def _ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of rotary embeddings, by either name: one, or one for each kind of layer."""
    found = [rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := config.get(name), dict)]
    return [*found, *(each for rope in found for each in rope.values() if isinstance(each, dict))]


def check_depth(config: dict[str, Any], weights: Sequence[Path], path: Path) -> None:
    """Refuse far more layers than the headers of the weights hold, before any is built. Raises InputError.

    Where only a few are missing, or a header is damaged, the loader says more: it names the tensors.
    """
    asked = config.get("num_hidden_layers")
    if not isinstance(asked, int):
        return
    try:
        names = [name for file in weights for name in _names(file)]
    except (SafetensorError, OSError):
        return
    there = max((int(found[1]) + 1 for name in names if (found := _LAYER.search(name))), default=None)
    if there is not None and asked > 2 * there:
        raise InputError(f"{path} names {asked:,} layers, and the weights hold {there:,}.", "Fetch them again.")


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as weights:
        return list(weights.keys())
