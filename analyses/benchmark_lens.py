"""How fast is the lens, every layer at every token, and in how much memory? probekit against its peers.

    python analyses/benchmark_lens.py                                     # the bundled models
    python analyses/benchmark_lens.py --models path/to/model.gguf --tokens 2048 --repeats 3

Each way starts from token ids and ends with what its lens says of every layer: the peers with the argmax alone,
probekit with all statistics, and with agreement alone. A second run adds turns to the record of the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import benchmarking as bench
import peers
import seaborn as sns
import torch
import typer
from torch import Tensor

from probekit.lens.agreement import AgreementSearch
from probekit.lens.chunked import StatisticsPlan, layer_statistics
from probekit.models.loaded import Loaded
from probekit.presentation.plots.style import PALETTE
from probekit.tracing.backend import HooksBackend

ALL, AGREEMENT = "probekit, all statistics", "probekit, agreement"
WARM_UP = 16  # places of each text, for what is made once
PANELS = (
    ("seconds", 1.0, "seconds for {tokens:,} tokens on {device}"),
    ("extra_bytes", 1 / bench.MIB, "peak memory beyond the model, MiB"),
)


def main(
    models: bench.Models = "",
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens to read.")] = 2048,
    device: bench.Device = "cpu",
    repeats: bench.Repeats = 3,
    output: bench.Output = bench.RESULTS,
    memory: Annotated[bool, typer.Option(help="Also measure peaks, in fresh processes.")] = True,
    alone: Annotated[str, typer.Option(hidden=True, help="Run one way once and print its peak.")] = "",
) -> None:
    for reference in bench.references(models):
        loaded = bench.opened(reference, device)
        ids = bench.packed_text(loaded, tokens)
        if alone:
            typer.echo(json.dumps({"extra_bytes": peak(way(loaded, alone), ids, device)}))
            continue
        bench.say(f"{loaded.name}: {ids.numel()} tokens, {loaded.depth + 1} layers")
        settings = {"tokens": ids.numel(), "texts": len(ids), "text": bench.fingerprint(ids), "lens": "final-norm"}
        head = bench.header("lens", loaded, settings)
        path = bench.record_path(output, "lens", loaded)
        kept = bench.kept_samples(path, head)
        ways = {name: way(loaded, name) for name in [ALL, AGREEMENT, *peers.installed()]}
        equal = same_agreement(ways, ids)  # warms up, too
        before = kept.get("seconds")
        runs = {name: partial(run, ids) for name, run in ways.items()}
        seconds = bench.extended(before, bench.turns(runs, repeats, device, before))
        extra = kept.get("extra_bytes", {})
        if memory:
            again = ("--models", reference, "--tokens", tokens, "--device", device, "--alone")
            extra = bench.extended(
                extra, {name: [bench.in_fresh_process(__file__, *again, name)["extra_bytes"]] for name in ways}
            )
        bench.write(path, {**head, **judged(seconds, extra, ids.numel()), "equal_agreement": equal})
    if not alone:
        draw(output)


def way(loaded: Loaded, name: str) -> Any:
    """ids (texts, places) -> agreement with the last layer, (layers + 1, texts x places)."""
    if name in (ALL, AGREEMENT):
        return partial(probekit_lens, loaded, mode="all" if name == ALL else "agreement")
    return partial(peer_lens, peers.PEERS[name](loaded))


@torch.inference_mode()
def probekit_lens(loaded: Loaded, ids: Tensor, mode: str) -> Tensor:
    """As a trace reads batches: a text in each, so that few residuals are held; for agreement, which pools rows, all.

    The witnesses start with nothing learned.
    """
    parts, plan = loaded.anatomy, StatisticsPlan(lenses=("final-norm",), mode=mode)  # type: ignore[arg-type]
    witnesses = AgreementSearch(parts) if mode == "agreement" else None
    found = []
    with HooksBackend(loaded) as source:
        for batch in ids.split(1 if mode == "all" else len(ids)):
            reading = source.read({"input_ids": batch, "use_cache": False}, torch.ones_like(batch, dtype=torch.bool))
            inputs, following = batch.flatten(), batch.roll(-1, 1).flatten()
            agrees = layer_statistics(parts, reading.residuals, inputs, following, plan, witnesses=witnesses)["agrees"]
            found.append(agrees[0])
    return torch.cat(found, 1)


@torch.inference_mode()
def peer_lens(peer: peers.Peer, ids: Tensor) -> Tensor:
    argmax = peer.argmax(ids).flatten(1)
    return argmax == argmax[-1]


def same_agreement(ways: Mapping[str, Any], ids: Tensor) -> dict[str, float]:
    """Share of (layer, token) bits that each way has in common with transformers', on the first text."""
    found = {name: run(ids[:1]) for name, run in ways.items()}
    return {name: float((bits == found["transformers"]).float().mean()) for name, bits in found.items()}


