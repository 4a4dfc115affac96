"""`load(reference)`: a bundled name, a Hugging Face id, a local folder or a GGUF file becomes a model ready to read.

What can be checked without the weights (family, tokenizer, files, device, dtype) is checked before they are read.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from probekit.errors import InputError, ProbekitError, Remark, ResourceError
from probekit.html_tables import facts_html
from probekit.models.adapters import Adapter, base_reference, find_adapter, holds_adapter, put_in
from probekit.models.anatomy import Anatomy, anatomy, check_unchanged
from probekit.models.checkpoint import Deal, Source, check_device, check_dtype, check_finite, first_line, read_folder
from probekit.models.device_map import DeviceMap, chosen_map, dealt_out, is_splitting, split_options
from probekit.models.gguf import read_gguf
from probekit.models.gguf_copies import cache_folder
from probekit.models.reference import find_checkpoint
from probekit.models.states import (
    MEMORY,
    hash_in_memory,
    in_training,
    prompt_learning,
    signature,
    unwrapped,
    without_weights,
)
from probekit.models.transformers_facts import check_facts
from probekit.models.weight_files import hash_files

# Settings of a generation_config that change the logits, with the values that change nothing.
_PROCESSORS: dict[str, tuple] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "watermarking_config": (),
}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model with its tokenizer and where both came from.

    Parameters
    ----------
    model: in eval mode; no parameter asks for a gradient.
    tokenizer: None only for a synthetic model that has none.
    name: short, without a slash: fit for a folder.
    reference: what `load` needs to find it again (an absolute path for a local one).
    path: the folder or GGUF file; None for a synthetic model.
    revision: the hub's commit; None for anything local.
    weights_hash: `scheme:hex`. `sha256` is the digest of the weight files, one after the other in the order of
        their names; `sha256-sampled` (more than 4 GB of weights) of each one's name, size and 64 evenly spaced MiB.
        `memory-sampled`, of a wrapped model, reads some numbers of each tensor.
    adapter: what was put into it from a folder of its own; its hash is then a part of `weights_hash`, after a `+`.
    signature: of a wrapped model's modules and adapters, to see whether they are still the same; else None.
    kept: what decoding keeps with the model from one call to the next.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    name: str
    reference: str
    path: Path | None
    revision: str | None
    weights_hash: str
    signature: str | None = None
    adapter: Adapter | None = None
    kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        shape = f"{self.anatomy.family.model_type}, {self.depth} layers x {self.anatomy.width}"
        return f"Loaded({self.name}: {shape}, {str(self.dtype).removeprefix('torch.')} on {self.device})"

    def _repr_html_(self) -> str:
        return facts_html("probekit model", describe(self))

    @property
    def depth(self) -> int:
        return self.anatomy.depth

    @property
    def device(self) -> torch.device:
        return self.anatomy.device

    @property
    def dtype(self) -> torch.dtype:
        return self.anatomy.dtype

    @property
    def remark(self) -> str:
        """What a user should know of how this model is read; empty for a family that is known."""
        family = self.anatomy.family
        if family.decodes:
            return ""
        return (
            f"{self.name} is a {family.model_type!r} model, a family that probekit does not know: its parts were found "
            "by transformers' accessors and held against its own logits. It is traced and read, not decoded."
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text: generation_config's, else config's; possibly none, possibly several."""
        for config in (getattr(self.model, "generation_config", None), self.model.config):
            given = getattr(config, "eos_token_id", None)
            if given is not None:
                return frozenset([given] if isinstance(given, int) else given)
        return frozenset()

    @property
    def ignored_processors(self) -> tuple[str, ...]:
        """Settings of the checkpoint's generation_config that change logits and that probekit does not apply."""
        config = getattr(self.model, "generation_config", None)
        found = ((name, getattr(config, name, None), neutral) for name, neutral in _PROCESSORS.items())
        return tuple(f"{name}={value}" for name, value, neutral in found if value is not None and value not in neutral)


