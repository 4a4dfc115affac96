"""CUDA on a machine without a GPU, for the tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def device_guard(tmp_path_factory):
    """Register a device guard for CUDA that does nothing, once a process. Skips where it cannot be built."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: its own tests are the better ones")
    from gpu.guard import register_guard

    if (problem := register_guard(tmp_path_factory.mktemp("guard"))) is not None:
        pytest.skip(problem)


@pytest.fixture
def cuda(device_guard, monkeypatch):
    """A pretended CUDA device, `cuda:0`, for the length of a test: see `pretend.py`."""
    from gpu.pretend import pretended

    from probekit.decoding import device_round

    monkeypatch.setattr(device_round, "_has_room", lambda parts: False)  # fused kernels are asked for: `fused`
    with pretended() as device:
        yield device


@pytest.fixture
def fused(cuda, monkeypatch):
    """Rounds run by fused kernels, in Triton's interpreter, where they know the model."""
    from lens import truth

    from probekit.decoding import device_round

    pytest.importorskip("triton", reason="Triton is not installed")
    truth.check_interpreter()
    monkeypatch.setattr(device_round, "_has_room", lambda parts: device_round.reading_of(parts) is not None)
    return cuda


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
        assert all(isinstance(each, Cuda) for each in (*tensors, setting["noise"]))
        setting["noise"] = setting["noise"].elem
        calls.append(tensors[0].shape)
        with torch.utils._python_dispatch._disable_current_modes():
            found = theirs(*(each.elem for each in tensors), **setting, block=64)
        return {name: Cuda(figures) for name, figures in found.items()}

    monkeypatch.setattr(row_kernel, "row_statistics", launched)
    return calls
