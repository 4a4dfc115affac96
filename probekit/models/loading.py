"""`load(reference)`: a bundled name, a Hugging Face id, a local folder or a GGUF file becomes a model ready to read.

Weights come from safetensors or GGUF only, never from a pickle, and no code that comes with a checkpoint is run.
What can be checked without the weights (family, tokenizer, files, device, dtype) is checked before they are read.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from probekit.errors import InputError, ResourceError
from probekit.models.anatomy import Anatomy, anatomy

TALES = ("tales-untied", "tales-tied", "tales-layerskip")
DRAFT = "tales-draft"
BUNDLED = Path(__file__).parent / "bundled"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")
_FULL_HASH_BYTES = 4 * 10**9

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
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    name: str
    reference: str
    path: Path | None
    revision: str | None
    weights_hash: str

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


@dataclass(frozen=True)
class BundledModel:
    """A model that ships in the package. `parameters`: distinct weights."""

    name: str
    path: Path
    layers: int
    tied: bool
    parameters: int
    says: str
    trained_on: str

    def to_json(self) -> dict[str, Any]:
        """One entry of `probekit models --json`."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class _Source:
    """A checkpoint found on this machine, checked, its weights not read yet."""

    folder: Path
    gguf: str | None
    name: str
    reference: str
    revision: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / self.gguf if self.gguf else self.folder


def load(
    reference: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> Loaded:
    """Load a Llama-architecture causal language model with its tokenizer.

    Parameters
    ----------
    reference: the name of a bundled model, a local folder, a GGUF file, or a Hugging Face id `owner/name` (or
        `owner/name@revision`). Only an id that is neither of the others reaches for the network.
    device: "cpu", "cuda" or "cuda:N"; by default the GPU where there is one.
    dtype: "float32", "float16" or "bfloat16"; by default float32 on the CPU and on a GPU the checkpoint's own
        (bfloat16 for quantised GGUF, whose weights are always read as floating-point numbers).

    Raises
    ------
    InputError: in one line, for anything that is wrong with the reference, its files, the device or the dtype.
    ResourceError: where the memory does not suffice.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = check_device(device)
    asked = None if dtype is None else check_dtype(dtype)
    source = _find(reference)
    try:
        with _quiet():
            model, tokenizer, files = (_read_gguf if source.gguf else _read_folder)(source, place, asked)
    except InputError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{source.name} does not fit into the memory of {place}.", "Try --dtype bfloat16 or another device."
        ) from error
    except Exception as error:  # whatever transformers makes of a damaged file
        raise InputError(f"{source.path} cannot be read as a Llama checkpoint: {_first_line(error)}") from error
    model.requires_grad_(False).eval()
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        anatomy=anatomy(model),
        name=source.name,
        reference=source.reference,
        path=source.path,
        revision=source.revision,
        weights_hash=hash_files(files),
    )


def bundled_models() -> list[BundledModel]:
    """The models that this installation ships, the ones to compare first, the draft model last."""
    return [_bundled(BUNDLED / name) for name in (*TALES, DRAFT) if (BUNDLED / name / "config.json").is_file()]


def describe(loaded: Loaded) -> dict[str, Any]:
    """What `probekit inspect` prints: plain numbers, strings and lists, ready for JSON.

    `bytes` are of the weights as loaded; a tied head counts once in them and in `parameters`.
    """
    parts, config = loaded.anatomy, loaded.model.config
    return {
        "schema": "probekit/inspect/1",
        "name": loaded.name,
        "reference": loaded.reference,
        "path": None if loaded.path is None else str(loaded.path),
        "revision": loaded.revision,
        "weights_hash": loaded.weights_hash,
        "family": config.model_type,
        "layers": parts.depth,
        "width": parts.width,
        "inner_width": config.intermediate_size,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocabulary": parts.vocabulary,
        "context": parts.context,
        "rope": config.rope_parameters["rope_type"],
        "tied": parts.tied,
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


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The torch dtype of that name, or InputError with the names that there are."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise InputError(f"dtype {str(dtype)!r} is not known; give one of {', '.join(DTYPES)}.")
    return found


def check_device(device: torch.device | str) -> torch.device:
    """The torch device of that name, or InputError where this machine has none such."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r} is not known; give cpu, cuda or cuda:N.")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            there = f"this machine has {count}" if count else "this machine has none that torch can use"
            raise InputError(f"CUDA device {str(device)!r} is not there: {there}.", "Use --device cpu.")
    return found