def load(
    reference: str | Path,
    *,
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    cache: str | Path | bool | None = None,
    device_map: str | None = None,
    tensor_parallel: bool = False,
) -> Loaded:
    """Load a causal language model of a known family with its tokenizer.

    Parameters
    ----------
    reference: the name of a bundled model, a local folder, a GGUF file, or a Hugging Face id `owner/name` (or
        `owner/name@revision`). Only an id that is neither of the others reaches for the network. A folder that holds
        only an adapter stands for the model that it names, with the adapter.
    adapter: a folder that holds an adapter of this model, as peft saves it.
    device: "cpu", "cuda" or "cuda:N"; by default the GPU where there is one.
    dtype: "float32", "float16" or "bfloat16"; by default float32 on the CPU and on a GPU the checkpoint's own
        (bfloat16 for quantised GGUF, whose weights are always read as floating-point numbers).
    cache: the folder that keeps dequantised copies of GGUF files; $XDG_CACHE_HOME/probekit or ~/.cache/probekit by
        default; False keeps none. Where a copy cannot be written, a Remark says so and the model is loaded all the
        same.
    device_map: "auto" deals a model that is larger than its device out over all GPUs, the memory and the disk, by
        accelerate; "auto:0=70GiB,cpu=100GiB" says how much each may take. For checkpoint folders.
    tensor_parallel: split every layer over the processes of the job (torchrun's), by transformers' own `tp_plan`: all
        then make the same calls, in step.

    Raises
    ------
    InputError: in one line, for anything that is wrong with the reference, its files, the device or the dtype.
    ResourceError: where the memory does not suffice.
    SelfCheckError: where this release of transformers does not do what probekit relies on; it names the fact.

    Examples
    --------
    >>> import probekit
    >>> probekit.load("tales-tied", device="cpu")
    Loaded(tales-tied: llama, 12 layers x 128, float32 on cpu)
    """
    if not isinstance(reference, (str, Path)):
        raise _no_model(reference)
    dealing, tensor_parallel = chosen_map(device_map), tensor_parallel or is_splitting()
    if dealing is not None and tensor_parallel:
        raise InputError("a model is either dealt out by a device map or split over processes.", "Give one of them.")
    if dealing is not None and device is not None:
        raise InputError(f"device {str(device)!r} and a device map both say where the model lies.", "Give one of them.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = check_device(device)
    asked = None if dtype is None else check_dtype(dtype)
    added, base = _adapter_of(reference, adapter)
    source = find_checkpoint(base) if added is None or base == reference else _base_of(added, base)
    try:
        with silent():
            if source.gguf and (dealing is not None or tensor_parallel):
                raise InputError(f"{source.name} is a GGUF file, which is not dealt out.", "Take a checkpoint folder.")
            if source.gguf:
                model, tokenizer, weights_hash, remark = read_gguf(source, place, asked, cache_folder(cache))
            else:
                model, tokenizer, files = read_folder(source, place, asked, _deal(dealing, tensor_parallel))
                weights_hash, remark = hash_files(files), None
            check_facts(model)
            check_finite(model, f"{source.path} holds")
            if added is not None:
                model = put_in(model, added)
    except ProbekitError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{source.name} does not fit into the memory of {place}.", "Try --dtype bfloat16 or another device."
        ) from error
    except Exception as error:  # whatever transformers makes of a damaged file
        raise InputError(f"{source.path} cannot be read as a checkpoint: {first_line(error)}") from error
    if remark is not None:
        warnings.warn(remark, Remark, stacklevel=2)
    model.requires_grad_(False).eval()
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        anatomy=anatomy(model),
        name=source.name if added is None else f"{source.name}+{added.name}",
        reference=source.reference,
        path=source.path,
        revision=source.revision,
        weights_hash="+".join([weights_hash, *([] if added is None else [added.weights_hash])]),
        adapter=added,
    )


def _deal(dealing: DeviceMap | None, tensor_parallel: bool) -> Deal | None:
    if tensor_parallel:
        return lambda folder, dtype: split_options()
    return None if dealing is None else lambda folder, dtype: {"device_map": dealt_out(dealing, folder, dtype)}


def _base_of(adapter: Adapter, base: str | Path) -> Source:
    """The model that an adapter names."""
    try:
        return find_checkpoint(base)
    except InputError as error:
        raise InputError(
            f"the adapter {adapter.folder} names its model {str(base)!r}, which cannot be read: {error}",
            "Name the model, and this folder with --adapter.",
        ) from error


def _adapter_of(reference: str | Path, adapter: str | Path | None) -> tuple[Adapter | None, str | Path]:
    """The adapter to load, if any, and the model to put it into."""
    alone = holds_adapter(Path(os.path.expanduser(reference)))
    if adapter is None and not alone:
        return None, reference
    if adapter is None:
        found = find_adapter(reference)
        return found, base_reference(found)
    if alone:
        raise InputError(f"{reference} holds an adapter, and another one was given with it.", "Merge one of them.")
    return find_adapter(adapter), reference


