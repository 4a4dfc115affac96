"""Was the chosen pair the best one? Every exit layer and draft length, really run, on prompts that had no say in it.

    python analyses/benchmark_regret.py tales-layerskip -o docs/results/decoding/regret-tales-layerskip
    python analyses/benchmark_regret.py tales-layerskip --draft-rows 512 --fit-heads -o \
        docs/results/decoding/regret-exit-heads

The pair is chosen on the even-numbered bundled prompts: one trace, and costs measured on this machine. Exit heads, and
the tokens whose rows a small draft head keeps, are learned from what the model writes after every fourth prompt, which
then has no part in the choice. Every pair decodes the odd-numbered ones. All take turns on a prompt, autoregressive
decoding twice among them, before the next prompt comes: a machine that slows down slows all of them. More turns follow
until that decoding differs from itself by less than 1 %, or `--turns` are done. A run stops after `--minutes`, behind a
whole prompt, and the same command goes on with the others.

Regret: 1 - speedup of the chosen pair / speedup of the best pair, all prompts together; "no drafts" is among the pairs,
at 1. The time of a pair on a prompt is that of all its rounds, at the least of the turns: other processes only add to
it. One thread on a CPU is timed by the processor's clock, which does not count them either.
The best of many noisy speedups is too good, so beside it stands the honest one: the best pair is looked for on half of
the prompts, and compared on the other half, for every way to halve them. Noise: the same for two runs of one method,
autoregressive decoding against itself.

Started by torchrun (`torchrun --nproc-per-node 2 analyses/benchmark_regret.py ...`), the processes share the prompts:
the first one's choice is everybody's, tokens and rounds are those of one process, and times are only worth something
where each has a device, or a core, of its own. What a process has measured is kept beside the record until all are
done, so that the same command goes on with the rest, with any number of processes, also after one of them was killed.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import benchmarking as bench
import numpy as np
import pandas as pd
import torch
import typer
from learned_drafting import Drafting
from regrets import noise, regret_of
from rich.console import Console

from probekit.choice.choose import Choice, choose
from probekit.costs.measure import measure_costs
from probekit.costs.timing import clock_named
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.decoder import Decoder
from probekit.lens.exit_heads import fingerprint
from probekit.models.loaded import Loaded
from probekit.prediction.predict import predict
from probekit.ranks import Ranks, joined
from probekit.traces.trace import Trace
from probekit.tracing.prompts import Prompt, bundled_prompts_for
from probekit.tracing.tracer import trace

RAW = ("prompt", "exit_layer", "draft_length", "turn", "seconds", "tokens", "rounds")
PLAIN = (0, 0)  # (exit layer, draft length) of autoregressive decoding
LEAST, NOISE = 3, 0.01  # turns of every pair on a prompt, and when they are enough


def main(
    model: bench.Model = bench.MODEL,
    output: bench.Record = Path("regret"),
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    longest: Annotated[int, typer.Option(min=1, help="Draft lengths 1..LONGEST.")] = 8,
    draft_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Draft with the head's rows of so many tokens, the most frequent ones."),
    ] = None,
    heads: Annotated[bool, typer.Option("--fit-heads", help="Draft through exit heads.")] = False,
    minutes: Annotated[float, typer.Option(min=0, help="Start no further prompt after so long.")] = 3.5,
    turns: Annotated[int, typer.Option(min=1, help="The most turns of every pair on a prompt.")] = 6,
    threads: bench.Threads = None,
    device: bench.AnyDevice = None,
    dtype: bench.Dtype = None,
) -> None:
    began = perf_counter()
    with joined(Ranks.of_environment()) as ranks:
        loaded = ranks.agreed(lambda: bench.opened_with(model, threads, ranks.device(device), dtype))
        prompts = bundled_prompts_for(loaded.name)
        drafting, record, raw = ranks.from_first_of(
            lambda: begun(loaded, prompts, output, max_new_tokens, longest, draft_rows, heads, turns)
        )
        todo = [prompt for prompt in prompts[1::2] if prompt.index not in set(raw["prompt"])]
        methods = methods_of(loaded, longest, drafting)
        for place, prompt in enumerate(ranks.share(todo)):
            if place and perf_counter() - began > 60 * minutes:
                break
            keep(output, ranks.rank, measured(loaded, prompt, methods, max_new_tokens, turns))
        ranks.all("measured")
        if not ranks.first:
            return
    raw = whole(raw, kept(output), prompts)
    record["regret"] = regret(raw, record["choice"])
    bench.write_record(output, record, raw)
    for path in parts_of(output):
        path.unlink()
    Console(soft_wrap=True).print_json(json.dumps(record["regret"]))


def begun(
    loaded: Loaded, prompts: Sequence[Prompt], output: Path, budget: int, longest: int, draft_rows: int | None,
    heads: bool, turns: int,
) -> tuple[Drafting, dict[str, Any], pd.DataFrame]:  # fmt: skip
    """What exit layers draft with, the choice, and what an earlier run of the same settings has measured."""
    learns = heads or draft_rows is not None
    drafting = Drafting.learned(loaded, prompts[::4], budget, draft_rows, heads) if learns else Drafting()
    settings = {
        "max_new_tokens": budget,
        "longest": longest,
        "weights_hash": loaded.weights_hash,
        "threads": torch.get_num_threads(),
        "turns": turns,
        "clock": clock_of(loaded),
        "draft_rows": draft_rows,
        "exit_heads": fingerprint(drafting.heads) if drafting.heads else None,
    }
    record_path, nothing = output.with_suffix(".json"), pd.DataFrame(columns=list(RAW))
    if record_path.is_file() and json.loads(record_path.read_text())["settings"] == settings:
        raw = pd.read_csv(output.with_suffix(".csv"))
        return drafting, json.loads(record_path.read_text()), whole(raw, kept(output), prompts)
    for path in parts_of(output):
        path.unlink()  # of other settings
    traced = trace(
        loaded, prompts[2::4] if learns else prompts[::2], max_new_tokens=budget, statistics="agreement",
        draft_vocabulary=drafting.ids, exit_heads=drafting.heads,
    )  # fmt: skip
    record = described(loaded, choice_on(loaded, traced, longest, drafting), settings)
    bench.write_record(output, record, nothing)  # so that what the processes keep from here on is of this choice
    return drafting, record, nothing


def parts_of(output: Path) -> list[Path]:
    """What processes have measured and nobody has put into the record."""
    return sorted(output.parent.glob(f"{output.name}.part-*.csv"))


def keep(output: Path, rank: int, rows: pd.DataFrame) -> None:
    """A prompt's rows, whole or not at all."""
    path = output.with_name(f"{output.name}.part-{rank}-{rows['prompt'].iloc[0]}.csv")
    rows.to_csv(path.with_suffix(".new"), index=False, float_format="%.6g")
    path.with_suffix(".new").replace(path)