def hash_files(files: list[Path]) -> str:
    """`scheme:hex` of weight files; the schemes are described at `Loaded`."""
    digest = hashlib.sha256()
    files = sorted(files, key=lambda path: path.name)
    if sum(path.stat().st_size for path in files) <= _FULL_HASH_BYTES:
        for path in files:
            with path.open("rb") as stream:
                while block := stream.read(2**22):
                    digest.update(block)
        return f"sha256:{digest.hexdigest()}"
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for part in range(64):
                stream.seek(max(0, size - 2**20) * part // 63)
                digest.update(stream.read(2**20))
    return f"sha256-sampled:{digest.hexdigest()}"


# ---------------------------------------------------------------------------------------------- finding


def _find(reference: str | Path) -> _Source:
    """Where the checkpoint of `reference` lies, its configuration and the presence of its files checked."""
    text = str(reference)
    if text in (*TALES, DRAFT):
        folder = BUNDLED / text
        if not (folder / "config.json").is_file():
            raise InputError(
                f"the bundled model {text!r} is not in this installation.",
                "Name a model instead: a Hugging Face id, a folder, or a GGUF file.",
            )
        return _check_folder(_Source(folder, None, text, text))
    path = Path(text).expanduser()
    if text and path.is_dir():
        path = path.resolve()
        return _check_folder(_Source(path, None, path.name, str(path)))
    if path.is_file():
        path = path.absolute()
        return _check_gguf(_Source(path.parent, path.name, path.stem, str(path)))
    hub = _HUB_ID.fullmatch(text)
    if hub is None or text.startswith((".", "~")) or path.suffix in (".gguf", ".safetensors", *_PICKLES):
        raise InputError(
            f"there is no model {text!r}: no bundled model, no folder and no file has that name.",
            f"Bundled: {', '.join((*TALES, DRAFT))}. A Hugging Face id reads owner/name.",
        )
    return _from_hub(text, hub["id"], hub["revision"])


def _check_folder(source: _Source) -> _Source:
    folder = source.folder
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        if ggufs:
            raise InputError(f"{folder} holds GGUF files: {', '.join(ggufs)}.", "Give the path of one of them.")
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder} holds an adapter, not a model.", "Merge it into its base model first.")
        raise InputError(f"{folder} holds no model: it has no config.json.")
    config = _config_of(folder)
    _check_family(config, source.name)
    weights = _weight_files(folder)
    if missing := [path.name for path in weights if not path.is_file()]:
        raise InputError(f"{folder} lacks weight files that its index names: {', '.join(missing)}.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"{folder} holds no tokenizer: neither {' nor '.join(_TOKENIZER_FILES)} is there.",
            "Copy the tokenizer's files beside the weights.",
        )
    return source


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {_first_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} is no configuration: it holds a {type(config).__name__}.")
    return config


def _check_family(config: dict[str, Any], name: str) -> None:
    family = config.get("model_type")
    classes = config.get("architectures") or []
    written = f" ({', '.join(classes)})" if classes else ""
    if classes and not any(entry.endswith(("ForCausalLM", "LMHeadModel")) for entry in classes):
        raise InputError(f"{name} is no causal decoder: it is a {family!r} model{written}.")
    if family != "llama":
        raise InputError(
            f"{name} is a {family!r} model{written}; probekit reads Llama-architecture models.",
            "Other families are not supported yet.",
        )
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"{name} is quantised ({method}); probekit reads floating-point safetensors, or GGUF.",
            "Take the model that it was made from.",
        )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, as its index names them; they may be missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, AttributeError) as error:
            raise InputError(f"{index} cannot be read: {_first_line(error)}") from error
        return [folder / Path(name).name for name in sorted(names)]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise InputError(
            f"{folder} holds its weights only as a pickle ({pickles[0]}), which can run code when it is read.",
            "Convert it to safetensors, or take a revision that has them.",
        )
    raise InputError(f"{folder} holds no weights: it has no model.safetensors.")


def _check_gguf(source: _Source) -> _Source:
    path = source.path
    if path.suffix in _PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when it is read.", "Give safetensors or GGUF.")
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is one file of a checkpoint.", "Give the folder that it lies in.")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} is no GGUF file: it begins with {magic!r}.")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem) and not path.stem.endswith("-00001-of-00001"):
        raise InputError(f"{path} is one part of a split GGUF file.", "Merge it with `llama-gguf-split --merge`.")
    return source


def _from_hub(reference: str, repository: str, revision: str | None) -> _Source:
    """Fetch a checkpoint into Hugging Face's cache: the small files first, the weights once those are right."""
    name = repository.split("/")[1]
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns="*/*")
        )
        if not (folder / "config.json").is_file():
            raise InputError(f"{repository} on Hugging Face holds no model: it has no config.json.")
        _check_family(_config_of(folder), repository)
        indexed = (folder / "model.safetensors.index.json").is_file()
        wanted = [path.name for path in _weight_files(folder)] if indexed else ["model.safetensors"]
        snapshot_download(repository, revision=folder.name, allow_patterns=wanted)
    except GatedRepoError as error:
        raise InputError(
            f"{repository} is gated, and this machine is not logged in as a user who may read it.",
            f"Accept its licence at https://huggingface.co/{repository}, then run `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository} on Hugging Face has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"there is no model {repository!r}: no folder has that name, and Hugging Face shows none.",
            "Check the spelling; for a private one run `hf auth login`.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{repository} is neither a folder nor in Hugging Face's cache, and Hugging Face cannot be reached.",
            "Check the connection (and HF_HUB_OFFLINE), or give a folder or a GGUF file.",
        ) from error
    except OSError as error:  # every failure of the connection, or a full disk
        raise InputError(f"{repository} could not be fetched from Hugging Face: {_first_line(error)}") from error
    if not all((folder / wanted_name).is_file() for wanted_name in wanted):
        raise InputError(
            f"{repository} holds no safetensors weights; a pickle can run code when it is read, so none is.",
            "Take another revision (owner/name@revision), or convert it.",
        )
    return _check_folder(_Source(folder, None, name, reference, revision=folder.name))


