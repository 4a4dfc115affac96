"""Llamas of a named shape with random weights, and a dial for how often their exits agree.

Every byte and product of the shape is really there, so that decoding can be timed, predicted and checked without
any download; what such a model writes means nothing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from probekit.errors import InputError
from probekit.models.anatomy import anatomy
from probekit.models.checkpoint import check_device, check_dtype
from probekit.models.loaded import Loaded

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
END_OF_TEXT = "<|end|>"


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama. `rope` is a rotary base, or the whole of transformers' `rope_parameters`.

    `tokenizer`: spell tokens byte by byte, for the shapes that tests use; `ends`: the last token ends a text.
    """

    layers: int
    width: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int
    context: int
    head_dim: int
    tied: bool = False
    rope: float | dict = 10_000.0
    norm_epsilon: float = 1e-5
    tokenizer: bool = False
    ends: bool = False

    def __post_init__(self) -> None:
        sizes = ("layers", "width", "inner", "heads", "key_value_heads", "vocabulary", "context", "head_dim")
        if small := [name for name in sizes if getattr(self, name) < 1]:
            raise InputError(f"a shape's {', '.join(small)} must be at least 1.", f"Given: {self}.")
        if self.width % self.heads or self.heads % self.key_value_heads or self.head_dim % 2:
            raise InputError(
                "a shape's heads must divide its width, its key/value heads its heads, and head_dim must be even.",
                f"Given: width {self.width}, {self.heads} heads, {self.key_value_heads} key/value heads, "
                f"head_dim {self.head_dim}.",
            )

    def config(self) -> LlamaConfig:
        """The configuration that transformers needs."""
        end = self.vocabulary - 1 if self.ends else None
        rope = self.rope if isinstance(self.rope, dict) else {"rope_type": "default", "rope_theta": float(self.rope)}
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            rms_norm_eps=self.norm_epsilon,
            rope_parameters=dict(rope),
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end,
        )


SHAPES: dict[str, Shape] = {
    # As published in each model's config.json. No token ends a text: random text would end by accident.
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128_256, 8192, 128, rope=500_000.0),
    "llama-3-70b": Shape(80, 8192, 28_672, 64, 8, 128_256, 8192, 128, rope=500_000.0),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 128_256, 131_072, 64, tied=True, rope=LLAMA3_ROPE),
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 32_000, 4096, 128),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49_152, 8192, 64, tied=True, rope=100_000.0),
    # For tests: grouped queries, odd sizes, heads that do not divide the width into head_dim.
    "tiny": Shape(5, 36, 52, 6, 2, 97, 256, 10, tokenizer=True, ends=True),
    "tiny-tied": Shape(6, 30, 44, 3, 1, 257, 192, 12, tied=True, tokenizer=True, ends=True),
    "tiny-draft": Shape(2, 20, 28, 2, 1, 97, 256, 10, tokenizer=True, ends=True),
    "tiny-chain": Shape(4, 16, 24, 2, 1, 4, 64, 8, tokenizer=True),
    "tiny-chain-draft": Shape(2, 8, 12, 2, 1, 4, 64, 4, tokenizer=True),
}


