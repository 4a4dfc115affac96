"""What torch.save wrote, from outside: tensors and plain values only, nothing in the file is run."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from probekit.errors import InputError


def read_tensors(given: bytes | Path, what: str, source: str) -> Any:
    """The object in a file, or in its contents, on the CPU. Raises InputError, which names `source`.

    The unpickler of weights can fail in any way on a damaged file, of which none says more than that.
    """
    try:
        return torch.load(BytesIO(given) if isinstance(given, bytes) else given, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"{source} cannot be read as {what}: {first}") from None