def _bundled(folder: Path) -> BundledModel:
    config = _config_of(folder)
    record_file = folder / "training.json"
    record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else {}
    seen = f", {record['tokens_seen'] / 1e6:.1f} million tokens" if "tokens_seen" in record else ""
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        parameters = sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return BundledModel(
        name=folder.name,
        path=folder,
        layers=config["num_hidden_layers"],
        tied=bool(config.get("tie_word_embeddings")),
        parameters=parameters,
        says=record.get("says", ""),
        trained_on=f"English fairy and folk tales in the public domain (Project Gutenberg){seen}",
    )


# ---------------------------------------------------------------------------------------------- reading


def _read_folder(source: _Source, device: torch.device, asked: torch.dtype | None) -> tuple[Any, Any, list[Path]]:
    files = _weight_files(source.folder)
    with safe_open(files[0], framework="pt") as weights:
        stored = weights.get_slice(next(iter(weights.keys()))).get_dtype()
    dtype = asked or _default_dtype(device, stored)
    tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    return _read_weights(source, device, dtype), tokenizer, files


def _read_gguf(source: _Source, device: torch.device, asked: torch.dtype | None) -> tuple[Any, Any, list[Path]]:
    with _one_gguf_reader(source.path) as reader:
        config = AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf, local_files_only=True)
        _check_family(config.to_dict(), source.name)
        scaling = reader.get_field("llama.rope.scaling.type")
        if scaling is not None and scaling.contents() != "none":
            raise InputError(
                f"{source.path} scales its rotary embedding ({scaling.contents()}), which transformers does not "
                "read from GGUF.",
                "Take the safetensors checkpoint of this model.",
            )
        if reader.get_field("tokenizer.ggml.tokens") is None:
            raise InputError(f"{source.path} holds no tokenizer.", "Take a GGUF file that has one.")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        dtype = asked or _default_dtype(device, tensors["token_embd.weight"].tensor_type.name)
        tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf, local_files_only=True)
        if isinstance(config.eos_token_id, int) and tokenizer.eos_token_id != config.eos_token_id:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)  # 5.17 takes bos
        model = _read_weights(source, device, dtype, config=config, gguf_file=source.gguf)
        if "rope_freqs.weight" in tensors:
            # Llama 3.1 and later: GGUF writes the rope scaling as divisors of the frequencies, which transformers
            # leaves out (as of 5.23).
            divisors = torch.tensor(tensors["rope_freqs.weight"].data, dtype=torch.float32, device=device)
            rotary = model.model.rotary_emb
            rotary.inv_freq.div_(divisors)
            rotary.original_inv_freq.div_(divisors)
    return model, tokenizer, [source.path]


def _default_dtype(device: torch.device, stored: str) -> torch.dtype:
    """float32 on the CPU, else what the weights are `stored` in; bfloat16 for quantised ones."""
    return torch.float32 if device.type == "cpu" else _STORED_DTYPES.get(stored, torch.bfloat16)


def _read_weights(source: _Source, device: torch.device, dtype: torch.dtype, **options: Any) -> LlamaForCausalLM:
    if device.type != "cpu":
        options["device_map"] = {"": device}  # straight to the device; with one device accelerate adds no hook
    loaded: Any = LlamaForCausalLM.from_pretrained(
        source.folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{source.path} lacks {len(missing)} of the model's weights, among them {missing[0]}.")
    strange = sorted(key for key in report["unexpected_keys"] if ".layers." in key and "rotary_emb" not in key)
    if strange:
        raise InputError(f"{source.path} holds weights that no Llama of its configuration has: {strange[0]}.")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' log lines, warnings and progress bars, until the end of the context."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # its GGUF reader has a bar of its own
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_gguf_reader(path: Path) -> Iterator[Any]:
    """Parse a GGUF file's header, and gguf's list of tensor names, once.

    transformers (5.23) opens the file anew for config, tokenizer and weights, and makes the list anew for every
    module of the model: more than half of the seconds that a small model takes to load.
    """
    library: Any = import_module("gguf")
    original, name_map = library.GGUFReader, library.get_tensor_name_map
    try:
        reader = original(path)
    except Exception as error:
        raise InputError(f"{path} cannot be read as GGUF: {_first_line(error)}") from error

    def shared(asked: Any, *args: Any, **kwargs: Any) -> Any:
        return reader if Path(asked) == path else original(asked, *args, **kwargs)

    library.GGUFReader, library.get_tensor_name_map = shared, cache(name_map)
    try:
        yield reader
    finally:
        library.GGUFReader, library.get_tensor_name_map = original, name_map


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