def kept(output: Path) -> list[pd.DataFrame]:
    return [pd.read_csv(path) for path in parts_of(output)]


def whole(raw: pd.DataFrame, more: Sequence[pd.DataFrame], prompts: Sequence[Prompt]) -> pd.DataFrame:
    """All rows, prompt after prompt in their order, whoever measured them; each prompt once."""
    known = {int(prompt) for prompt in raw["prompt"]}
    more = [rows for rows in more if int(rows["prompt"].iloc[0]) not in known]
    rows = pd.concat([each for each in (raw, *more) if not each.empty] or [raw], ignore_index=True)
    order = {prompt.index: place for place, prompt in enumerate(prompts)}
    return rows.sort_values("prompt", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def choice_on(loaded: Loaded, traced: Trace, longest: int, drafting: Drafting) -> Choice:
    """What probekit recommends after a trace, with costs measured at the context in the middle of the texts."""
    context = int((traced.texts["prompt_tokens"] + traced.texts["new_tokens"] / 2).median())
    lengths = range(1, longest + 1)
    costs = measure_costs(
        loaded, context, draft_lengths=lengths, draft_vocabulary=drafting.ids, exit_heads=drafting.heads,
        clock=clock_of(loaded),
    )  # fmt: skip
    return choose(predict(traced, draft_lengths=lengths, draft_rows=drafting.rows), costs)


def described(loaded: Loaded, choice: Choice, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": "probekit/benchmark-regret/1",
        "model": loaded.name,
        "settings": settings,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("probekit", "torch", "transformers")},
        "choice": choice.to_json(),
        "predicted": [candidate.to_json() for candidate in choice.ranking],
    }