def synthetic(
    shape: str | Shape = "tiny",
    *,
    dial: float = 1.0,
    exit_layer: int | None = None,
    logit_scale: float = 1.0,
    tied: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    **overrides: Any,
) -> Loaded:
    """Build a Llama of a named shape with random weights.

    The weights are drawn on the device and in the dtype asked for, one parameter at a time: no float32 copy, no
    default initialisation. The same seed gives the same weights on the same kind of device and dtype.

    Parameters
    ----------
    shape: a name in SHAPES, or a Shape.
    dial: factor on what the layers from `exit_layer` on write into the residual stream (their output projections
        of attention and MLP). At 0 the exit always agrees with the model; at 1 nothing is changed; in between the
        agreement falls as the dial rises. Every layer is executed at any setting.
    exit_layer: the exit E that the dial is set for; needed when the dial is not 1.
    logit_scale: factor on the head's weights: the larger, the more peaked is what the model samples from. At 1
        the logits have a standard deviation of about 1. Only for an untied head.
    tied: override the shape's own.
    overrides: other fields of Shape, for example `layers=3`.
    """
    chosen = _shape(shape, tied, overrides)
    device, dtype = check_device(device), check_dtype(dtype)
    if not dial >= 0:
        raise InputError(f"the dial must be at least 0, not {dial}.")
    if dial != 1 and exit_layer is None:
        raise InputError(f"a dial of {dial} needs the exit layer that it is set for.", "Give exit_layer.")
    if not logit_scale > 0:
        raise InputError(f"the logit scale must exceed 0, not {logit_scale}.")
    if chosen.tied and logit_scale != 1:
        raise InputError("a tied head cannot be scaled without its embedding.", "Use an untied shape, or tied=False.")

    config = chosen.config()
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.requires_grad_(False).eval()
    parts = anatomy(model)
    if exit_layer is not None:
        parts.check_exit(exit_layer)
    _draw(model, seed)
    if logit_scale != 1:
        parts.head.weight.mul_(logit_scale)
    if dial != 1:
        for layer in model.model.layers[exit_layer:]:
            layer.self_attn.o_proj.weight.mul_(dial)
            layer.mlp.down_proj.weight.mul_(dial)

    name = shape if isinstance(shape, str) else "synthetic"
    settings = {"shape": asdict(chosen), "dial": dial, "exit_layer": exit_layer, "logit_scale": logit_scale}
    settings |= {"seed": seed, "dtype": str(dtype), "device": device.type}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Loaded(
        model=model,
        tokenizer=byte_tokenizer(chosen.vocabulary, chosen.ends) if chosen.tokenizer else None,
        anatomy=parts,
        name=name,
        reference=f"synthetic:{name}",
        path=None,
        revision=None,
        weights_hash=f"synthetic:{digest}",
    )


def _shape(shape: str | Shape, tied: bool | None, overrides: dict[str, Any]) -> Shape:
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise InputError(f"no shape is named {shape!r}; there are {', '.join(SHAPES)}.")
        shape = SHAPES[shape]
    known = {field.name for field in fields(Shape)}
    if unknown := sorted(set(overrides) - known):
        raise InputError(f"a shape has no {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    if tied is not None:
        overrides = {**overrides, "tied": tied}
    return replace(shape, **overrides)


def _draw(model: LlamaForCausalLM, seed: int) -> None:
    """Normal weights in place, so that each layer adds about as much as the embedding and logits are about N(0, 1).

    Matrices have variance 1 / inputs, an embedding of its own has variance 1, a tied one 1 / width: its rows are
    the head's rows too, and at variance 1 the model would only repeat its input.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)  # the norms
        else:
            own_embedding = name.endswith("embed_tokens.weight") and not tied
            deviation = 1.0 if own_embedding else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, deviation, generator=generator)


def byte_tokenizer(vocabulary: int, ends: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: letters first, then the rest of ASCII, then the other bytes.

    With `ends` the last id is an end-of-text token, which is also the padding. Bytes beyond the vocabulary are
    dropped; ids beyond the bytes decode to nothing.
    """
    letters = [ord(c) for c in "abcdefghijklmnopqrstuvwxyz \n"]
    ascii_rest = [byte for byte in range(32, 127) if byte not in letters]
    others = [byte for byte in range(256) if byte not in letters and byte not in ascii_rest]
    spelling = _byte_spelling()
    count = vocabulary - 1 if ends else vocabulary
    tokens = {spelling[byte]: index for index, byte in enumerate([*letters, *ascii_rest, *others][:count])}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary - 1, "content": END_OF_TEXT, **special}] if ends else [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokens | ({END_OF_TEXT: vocabulary - 1} if ends else {}),
            "merges": [],
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(description), encoding="utf-8")
        end = END_OF_TEXT if ends else None
        return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=end, pad_token=end)


def _byte_spelling() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(rest)}
