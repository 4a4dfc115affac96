"""The names of devices and of number types, checked as words: without torch, and without the machine at hand."""

from __future__ import annotations

import re

from probekit.errors import InputError

DTYPES = ("float32", "float16", "bfloat16")
_DEVICE = re.compile(r"cpu(:0)?|cuda(:(0|[1-9][0-9]*))?")


def check_device_name(device: object) -> str:
    """`cpu`, `cuda` or `cuda:N`, of a name or a torch device; InputError for what no machine has."""
    if not _DEVICE.fullmatch(str(device)):
        raise InputError(f"device {str(device)!r} is not known; give cpu, cuda or cuda:N.")
    return str(device)


def check_dtype_name(dtype: object) -> str:
    """One of DTYPES, of a name or a torch dtype; InputError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {str(dtype)!r} is not known; give one of {', '.join(DTYPES)}.")
    return name
