"""CUDA on a machine without a GPU, for the tests of this folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def device_guard(tmp_path_factory):
    """Register a device guard for CUDA that does nothing, once a process. Skips where it cannot be built."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: its own tests are the better ones")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler, with which a device guard for CUDA is built")
    root, made = Path(torch.__file__).parent, tmp_path_factory.mktemp("guard") / "libguard.so"
    command = [
        compiler, "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(Path(__file__).parent / "guard.cpp"),
        f"-L{root}/lib", "-lc10", "-o", str(made),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the device guard cannot be built: {built.stderr.strip().splitlines()[-1]}")
    torch.ops.load_library(str(made))


@pytest.fixture
def cuda(device_guard):
    """A pretended CUDA device, `cuda:0`, for the length of a test: see `pretend.py`."""
    from gpu.pretend import pretended

    with pretended() as device:
        yield device
