"""Was the way that probekit chooses for another engine the fastest there? Every way that it chose among, really run.

    python analyses/engine_regret.py transformers --environments build/engines -o docs/results/engine-regret
    python analyses/engine_regret.py vllm --exit-layers 1,3,6 --draft-lengths 1,3,5 -o docs/results/engine-regret

Chosen on the even-numbered bundled prompts: one trace, and costs that `probekit costs` measures in that engine. Exits
and prompt lookups at every length then decode the odd-numbered ones inside the engine, in turns with plain decoding,
twice in each group of ways that are open together (in transformers all of them are; a process of vLLM or a server takes
its own memory). Seconds are those of one processor, at the least of a text's turns; a way's speedup is against
the plain decoding of its own group. More turns follow until the noise is below 2 %, or `--sweeps` are done.

Regret: 1 - speedup of the chosen way / speedup of the fastest; plain decoding is among the ways, at 1. Held out: the
fastest is looked for on half of the prompts and compared on the other half, for every way to halve them. Noise: what
plain decoding differs from itself, in 95 % of the draws of prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import engine_turns as turns
import numpy as np
import typer
from regrets import noise, regret_of
from rich.console import Console

from probekit.choice.choose import Candidate, Choice, choose
from probekit.costs.engine_profile import EngineProfile
from probekit.engines.engine import Drafting
from probekit.engines.inside import predict_inside
from probekit.engines.known import ENGINES
from probekit.files import atomic_text
from probekit.settings import Sampling
from probekit.traces.trace import Trace
from probekit.tracing.prompts import as_prompts, bundled_prompts_for
from probekit.tracing.tracer import trace
from probekit.validation.engine_costs import measure_home
from probekit.validation.open_engine import EngineHome

SCHEMA = "probekit/engine-regret/1"
TOGETHER = {"transformers": 1000, "vllm": 6, "llama.cpp": 12}  # ways that are open at once


def main(
    engine: Annotated[str, typer.Argument(help=" or ".join(TOGETHER))],
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives ENGINE-MODEL.json.")] = Path(
        "docs/results/engine-regret"
    ),
    model: str = "tales-layerskip",
    exit_layers: Annotated[str, typer.Option(help="With commas between.")] = "1,2,3,4,6",
    draft_lengths: Annotated[str, typer.Option(help="With commas between.")] = "1,2,3,4,5",
    least: Annotated[int, typer.Option(min=1, help="Turns of every way, before noise is asked for.")] = 3,
    sweeps: Annotated[int, typer.Option(min=1, help="The most turns of every way.")] = 9,
    folder: turns.Folder = turns.FOLDER,
    cache: turns.Cache = turns.CACHE,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    [home] = turns.homes(engine, [model], folder, cache)
    loaded = home.loaded
    exits, lengths = ([int(each) for each in text.split(",")] for text in (exit_layers, draft_lengths))
    prompts = as_prompts(bundled_prompts_for(loaded.name))
    profile = measure_home(home, turns.cost_plan(home, lengths, 5, 3))
    choice = chosen(
        trace(loaded, prompts[::2], max_new_tokens=turns.MORE + turns.PAST, draft_model=home.helper),
        profile,
        exits,
        lengths,
    )
    ways = choice.ranking
    record: dict[str, Any] = {
        "schema": SCHEMA, "engine": engine, "model": loaded.name,
        "settings": turns.SETTINGS | {"exit_layers": exits, "draft_lengths": lengths, "together": TOGETHER[engine],
                                "noise": turns.NOISE, "least": least, "sweeps": sweeps},
        **turns.measured_on(engine),
        "choice": choice.to_json(), "profile": profile.to_json(),
    }  # fmt: skip
    ids = turns.prompt_ids(trace(loaded, prompts[1::2], max_new_tokens=turns.MORE))
    groups = []
    for first in range(0, len(ways), TOGETHER[engine]):
        group = ways[first : first + TOGETHER[engine]]
        groups.append(decoded(home, group, ids, least, sweeps))
        Console(soft_wrap=True).print(f"{first + len(group)} of {len(ways)} ways", markup=False)
    plain = np.stack([each.plain for each in groups])
    alone = plain.mean(axis=(0, 1))
    seconds = np.concatenate([alone[None], *(each.ways * alone.sum() / each.plain.mean(0).sum() for each in groups)])
    names = ["no drafts", *(named(way) for way in ways)]
    mine = names.index(named(choice.best)) if choice.speculate else 0
    record |= {
        "turns": [each.turns for each in groups],
        "seconds": {name: np.round(row, 5).tolist() for name, row in zip(names, seconds, strict=True)},
        "plain": np.round(plain, 5).tolist(),
        "regret": regret_of(seconds, max(map(noise, plain)), mine, names, "ways")
        | {"predicted_speedup": choice.speedup},
    }
    atomic_text(output / f"{engine}-{loaded.name}.json", json.dumps(record, indent=1) + "\n")
    Console(soft_wrap=True).print_json(json.dumps(record["regret"]))


def chosen(run: Trace, profile: EngineProfile, exits: Sequence[int], lengths: Sequence[int]) -> Choice:
    """As `probekit choose --costs` does, among these exits, the draft model and all lookups."""
    prediction = predict_inside(run, ENGINES[profile.engine], exits, lengths, look_up=True)
    return choose(prediction, profile.costs(run.depth, context=turns.CONTEXT))


def named(way: Candidate) -> str:
    return f"{way.label} x {way.draft_length}"


class Group(NamedTuple):
    """Seconds of decoding: of plain decoding twice, (2, prompts); of ways that were open beside it, (ways, prompts)."""

    plain: np.ndarray
    ways: np.ndarray
    turns: int


def decoded(home: EngineHome, ways: Sequence[Candidate], ids: Sequence[Sequence[int]], least: int, most: int) -> Group:
    """All of them in turns with plain decoding, until that differs from itself by less than it may."""
    with ExitStack() as stack:
        alone = stack.enter_context(home.open(Drafting()))
        drafting = [
            stack.enter_context(home.open(Drafting.with_drafter(way.drafts, way.draft_length, Sampling())))
            for way in ways
            if way.drafts is not None
        ]
        sessions = [alone, *drafting, alone]
        seconds = turns.until_still(ids, sessions, least, most)
    return _group(seconds)


def _group(seconds: np.ndarray) -> Group:
    spent = turns.decoding(seconds).T
    return Group(spent[[0, -1]], spent[1:-1], len(seconds))


if __name__ == "__main__":
    typer.run(main)
