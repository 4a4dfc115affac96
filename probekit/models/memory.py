"""How much memory a device can still give."""

from __future__ import annotations

import psutil
import torch


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new array can have on a device; None for a device that is neither a CPU nor a CUDA GPU."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for the next array
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return None
