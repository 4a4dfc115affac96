"""An engine on one thread, and its sessions on the same prompts in turns: what two analyses of engines share."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import engine_environments as environments
import numpy as np
import torch
import typer
from fetch_real_models import fetch
from regrets import noise

from probekit.models.loaded import load
from probekit.traces.trace import Trace
from probekit.validation.engine_costs import CostPlan
from probekit.validation.engine_rounds import Session
from probekit.validation.open_engine import EngineHome

FEWER, MORE = 8, 64  # tokens: what the longer text takes more is its decoding
HELPERS = {"tales-layerskip": "tales-draft"}  # draft models of their own
NOISE = 0.02  # by which plain decoding may differ from itself
CONTEXT = 64  # of the costs: the middle of these texts
PAST = 8  # tokens that a text is traced further, where engines draft past the budget
SETTINGS: dict[str, Any] = {"tokens": [FEWER, MORE], "context": CONTEXT, "dtype": "float32", "threads": 1,
                            "clock": "processor"}  # fmt: skip


Folder = Annotated[Path, typer.Option("--environments", help="Where engines are, or are set up.")]
Cache = Annotated[Path, typer.Option("--cache", help="Holds the published models.")]
FOLDER, CACHE = Path("build/engines"), Path("~/.cache/probekit")


def homes(engine: str, models: Sequence[str], folder: Path, cache: Path) -> list[EngineHome]:
    """The engine with each model, in float32 on one thread; the engine is set up where it is not there yet."""
    torch.set_num_threads(1)
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # vLLM's lookup wakes a thread for each core, and they spin
    folder, cache = folder.absolute(), cache.expanduser()
    place = environments.ENGINES[engine](folder) if engine in environments.ENGINES else None
    found = []
    for name in models:
        model = name if name.startswith("tales-") else fetch(name, cache)
        loaded = load(model, device="cpu", dtype="float32", cache=cache)
        helper = load(HELPERS[name], device="cpu", dtype="float32", cache=cache) if name in HELPERS else None
        found.append(EngineHome(engine, loaded, folder / "models" / loaded.name, place, plain=True, helper=helper))
    return found


def measured_on(engine: str) -> dict[str, Any]:
    """What a record says of the machine and of the versions."""
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.system()},
        "versions": {name: version(name) for name in ("probekit", "torch", "transformers")}
        | {"packages": " ".join(environments.PACKAGES.get(engine, ()))},
    }


def cost_plan(home: EngineHome, lengths: Iterable[int], sweeps: int, texts: int) -> CostPlan:
    """Verifications of 1 and of each of these many drafts, by the clock of one processor; a process of its own for each
    way is open beside plain decoding only."""
    return CostPlan((1, home.loaded.depth - 1), (1, *lengths), contexts=(CONTEXT,), sweeps=sweeps, clock="processor",
                    together=home.engine == "transformers", texts=texts,
                    drafter=None if home.helper is None else home.helper.name)  # fmt: skip


def prompt_ids(run: Trace) -> list[list[int]]:
    return [run.prompt_ids(prompt).tolist() for prompt in run.prompts]


def in_turns(
    prompts: Sequence[Sequence[int]], sessions: Sequence[Session], sweeps: int, *, warm: bool = False
) -> np.ndarray:
    """(sweeps, prompts, sessions, 2) processor seconds of texts of FEWER and of MORE tokens, in orders that are drawn.

    A first sweep, which is slow, is not counted. warm: all sessions were asked before, and there is none.
    """
    order = random.Random(int(warm))
    seconds = np.empty((sweeps, len(prompts), len(sessions), 2))
    places = list(range(len(sessions)))
    for sweep in range(0 if warm else -1, sweeps):
        for at, prompt in enumerate(prompts):
            order.shuffle(places)
            for place in places:
                taken = [sessions[place](prompt, count).processor_s for count in (FEWER, MORE)]
                if sweep >= 0:
                    seconds[sweep, at, place] = taken
    return seconds


def until_still(prompts: Sequence[Sequence[int]], sessions: Sequence[Session], least: int, most: int) -> np.ndarray:
    """`in_turns` of so many sweeps at least, and of more until the first and the last session, which decode alike,
    differ by less than NOISE over all prompts."""
    seconds = in_turns(prompts, sessions, least)
    while len(seconds) < most and noise(decoding(seconds)[:, [0, -1]].T) > NOISE:
        seconds = np.concatenate([seconds, in_turns(prompts, sessions, 1, warm=True)])
    return seconds


def decoding(seconds: np.ndarray) -> np.ndarray:
    """(prompts, sessions) of `in_turns`, or of some of its sweeps: each at the least that its turns took, for other
    processes only add to it."""
    least = seconds.min(axis=0)
    return least[..., 1] - least[..., 0]
