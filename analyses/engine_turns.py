"""Sessions of an engine on the same prompts in turns: what two analyses of engines share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from probekit.traces.trace import Trace
from probekit.validation.engine_costs import CostPlan
from probekit.validation.engine_rounds import Session

FEWER, MORE = 8, 64  # tokens: what the longer text takes more is its decoding
CONTEXT = 64  # of the costs: the middle of these texts
PAST = 8  # tokens that a text is traced further, where engines draft past the budget
SETTINGS: dict[str, Any] = {"tokens": [FEWER, MORE], "context": CONTEXT, "dtype": "float32", "threads": 1,
                            "clock": "processor"}  # fmt: skip


def cost_plan(engine: str, depth: int, sweeps: int, texts: int) -> CostPlan:
    """By the clock of one processor; a process of its own for each way is open beside plain decoding only."""
    return CostPlan((1, depth - 1), (1, 2, 4, 8), contexts=(CONTEXT,), sweeps=sweeps, clock="processor",
                    together=engine == "transformers", texts=texts)  # fmt: skip


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


def decoding(seconds: np.ndarray) -> np.ndarray:
    """(prompts, sessions) of `in_turns`, or of some of its sweeps: each at the least that its turns took, for other
    processes only add to it."""
    least = seconds.min(axis=0)
    return least[..., 1] - least[..., 0]
