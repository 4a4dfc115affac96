"""What a model's name means: a bundled model, a folder, a GGUF file, or an id on Hugging Face."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from probekit.errors import InputError
from probekit.models.checkpoint import Source, check_family, check_folder, first_line
from probekit.models.gguf import check_gguf
from probekit.models.quantised import check_runs
from probekit.models.shipped import DRAFT, TALES
from probekit.models.shipped import BundledModel as BundledModel  # were named here
from probekit.models.shipped import bundled_models as bundled_models
from probekit.models.weight_files import BUNDLED, PICKLES, config_of, named_weights, weight_files

_SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")


def find_checkpoint(reference: str | Path) -> Source:
    """Where the checkpoint of `reference` lies, its configuration and the presence of its files checked."""
    text = str(reference)
    if text in (*TALES, DRAFT):
        folder = BUNDLED / text
        if not (folder / "config.json").is_file():
            raise InputError(
                f"the bundled model {text!r} is not in this installation.",
                "Name a model instead: a Hugging Face id, a folder, or a GGUF file.",
            )
        return check_folder(Source(folder, None, text, text))
    path = Path(os.path.expanduser(text))
    if text and os.path.isdir(path):
        path = path.resolve()
        return check_folder(Source(path, None, path.name, str(path)))
    if os.path.isfile(path):
        path = path.absolute()
        return check_gguf(Source(path.parent, path.name, path.stem, str(path)))
    hub = _HUB_ID.fullmatch(text)
    if hub is None or text.startswith((".", "~")) or path.suffix in (".gguf", ".safetensors", *PICKLES):
        raise InputError(
            f"there is no model {text!r}: no bundled model, no folder and no file has that name.",
            f"Bundled: {', '.join((*TALES, DRAFT))}. A Hugging Face id reads owner/name.",
        )
    return _from_hub(text, hub["id"], hub["revision"])


def _from_hub(reference: str, repository: str, revision: str | None) -> Source:
    """Fetch a checkpoint into Hugging Face's cache: the small files first, the weights once those are right."""
    name = repository.split("/")[1]
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns="*/*")
        )
        if not (folder / "config.json").is_file():
            raise InputError(f"{repository} on Hugging Face holds no model: it has no config.json.")
        check_family(config_of(folder), repository, decoded=False)
        check_runs(config_of(folder), repository)
        indexed = (folder / "model.safetensors.index.json").is_file() or named_weights(folder) is not None
        wanted = [path.name for path in weight_files(folder)] if indexed else ["model.safetensors"]
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
        raise InputError(f"{repository} could not be fetched from Hugging Face: {first_line(error)}") from error
    if not all((folder / wanted_name).is_file() for wanted_name in wanted):
        raise InputError(
            f"{repository} holds no safetensors weights; a pickle can run code when it is read, so none is.",
            "Take another revision (owner/name@revision), or convert it.",
        )
    return check_folder(Source(folder, None, name, reference, revision=folder.name))