def wrap(model: Any, tokenizer: Any = None, *, name: str) -> Loaded:
    """A model that is in memory already, in whatever state: every public function takes it as it takes a loaded one.

    Adapters, quantised, parametrised or pruned maps, gradient checkpointing and the like stay what they are: the
    decoder calls what it does not know to the letter, and checks itself against the model's own forward before it
    starts. The model is borrowed: nothing is changed, moved or switched off.

    Parameters
    ----------
    model: a causal language model of transformers, or what `peft` or `torch.compile` made of one.
    name: short, without a slash: fit for a folder.

    Raises
    ------
    InputError: for a model in training mode, without weights or with nameless outputs (`return_dict=False`), and for
        what is no causal language model of a known family.
    SelfCheckError: where this release of transformers does not do what probekit relies on; it names the fact.

    Examples
    --------
    >>> import probekit
    >>> loaded = probekit.load("tales-tied", device="cpu")  # any model of transformers that is in memory already
    >>> probekit.wrap(loaded.model, loaded.tokenizer, name="mine")
    Loaded(mine: llama, 12 layers x 128, float32 on cpu)
    """
    if not name or "/" in name or "\\" in name:
        raise InputError(f"the name of a wrapped model is {name!r}; expected a word that can be a folder's name.")
    if isinstance(model, Loaded):
        raise InputError(f"{model.name} is loaded already.", "Use it as it is.")
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{name} is a {type(model).__name__}, not a model.", "Give a transformers model.")
    if kind := prompt_learning(model):
        raise InputError(
            f"{name} has an adapter ({kind}) that puts states of its own before the text: its layers read more than "
            "the tokens of a text, which no trace can show.",
            "Wrap the model without it, or with an adapter in its layers (LoRA and the like).",
        )
    inner = unwrapped(model)
    with silent():
        check_facts(inner)
    parts = anatomy(inner)
    if training := in_training(inner):
        raise InputError(
            f"{name} is in training mode ({training}), in which it is another model.", "Call model.eval() first."
        )
    if nowhere := without_weights(inner):
        raise InputError(f"{name} holds no weights: {nowhere} is on the meta device.", "Load them first.")
    if getattr(inner.config, "return_dict", True) is False:
        raise InputError(
            f"the config of {name} says return_dict=False, with which its parts do not find each other's outputs.",
            "Set model.config.return_dict = True; no number depends on it.",
        )
    check_finite(inner, f"{name} has")
    return Loaded(
        model=inner,
        tokenizer=tokenizer,
        anatomy=parts,
        name=name,
        reference=f"memory:{name}",
        path=None,
        revision=None,
        weights_hash=hash_in_memory(inner),
        signature=signature(inner),
    )


def as_loaded(given: Loaded | str | Path) -> Loaded:
    """What every public function does with the model that it is given: a loaded one as it is, a reference is loaded.

    Raises InputError for anything else, and says how it becomes one; and for a wrapped model whose modules or adapters
    are others since, or any model whose layers, embedding, norm or head are: it is another model, which nothing
    here knows yet; and under autocast.
    """
    if isinstance(given, (str, Path)):
        return load(given)
    if not isinstance(given, Loaded):
        raise _no_model(given)
    if torch.is_autocast_enabled(given.device.type):
        raise InputError(
            f"torch.autocast is on, under which {given.name} computes in another dtype than it is in.",
            "Leave its context, and load the model in that dtype.",
        )
    if given.signature is not None and given.signature != signature(given.model):
        raise InputError(
            f"{given.name} has changed since it was wrapped: its modules, or the state of its adapters, are others.",
            "Wrap it again.",
        )
    check_unchanged(given.anatomy)
    return given


