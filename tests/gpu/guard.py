"""A device guard for CUDA that does nothing: a build for processors refuses some work on CUDA tensors without one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch


def register_guard(folder: Path) -> str | None:
    """Build it in a folder and register it, once a process. Returns why it cannot be, where it cannot."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "there is no C++ compiler, with which a device guard for CUDA is built"
    root, made = Path(torch.__file__).parent, folder / "libguard.so"
    command = [
        compiler, "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(Path(__file__).parent / "guard.cpp"),
        f"-L{root}/lib", "-lc10", "-o", str(made),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        return f"the device guard cannot be built: {built.stderr.strip().splitlines()[-1]}"
    torch.ops.load_library(str(made))
    return None
