"""Ctrl-C in a real process, at moments that nobody chose: the model is as it was, and decodes the same text again."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection

import pytest
from tracing.jobs import MANY

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import SelfSpeculative, Speculative
from probekit.hooks import Capture, open_hooks
from probekit.models.synthetic import synthetic

pytestmark = pytest.mark.second

PAUSES = (0.05, 0.013, 0.031, 0.002, 0.027)  # seconds after which the signals are sent
PATIENCE = 180


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("method", ["autoregressive", "self-speculative", "speculative"])
def test_ctrl_c_leaves_the_model_clean(method, captured):
    ours, theirs = MANY.Pipe()
    process = MANY.Process(target=_decodes, args=(method, captured, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE) and ours.recv() == "decoding"
        for pause in PAUSES:
            time.sleep(pause)
            os.kill(process.pid, signal.SIGINT)
            assert ours.poll(PATIENCE) and ours.recv() == "clean"
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def _decodes(name: str, captured: bool, told: Connection) -> None:
    """Decode on and on, and say after each Ctrl-C whether all is as it was."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
    loaded, drafter = synthetic("tiny", seed=1, ends=False), synthetic("tiny-draft", seed=3, ends=False)
    method = {
        "autoregressive": Autoregressive(loaded),
        "self-speculative": SelfSpeculative(loaded, 2, 3),
        "speculative": Speculative(loaded, drafter, 3),
    }[name]
    prompts = [[5, 6, 7, 8], [1]]
    expected = method.decode(prompts, max_new_tokens=40)
    config, before = loaded.model.config.to_dict(), _state(loaded.model)
    capture = Capture(loaded.model, [1, 4] if captured else None, reduce=lambda site, residual: None)
    said = "decoding"
    for _ in PAUSES:
        try:
            told.send(said)
            while True:
                if captured:
                    with capture:
                        method.decode(prompts, max_new_tokens=200)
                else:
                    method.decode(prompts, max_new_tokens=200)
        except KeyboardInterrupt:
            assert open_hooks(loaded.model) == [] == open_hooks(drafter.model)
            assert loaded.model.config.to_dict() == config
            assert _state(loaded.model) == before
            assert method.decode(prompts, max_new_tokens=40) == expected
            said = "clean"
    told.send(said)


def _state(model):
    return {name: (dict(vars(module)), module.training) for name, module in model.named_modules()}
