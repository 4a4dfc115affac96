"""The training script as a user runs it: resumable after a kill, the same weights again, folders that load."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.second

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "analyses" / "train_reference_models.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A small text with the two marks between which the held-out book lies."""
    path = tmp_path_factory.mktemp("corpus") / "tales.txt"
    tale = [
        f"Once upon a time there lived king number {n}, who had {n + 2} sons and a golden bird." for n in range(900)
    ]
    held_out = ["Long, long ago there stood in the midst of a country covered with lakes a moor.", *tale[:60]]
    path.write_text("\n".join([*tale, *held_out, "Dorothy lived in the midst of the prairies.", *tale[:50]]))
    return path


def command(corpus: Path, folder: Path, *more: str) -> list[str]:
    settings = "--device cpu --threads 1 --steps 6 --save-every 2 --only tales-draft"
    places = ["-o", str(folder / "models"), "--work", str(folder / "work")]
    return [sys.executable, str(SCRIPT), str(corpus), *places, *settings.split(), *more]


def run(words: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "models" / "tales-draft" / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_weights_also_after_a_kill(corpus, tmp_path):
    run(command(corpus, tmp_path / "whole"))
    process = subprocess.Popen(
        command(corpus, tmp_path / "killed"), env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "killed" / "work" / "tales-draft" / "checkpoint.pt"
    for _ in range(1200):
        if checkpoint.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(command(corpus, tmp_path / "killed"))
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