def batch_invariant(given: Loaded | str | Path) -> Loaded:
    """The same model, run so that no row depends, bit for bit, on how many rows or tokens are computed with it.

    Whatever decodes, traces, validates or times the model that is returned does so. Verification then has the very
    logits of autoregressive steps, in 16 bits too, and near-ties no longer decide anything. It is slower: see
    docs/how-to/batch-invariant.md. The weights are shared with the model that was given.

    Raises InputError for a model that is split over processes, whose sums are shared out between them.

    Examples
    --------
    >>> import probekit
    >>> model = probekit.batch_invariant(probekit.load("tales-layerskip", device="cpu", dtype="bfloat16"))
    >>> trace = probekit.trace(model, ["Once upon a time"], max_new_tokens=16)
    >>> trace.manifest.measured.noise  # logits between a row alone and the same row among others
    0.0
    >>> [cell] = probekit.validate(model, trace, [(3, 3)]).cells
    >>> cell.rounds_equal, cell.tokens_equal, cell.excusable_share
    (True, True, 0.0)
    """
    loaded = as_loaded(given)
    parts = loaded.anatomy
    if parts.split_over > 1:
        raise InputError(
            f"{loaded.name} is split over {parts.split_over} processes: how their sums are put together is not in our "
            "hands.",
            "Load it on one device to have it batch-invariant.",
        )
    if parts.batch_invariant:
        return loaded
    return replace(loaded, anatomy=replace(parts, batch_invariant=True))


def _no_model(given: Any) -> InputError:
    kind = type(given).__name__
    if isinstance(given, torch.nn.Module):
        return InputError(
            f"a {kind} in memory was given; expected what probekit.load or probekit.wrap returns.",
            'Give probekit.wrap(model, tokenizer, name="mine").',
        )
    return InputError(f"a {kind} is no model.", "Give a reference, or what probekit.load or probekit.wrap returns.")


def unchanged(loaded: Loaded) -> Loaded:
    """Return a model, or raise InputError where the weights of a wrapped one are others since it was wrapped."""
    known = loaded.weights_hash
    if known.startswith(MEMORY) and "+" not in known and hash_in_memory(loaded.model) != known:
        raise InputError(f"the weights of {loaded.name} have changed since it was wrapped.", "Wrap it again.")
    return loaded


def _adapter_json(adapter: Adapter) -> dict[str, str]:
    return {"reference": adapter.reference, "kind": adapter.kind, "weights_hash": adapter.weights_hash}


def describe(loaded: Loaded) -> dict[str, Any]:
    """What `probekit inspect` prints: plain numbers, strings and lists, ready for JSON.

    `bytes` are of the weights as loaded; a tied head counts once in them and in `parameters`.
    """
    parts = check_unchanged(loaded.anatomy)
    config, known = parts.config, parts.family.decodes
    return {
        "schema": "probekit/inspect/1",
        "name": loaded.name,
        "reference": loaded.reference,
        "path": None if loaded.path is None else str(loaded.path),
        "revision": loaded.revision,
        "weights_hash": loaded.weights_hash,
        "adapter": None if loaded.adapter is None else _adapter_json(loaded.adapter),
        "family": config.model_type,
        "decoded": parts.family.decodes,
        "layers": parts.depth,
        "width": parts.width,
        "inner_width": getattr(config, "intermediate_size", None),
        "heads": config.num_attention_heads,
        "key_value_heads": parts.key_value_heads if known else None,
        "head_dim": parts.head_dim if known else None,
        "vocabulary": parts.vocabulary,
        "context": parts.context,
        "rope": _rope(parts.rotary),
        "tied": parts.tied,
        "embeddings": parts.embeddings,
        "parameters": parts.parameters,
        "bytes": parts.bytes,
        "dtype": str(parts.dtype).removeprefix("torch."),
        "device": str(parts.device),
        "sites": list(parts.sites),
        "exits": list(parts.exits),
        "tokenizer": None if loaded.tokenizer is None else type(loaded.tokenizer).__name__,
        "chat_template": bool(getattr(loaded.tokenizer, "chat_template", None)),
        "eos_ids": sorted(loaded.eos_ids),
        "ignored_processors": list(loaded.ignored_processors),
    }


def _rope(rotary: Any) -> str:
    """The kind of rotary embedding; where layers differ in it, of each kind of layer."""
    kind = getattr(rotary, "rope_type", "default")
    if not isinstance(kind, dict):
        return str(kind)
    kinds = list(dict.fromkeys(kind.values()))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{layer}: {kind[layer]}" for layer in kind)


@contextmanager
def silent() -> Iterator[None]:
    """Hold back transformers' log lines, warnings and progress bars, until the end of the context."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # what fails, raises; the rest goes on
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # its GGUF reader has a bar of its own
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