def peak(run: Any, ids: Tensor, device: str) -> int | None:
    run(ids[:, :WARM_UP])
    with bench.extra_memory(device) as extra:
        run(ids)
    return extra()


def judged(seconds: Mapping[str, Sequence[float]], extra: Mapping[str, Sequence[int]], tokens: int) -> dict[str, Any]:
    """Quantiles of each way, and the targets: against the peer whose median is the lowest."""
    rows = [
        {
            "way": name,
            "seconds": bench.spread(each),
            "tokens_per_s": bench.spread([tokens / second for second in each]),
            "extra_bytes": bench.spread(extra.get(name, ())),
        }
        for name, each in seconds.items()
    ]
    others = {row["way"]: row["seconds"]["p50"] for row in rows if row["way"] in peers.PEERS and row["seconds"]}
    fastest = min(others, key=lambda name: others[name])
    targets = [
        bench.target("agreement only, times as fast as the fastest peer's argmax",
                     bench.ratios(seconds[fastest], seconds[AGREEMENT]), at_least=3.0),
        bench.target("all statistics, time over that of the fastest peer's argmax",
                     bench.ratios(seconds[ALL], seconds[fastest]), at_most=1.5),
    ]  # fmt: skip
    if extra and all((*extra[ALL], *extra[fastest])):  # counted, and more than nothing
        targets.append(bench.target("all statistics, extra memory over that of the fastest peer's argmax",
                                    bench.ratios(extra[ALL], extra[fastest]), at_most=0.5))  # fmt: skip
    return {
        "fastest_peer": fastest,
        "rows": rows,
        "targets": targets,
        "samples": {"seconds": dict(seconds), "extra_bytes": dict(extra)},
    }


def draw(folder: Path) -> None:
    """Seconds of each way, and its extra memory where that was measured, for each model."""
    panels = [
        (record, field, scale, label)
        for record in bench.records(folder, "lens")
        for field, scale, label in PANELS
        if any(row[field] for row in record["rows"])
    ]
    lines = math.ceil(len(panels) / 2)
    with bench.paper_figure(folder, "lens", 6.9, 1.6 * lines) as figure:
        axes = figure.subplots(lines, 2, squeeze=False).ravel()
        for (record, field, scale, label), axis in zip(panels, axes, strict=False):
            rows = [{**row, "way": labelled(row["way"])} for row in record["rows"]]
            colours = {row["way"]: colour for row, colour in zip(rows, sns.color_palette(PALETTE), strict=False)}
            bench.bars(axis, rows, field, scale, colours)
            axis.set_title(record["model"])
            tokens, device = record["settings"]["tokens"], record["machine"]["device"].upper()
            axis.set_xlabel(label.format(tokens=tokens, device=device))
        for axis in axes[len(panels) :]:
            axis.set_axis_off()


def labelled(name: str) -> str:
    return f"{name}, argmax" if name in peers.PEERS else name


if __name__ == "__main__":
    typer.run(main)
