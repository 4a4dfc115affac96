"""Fixtures that every room's tests share: tiny random Llamas in a moment, three real models when they can be had."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network that it does not name
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these models are small, and two processes share the cores
if shutil.which("nvidia-smi") is None:  # no GPU: kernels run in Triton's interpreter; to be said before its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "probekit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("probekit")


def pytest_terminal_summary(terminalreporter):
    """Count what tests recorded as `counted`: one line for each kind of claim, over all processes."""
    claims: dict[str, list[bool]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, claim in report.user_properties:
                if name == "counted" and report.when == "call":
                    claims.setdefault(claim, []).append(outcome == "passed")
    for claim, held in sorted(claims.items()):
        terminalreporter.write_line(f"{claim}: {sum(held)} of {len(held)}")


@pytest.fixture(scope="session")
def tiny():
    """5 layers x 36, 6 heads on 2 keys, vocabulary 97 (ASCII and an end), untied. Never change it."""
    from probekit.models.synthetic import synthetic

    return synthetic("tiny", seed=1)


@pytest.fixture(scope="session")
def tiny_tied():
    """6 layers x 30, 3 heads on 1 key, vocabulary 257 (bytes and an end), tied. Never change it."""
    from probekit.models.synthetic import synthetic

    return synthetic("tiny-tied", seed=2)


@pytest.fixture(scope="session", params=["untied", "tied"])
def any_tiny(request, tiny, tiny_tied):
    """Each of the two tiny models in turn."""
    return tiny if request.param == "untied" else tiny_tied


@pytest.fixture(scope="session")
def tiny_draft():
    """2 layers x 20 with the tokenizer of `tiny`: a draft model for it."""
    from probekit.models.synthetic import synthetic

    return synthetic("tiny-draft", seed=3)


@pytest.fixture(scope="session")
def tiny_chain():
    """4 layers x 16 over the vocabulary `abcd`, no end: short outputs can be enumerated."""
    from probekit.models.synthetic import synthetic

    return synthetic("tiny-chain", seed=4)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    """`tiny` with its tokenizer as a checkpoint folder, float32 safetensors."""
    return _save(tiny, tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny_tied_folder(tiny_tied, tmp_path_factory) -> Path:
    """`tiny_tied` with its tokenizer as a checkpoint folder, float32 safetensors."""
    return _save(tiny_tied, tmp_path_factory.mktemp("checkpoints") / "tiny-tied")


def _save(loaded, folder: Path) -> Path:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def real_model_path(name: str) -> Path:
    """The GGUF file of a real model: from the cache, else fetched into it once; the test is skipped where it cannot be.

    The cache is PROBEKIT_TEST_CACHE, or ~/.cache/probekit.
    """
    pytest.importorskip("gguf", reason="gguf, which reads the real models' files, is not installed")
    from analyses.fetch_real_models import fetch
    from probekit.errors import ResourceError

    cache = Path(os.environ.get("PROBEKIT_TEST_CACHE") or Path.home() / ".cache" / "probekit").expanduser()
    try:
        return fetch(name, cache)
    except ResourceError as error:
        pytest.skip(str(error))


def load_real_model(name: str):
    """In float32 on the CPU."""
    from probekit.models.loaded import load

    path = real_model_path(name)
    return load(path, device="cpu", dtype="float32", cache=path.parent)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct: 30 layers, tied, 49,152 tokens. Never change it."""
    return load_real_model("smollm2")


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 270M: 18 layers, five of six with a window, tied, 262,144 tokens. Never change it."""
    return load_real_model("gemma3")


@pytest.fixture(scope="session")
def qwen():
    """Qwen2.5-Coder-0.5B-Instruct: 24 layers, biases, 151,936 tokens. Never change it."""
    return load_real_model("qwen2.5-coder")


@pytest.fixture(scope="module")
def brief_calibration():
    """Costs from the fewest sweeps, for tests of what is done with costs: by default a calibration takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probekit.costs.measure.CALIBRATION_S", 0.0)
        yield


@pytest.fixture
def unchanged():
    """`unchanged(model)` remembers a model; at the end of the test it must carry no hook and the same config."""
    from probekit.hooks.sites import open_hooks

    kept = []

    def remember(model):
        kept.append((model, model.config.to_dict()))
        return model

    yield remember
    for model, config in kept:
        assert open_hooks(model) == []
        assert model.config.to_dict() == config
