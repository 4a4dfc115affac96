"""What does a trace cost, end to end? Against peers doing the same job, against a plain forward pass, and as it grows.

    python analyses/benchmark_tracing.py                                  # the bundled models
    python analyses/benchmark_tracing.py --models path/to/model.gguf --tokens 512 --repeats 3

capture: a forward pass with every residual read, over a plain one. job: prompts -> greedy text -> every layer's
statistics of every token -> Parquet; peaks: the memory that it takes. growth: a trace of one batch, of 4 and of 16
batches, each in a fresh process.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import benchmarking as bench
import pandas as pd
import peers
import seaborn as sns
import torch
import typer
from torch import Tensor
from torch.nn import functional

from probekit.models.loaded import Loaded
from probekit.presentation.plots.style import PALETTE
from probekit.tracing.backend import HooksBackend
from probekit.tracing.tracer import trace

PLAIN, CAPTURED = "plain forward", "probekit, all residuals"
ALL, AGREEMENT = "probekit, all statistics", "probekit, agreement"
PROMPT, NEW = 16, 48  # tokens of each prompt, and new ones
GROWTH, GROWN, GROWN_NEW = (1, 4, 16), 8, 16  # times so many prompts (a batch on the CPU), each with so many new tokens
PASSES = 5  # forward passes in one turn


def main(
    models: bench.Models = "",
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Tokens of a forward pass, and of the job.")] = 512,
    device: bench.Device = "cpu",
    repeats: bench.Repeats = 3,
    output: bench.Output = bench.RESULTS,
    parts: Annotated[
        str, typer.Option("--parts", help="Some of capture, job, peaks, growth.")
    ] = "capture,job,peaks,growth",
    statistics: Annotated[str, typer.Option("--statistics", help="Of the growing trace: all or agreement.")] = "all",
    alone: Annotated[str, typer.Option(hidden=True, help="Run one way once; print its seconds and its peak.")] = "",
) -> None:
    for reference in bench.references(models):
        loaded = endless(bench.opened(reference, device))
        if alone:
            typer.echo(json.dumps(run_alone(loaded, alone, tokens, statistics)))
            continue
        ids, prompts = bench.packed_text(loaded, tokens), prompts_of(loaded, tokens)
        bench.say(f"{loaded.name}: {ids.numel()} tokens in a pass; {len(prompts)} prompts of {PROMPT} + {NEW} tokens")
        settings = {"tokens": ids.numel(), "texts": len(ids), "prompts": len(prompts), "prompt_tokens": PROMPT,
                    "new_tokens": NEW, "passes": PASSES, "growing": [GROWN, PROMPT, GROWN_NEW, statistics]}  # fmt: skip
        head = bench.header("tracing", loaded, settings)
        path = bench.record_path(output, "tracing", loaded)
        samples = bench.kept_samples(path, head)
        again = partial(
            bench.in_fresh_process, __file__, "--models", reference, "--tokens", tokens, "--device", device,
            "--statistics", statistics,
        )  # fmt: skip
        for part in parts.split(","):
            measured = PARTS[part](loaded, ids, prompts, repeats, again)
            for name, each in measured.items():
                samples[name] = bench.extended(samples.get(name), each)
        bench.write(path, {**head, **judged(samples, len(prompts) * (PROMPT + NEW)), "samples": samples})
    if not alone:
        draw(output)


def endless(loaded: Loaded) -> Loaded:
    """The model with no token that ends a text, so that every way writes as many tokens."""
    for config in (loaded.model.generation_config, loaded.model.config):
        config.eos_token_id = None
    return loaded


def prompts_of(loaded: Loaded, tokens: int) -> Tensor:
    """(prompts, PROMPT) ids: pieces of the model's own text."""
    return bench.packed_text(loaded, max(1, tokens // (PROMPT + NEW)) * PROMPT, length=PROMPT)


# ------------------------------------------------------------------------------------------------------ capture
def capture(loaded: Loaded, ids: Tensor, prompts: Tensor, repeats: int, again: Callable[..., Any]) -> dict[str, Any]:
    """Seconds of PASSES forward passes: plain, with all residuals read by probekit, and by the peers."""
    rows = torch.ones_like(ids, dtype=torch.bool)

    def plain() -> None:
        loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    source = HooksBackend(loaded)  # one for all passes, as in a trace

    def captured() -> None:
        source.read({"input_ids": ids, "use_cache": False}, rows)

    once = {PLAIN: plain, CAPTURED: captured}
    once |= {name: partial(peers.PEERS[name](loaded).states, ids) for name in peers.installed()}
    with torch.inference_mode():
        for way in once.values():
            way()
        ways = {name: partial(_passes, way) for name, way in once.items()}
        return {"capture_s": bench.turns(ways, 3 * repeats, loaded.device)}


def _passes(way: Callable[[], Any]) -> None:
    for _ in range(PASSES):
        way()


# ------------------------------------------------------------------------------------------------------ the job
def job(loaded: Loaded, ids: Tensor, prompts: Tensor, repeats: int, again: Callable[..., Any]) -> dict[str, Any]:
    """Seconds of the whole job, by probekit and by the peers."""
    ways = {name: job_of(loaded, name) for name in [ALL, AGREEMENT, *peers.installed()]}
    for way in ways.values():
        way(prompts[:1])
    seconds = bench.turns({name: partial(way, prompts) for name, way in ways.items()}, repeats, loaded.device)
    return {"job_s": seconds}


def peaks(loaded: Loaded, ids: Tensor, prompts: Tensor, repeats: int, again: Callable[..., Any]) -> dict[str, Any]:
    """Peaks of the job beyond the model, each way in a fresh process."""
    ways = [ALL, AGREEMENT, *peers.installed()]
    return {"job_bytes": {name: [again("--alone", name)["extra_bytes"]] for name in ways}}


def job_of(loaded: Loaded, name: str) -> Callable[[Tensor], None]:
    """prompts (prompts, PROMPT) -> files in a folder that is then dropped."""
    if name in (ALL, AGREEMENT):
        return partial(probekit_job, loaded, "all" if name == ALL else "agreement")
    return partial(peer_job, peers.PEERS[name](loaded))


def probekit_job(loaded: Loaded, statistics: str, prompts: Tensor, new_tokens: int | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trace(
            loaded,
            prompts.tolist(),
            Path(folder) / "run",
            max_new_tokens=new_tokens or NEW,
            statistics=statistics,
            top_prompts=0,
        )


@torch.inference_mode()
def peer_job(peer: peers.Peer, prompts: Tensor) -> None:
    """The final-norm lens, with the statistics that plain torch gives, layer by layer; one Parquet file."""
    text = peer.generate(prompts, NEW)
    inputs, following = text[:, :-1], text[:, 1:].flatten()
    states = peer.states(inputs)
    own = peer.logits(states[-1], len(states) - 1).flatten(0, 1).float()
    frames = []
    for layer, state in enumerate(states):
        found = plain_statistics(peer.logits(state, layer).flatten(0, 1).float(), own, inputs.flatten(), following)
        frames.append(pd.DataFrame({name: values.cpu().numpy() for name, values in found.items()}).assign(layer=layer))
    with tempfile.TemporaryDirectory() as folder:
        pd.concat(frames).to_parquet(Path(folder) / "layers.parquet")


def plain_statistics(logits: Tensor, own: Tensor, inputs: Tensor, following: Tensor) -> dict[str, Tensor]:
    """What a trace holds of one lens and layer, in torch's own words. logits, own: (rows, vocabulary)."""
    log_q, log_p = functional.log_softmax(logits, -1), functional.log_softmax(own, -1)
    q, p = log_q.exp(), log_p.exp()
    best = logits.topk(2, dim=-1)
    argmax, score = best.indices[:, 0], logits.gather(-1, following[:, None])
    return {
        "argmax": argmax,
        "probability": q.amax(-1),
        "margin": best.values[:, 0] - best.values[:, 1],
        "agrees": argmax == own.argmax(-1),
        "log_probability": log_q.gather(-1, following[:, None])[:, 0],
        "rank": (logits > score).sum(-1),
        "model_rank": (own > own.gather(-1, argmax[:, None])).sum(-1),
        "entropy": -(q * log_q).sum(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "overlap": torch.minimum(p, q).sum(-1),
        "echo": argmax == inputs,
    }


# ------------------------------------------------------------------------------------------------------ growth
def growth(loaded: Loaded, ids: Tensor, prompts: Tensor, repeats: int, again: Callable[..., Any]) -> dict[str, Any]:
    """Seconds and peaks of a trace with 1, 4 and 16 times the tokens, in fresh processes that take turns."""
    found: dict[str, dict[str, list[float]]] = {"growth_s": {}, "growth_bytes": {}}
    for _ in range(repeats):
        for factor in GROWTH:
            one = again("--alone", f"growth {factor}")
            bench.say(f"  {factor} x the tokens: {one['seconds']:.2f} s")
            found["growth_s"].setdefault(str(factor), []).append(one["seconds"])
            found["growth_bytes"].setdefault(str(factor), []).append(one["extra_bytes"])
    return found


def run_alone(loaded: Loaded, name: str, tokens: int, statistics: str) -> dict[str, Any]:
    """One way, once, with its peak beyond the model; warmed up on one prompt."""
    if name.startswith("growth "):
        prompts = prompts_of(loaded, GROWN * (PROMPT + NEW)).repeat(int(name.split()[1]), 1)
        way: Callable[[Tensor], None] = partial(probekit_job, loaded, statistics, new_tokens=GROWN_NEW)
    else:
        prompts, way = prompts_of(loaded, tokens), job_of(loaded, name)
    way(prompts[:1])
    with bench.extra_memory(loaded.device) as extra:
        seconds, _ = bench.timed(partial(way, prompts), loaded.device)
        return {"seconds": seconds, "extra_bytes": extra()}


PARTS = {"capture": capture, "job": job, "peaks": peaks, "growth": growth}


# ------------------------------------------------------------------------------------------------------ judgement
def judged(samples: Mapping[str, Mapping[str, Sequence[float]]], tokens: int) -> dict[str, Any]:
    """Quantiles of every part that was measured, and its targets."""
    found: dict[str, Any] = {"targets": []}
    if "capture_s" in samples:
        seconds = samples["capture_s"]
        over = {name: bench.ratios(each, seconds[PLAIN]) for name, each in seconds.items()}
        found["capture"] = [
            {"way": name, "seconds": bench.spread(seconds[name]), "over_plain": bench.spread(over[name])}
            for name in seconds
        ]
        found["targets"].append(
            bench.target("forward pass with all residuals captured over a plain one", over[CAPTURED], at_most=1.03)
        )
    if "job_s" in samples:
        seconds, extra = samples["job_s"], samples.get("job_bytes", {})
        found["job"] = [
            {"way": name, "seconds": bench.spread(seconds[name]), "extra_bytes": bench.spread(extra.get(name, ())),
             "tokens_per_s": bench.spread([tokens / each for each in seconds[name]])}
            for name in seconds
        ]  # fmt: skip
    if "growth_s" in samples:
        seconds, extra = samples["growth_s"], samples["growth_bytes"]
        found["growth"] = [
            {"tokens": GROWN * (PROMPT + GROWN_NEW) * factor, "factor": factor,
             "seconds": bench.spread(seconds[str(factor)]), "extra_bytes": bench.spread(extra[str(factor)])}
            for factor in GROWTH
        ]  # fmt: skip
        for few, many in pairwise(GROWTH):
            times = [ratio * few / many for ratio in bench.ratios(seconds[str(many)], seconds[str(few)])]
            found["targets"].append(bench.target(f"seconds per token, {many}x over {few}x", times, at_most=1.1))
        if all((*extra["4"], *extra["16"])):  # counted, and more than nothing
            flat = bench.ratios(extra["16"], extra["4"])
            found["targets"].append(bench.target("peak memory, 16x over 4x the tokens", flat, at_most=1.1))
    return found


def draw(folder: Path) -> None:
    """For each model: residuals over a plain pass, the whole job, and growth."""
    found = bench.records(folder, "tracing")
    with bench.paper_figure(folder, "tracing", 6.9, 0.4 + 1.6 * len(found)) as figure:
        axes = figure.subplots(len(found), 3, squeeze=False, width_ratios=(1, 1, 0.8))
        for record, (left, middle, right) in zip(found, axes, strict=True):
            for axis, part, field in ((left, "capture", "over_plain"), (middle, "job", "seconds")):
                rows = [{**row, "way": row["way"].replace("probekit, ", "probekit\n")} for row in record.get(part, ())]
                colours = dict(zip([row["way"] for row in rows], sns.color_palette(PALETTE, len(rows)), strict=True))
                bench.bars(axis, rows, field, 1.0, colours)
            if "growth" in record:
                draw_growth(right, record["growth"])
            else:
                right.set_axis_off()
            left.set_title(str(record["model"]))
        axes[-1, 0].set_xlabel("forward pass with all residuals\nover a plain one")
        axes[-1, 1].set_xlabel("prompts to Parquet, seconds")
        axes[-1, 2].set_xlabel("tokens")


def draw_growth(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Seconds and peak memory over tokens, both on logarithmic axes, with the straight line of the smallest."""
    tokens = [row["tokens"] for row in rows]
    seconds = [row["seconds"]["p50"] for row in rows]
    blue, orange = sns.color_palette(PALETTE, 2)
    axis.plot(tokens, [seconds[0] * each / tokens[0] for each in tokens], color="0.7", linewidth=0.8, linestyle="--")
    axis.plot(tokens, seconds, marker="o", color=blue)
    axis.set_ylabel("seconds", color=blue)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(tokens, [f"{each:,}" for each in tokens])
    axis.set_yticks(seconds, [f"{each:.2g}" for each in seconds])
    axis.minorticks_off()
    if rows[0]["extra_bytes"] is not None:
        beside = axis.twinx()
        mib = [row["extra_bytes"]["p50"] / bench.MIB for row in rows]
        beside.plot(tokens, mib, marker="s", color=orange)
        beside.set_ylim(0, 2 * max(mib))
        beside.grid(visible=False)
        beside.set_ylabel("peak memory, MiB", color=orange)


if __name__ == "__main__":
    typer.run(main)
