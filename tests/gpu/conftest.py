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


@pytest.fixture
def kernel(cuda, monkeypatch):
    """The row kernel in Triton's interpreter, on the numbers behind the pretended tensors; how often it was called."""
    import torch
    from gpu.pretend import Cuda
    from lens import truth

    row_kernel = pytest.importorskip("probekit.lens.row_kernel", reason="Triton is not installed")
    truth.check_interpreter()
    theirs, calls = row_kernel.row_statistics, []

    def launched(*tensors, **setting):
        assert all(isinstance(each, Cuda) for each in tensors)
        calls.append(tensors[0].shape)
        with torch.utils._python_dispatch._disable_current_modes():
            found = theirs(*(each.elem for each in tensors), **setting, block=64)
        return {name: Cuda(figures) for name, figures in found.items()}

    monkeypatch.setattr(row_kernel, "row_statistics", launched)
    return calls
