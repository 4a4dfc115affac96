"""What does batch-invariant verification cost, and what does it save validation from excusing?

    python analyses/price_of_invariance.py tales-layerskip -o docs/results/decoding/invariance-tales-layerskip

Autoregressive decoding, a self-speculative cell and a prefill, plain and batch-invariant, in turns on the bundled
prompts: processor time of the invariant way over that of the plain one, prompt by prompt, with 20, 50 and 80 %
quantiles. Beside it a validation of the same cell on a trace of either kind: rounds equal, near-ties, and the share of
positions where a difference would have been excused. In float32 and in bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from time import process_time
from typing import Annotated

import pandas as pd
import typer
from benchmarking import decoding_header, pair_of, prompt_ids, ratios, say, spread, write_record

from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.decoder import Decoder
from probekit.decoding.speculative import SelfSpeculative
from probekit.models.loaded import Loaded, batch_invariant, load
from probekit.tracing.tracer import trace
from probekit.validation.run import validate

DTYPES = ("float32", "bfloat16")


def main(
    model: Annotated[
        str, typer.Argument(help="A bundled name, a folder, a GGUF file or a hub id.")
    ] = "tales-layerskip",
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives OUTPUT.json and .csv.")] = Path(
        "docs/results/decoding/invariance"
    ),
    cell: Annotated[str, typer.Option("--cell", help="Exit layer and draft length.")] = "3,3",
    prompts: Annotated[int, typer.Option("--prompts", min=1)] = 12,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=2)] = 64,
    prefill: Annotated[int, typer.Option("--prefill", min=2, help="Tokens of the prompt that is timed.")] = 128,
) -> None:
    exit_layer, length = pair_of(cell)
    rows = []
    for dtype in DTYPES:
        plain = load(model, device="cpu", dtype=dtype)
        for name, samples in prices(plain, exit_layer, length, prompts, max_new_tokens, prefill).items():
            found = spread(samples) or {}
            say(f"{dtype} {name}: {found['p50']:.2f} ({found['p20']:.2f} to {found['p80']:.2f})")
            rows.append({"dtype": dtype, "what": name, **found})
        for invariant in (False, True):
            rows.append({"dtype": dtype} | checked(plain, invariant, exit_layer, length, prompts, max_new_tokens))
    settings = {"cell": [exit_layer, length], "prompts": prompts, "max_new_tokens": max_new_tokens, "prefill": prefill,
                "clock": "processor time"}  # fmt: skip
    write_record(output, decoding_header("price-of-invariance", plain, settings) | {"rows": rows}, pd.DataFrame(rows))


def prices(
    plain: Loaded, exit_layer: int, length: int, prompts: int, max_new_tokens: int, prefill: int
) -> dict[str, list[float]]:
    """Processor time of the invariant way over the plain one, prompt by prompt, each at the least of two turns."""
    kinds = [plain, batch_invariant(plain)]
    texts = prompt_ids(plain, prompts)
    long = [(ids * prefill)[:prefill] for ids in texts]
    ways: dict[str, tuple[list[Decoder], list[list[int]], int]] = {
        "autoregressive": ([Autoregressive(kind) for kind in kinds], texts, max_new_tokens),
        "self-speculative": ([SelfSpeculative(kind, exit_layer, length) for kind in kinds], texts, max_new_tokens),
        "prefill": ([Autoregressive(kind) for kind in kinds], long, 1),
    }
    found = {}
    for name, (methods, given, budget) in ways.items():
        for method in methods:  # to warm up
            method.decode(given[:1], max_new_tokens=budget)
        seconds: list[list[float]] = [[], []]
        for place, ids in enumerate(given):
            taken: list[list[float]] = [[], []]
            for which in (0, 1, 1, 0) if place % 2 else (1, 0, 0, 1):  # what comes first finds the caches cold
                began = process_time()
                methods[which].decode([ids], max_new_tokens=budget)
                taken[which].append(process_time() - began)
            for which in (0, 1):
                seconds[which].append(min(taken[which]))
        found[name] = ratios(seconds[1], seconds[0])
    return found


def checked(
    plain: Loaded, invariant: bool, exit_layer: int, length: int, prompts: int, max_new_tokens: int
) -> dict[str, object]:
    """A validation of the cell on a trace of one kind."""
    run = trace(plain, prompt_ids(plain, prompts), max_new_tokens=max_new_tokens, batch_invariant=invariant)
    [one] = validate(plain, run, [(exit_layer, length)]).cells
    return {
        "what": f"validation, {'batch-invariant' if invariant else 'plain'}",
        "rounds": one.predicted["rounds"], "rounds_equal": one.rounds_equal, "tokens_equal": one.tokens_equal,
        "near_ties": one.ties, "unexplained": one.unexplained, "excusable_share": one.excusable_share,
        "noise": run.manifest.measured.noise,
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