def methods_of(loaded: Loaded, longest: int, drafting: Drafting) -> list[tuple[tuple[int, int], Decoder]]:
    """Every pair, and autoregressive decoding at the beginning and in the middle."""
    pairs: list[tuple[tuple[int, int], Decoder]] = [
        ((exit_layer, length), drafting.decoder(loaded, exit_layer, length))
        for exit_layer in loaded.anatomy.exits
        for length in range(1, longest + 1)
    ]
    plain = (PLAIN, Autoregressive(loaded))
    half = len(pairs) // 2
    return [plain, *pairs[:half], plain, *pairs[half:]]


def clock_of(loaded: Loaded) -> str:
    """Of one thread on a CPU the processor's own."""
    return "processor" if loaded.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def measured(
    loaded: Loaded, prompt: Prompt, methods: Sequence[tuple[tuple[int, int], Decoder]], budget: int, most: int
) -> pd.DataFrame:
    """All methods on one prompt, each turn in an order of its own. Seconds of the rounds only."""
    ids, clock = loaded.tokenizer(prompt.text)["input_ids"], clock_named(clock_of(loaded))
    for _, method in methods[:3]:
        method.decode([ids], max_new_tokens=min(budget, 16))
    order = np.random.default_rng(prompt.index)
    rows: list[tuple[Any, ...]] = []
    seen: dict[tuple[int, int], int] = {}
    for sweep in range(most):
        for place in order.permutation(len(methods)):
            pair, method = methods[place]
            with bench.stopwatch(clock) as ticks:
                done = method.decode([ids], max_new_tokens=budget)[0]
            seen[pair] = seen.get(pair, -1) + 1
            rows.append((prompt.index, *pair, seen[pair], ticks[-1] - ticks[0], done.emitted, done.rounds))
        alone = [row[RAW.index("seconds")] for row in rows if row[1:3] == PLAIN]
        if sweep + 1 >= LEAST and abs(1 - min(alone[::2]) / min(alone[1::2])) < NOISE:
            break
    return pd.DataFrame(rows, columns=list(RAW))


def regret(raw: pd.DataFrame, choice: dict[str, Any]) -> dict[str, Any]:
    """Speedups of all pairs, pooled over prompts, and what the chosen one lost."""
    raw = raw.assign(pair=list(zip(raw["exit_layer"], raw["draft_length"], strict=True)))
    table = raw.groupby(["pair", "prompt"])["seconds"].min().unstack("prompt")  # (pairs, prompts)
    alone = raw[raw["pair"] == PLAIN]
    twice = np.stack([alone[alone["turn"] % 2 == part].groupby("prompt")["seconds"].min() for part in (0, 1)])
    pairs = [PLAIN, *sorted(set(table.index) - {PLAIN})]
    # Autoregressive decoding, too, at the least of as many turns as the others.
    seconds = np.concatenate([twice.mean(axis=0)[None], table.loc[pairs[1:]].to_numpy()])
    mine = pairs.index((choice["exit_layer"] or 0, choice["draft_length"] or 0))
    found = regret_of(seconds, noise(twice), mine, [list(pair) for pair in pairs], "pairs")
    return found | {
        "chosen_speedup_predicted": choice["speedup"],
        "noise": abs(1 - twice[0].sum() / twice[1].sum()),
    }


if __name__ == "__main__":
    typer.run(main)
