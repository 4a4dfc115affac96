"""Ctrl-C in a real process, at moments that nobody chose: the model is as it was, and decodes the same text again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.second

ROOT = Path(__file__).parents[2]
PROCESS = """
import signal
import sys
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import SelfSpeculative
from probekit.decoding.speculative import Speculative
from probekit.hooks import Capture, open_hooks
from probekit.models.synthetic import synthetic

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
loaded, drafter = synthetic("tiny", seed=1, ends=False), synthetic("tiny-draft", seed=3, ends=False)
method = {{
    "autoregressive": Autoregressive(loaded),
    "self-speculative": SelfSpeculative(loaded, 2, 3),
    "speculative": Speculative(loaded, drafter, 3),
}}[{method!r}]
prompts = [[5, 6, 7, 8], [1]]
expected = method.decode(prompts, max_new_tokens=40)
before = {{name: (dict(vars(module)), module.training) for name, module in loaded.model.named_modules()}}
config = loaded.model.config.to_dict()
sites = [1, 4] if {captured} else []
capture = Capture(loaded.model, sites or None, reduce=lambda site, residual: None)
said = "decoding"
for _ in range({interrupts}):
    try:
        print(said, flush=True)
        while True:
            if sites:
                with capture:
                    method.decode(prompts, max_new_tokens=200)
            else:
                method.decode(prompts, max_new_tokens=200)
    except KeyboardInterrupt:
        assert open_hooks(loaded.model) == [] == open_hooks(drafter.model)
        assert loaded.model.config.to_dict() == config
        now = {{name: (dict(vars(module)), module.training) for name, module in loaded.model.named_modules()}}
        assert now == before
        assert method.decode(prompts, max_new_tokens=40) == expected
        said = "clean"
print(said, flush=True)
"""


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("method", ["autoregressive", "self-speculative", "speculative"])
def test_ctrl_c_leaves_the_model_clean(method, captured):
    interrupts = 5
    code = PROCESS.format(method=method, captured=captured, interrupts=interrupts)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    watchdog = threading.Timer(180, process.kill)
    watchdog.start()
    try:
        assert process.stdout.readline() == "decoding\n"
        for pause in (0.05, 0.013, 0.031, 0.002, 0.027)[:interrupts]:
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "clean\n", process.stderr.read()
        assert process.wait(60) == 0, process.stderr.read()
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
