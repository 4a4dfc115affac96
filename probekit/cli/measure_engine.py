"""`probekit costs`."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from probekit.cli import options
from probekit.cli.terminal import notice, out, print_json, print_table, progress_bars


def costs(
    model: options.Model,
    engine: Annotated[str, typer.Option("--engine", help="transformers, vllm or llama.cpp.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Receives the profile, which `choose` takes as costs."),
    ] = None,
    engine_path: Annotated[
        Path | None,
        typer.Option("--engine-path", metavar="FILE", help="vLLM's Python, or llama-server. [default: those found]"),
    ] = None,
    engine_options: Annotated[
        str, typer.Option("--engine-options", help="Its own: JSON for vllm.LLM, or arguments of llama-server.")
    ] = "",
    exit_layers: Annotated[
        str | None, typer.Option("--exit-layers", help="Draft models to time. [default: the first and the last exit]")
    ] = None,
    draft_model: options.DraftModel = None,
    draft_lengths: Annotated[str, typer.Option("--draft-lengths", help="Drafts that a pass verifies.")] = "1,2,4,8",
    rows: Annotated[str, typer.Option("--rows", help="Rows in the batch, as 1,4,16 (vLLM).")] = "1",
    contexts: Annotated[str, typer.Option("--contexts", help="Tokens in the cache, as 128,1024.")] = "128",
    sweeps: Annotated[int, typer.Option("--sweeps", help="How often each is timed.")] = 5,
    clock: Annotated[
        str, typer.Option("--clock", help="wall; or processor: of one thread, on a machine that does other things.")
    ] = "wall",
    together: Annotated[
        bool | None,
        typer.Option(
            "--together/--one-by-one", help="All ways of drafting in turns, each in memory. [default: except vllm]"
        ),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", metavar="FILE", help="For llama.cpp: the file that it serves.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What an installed engine's steps take: plain steps, draft steps and verifications, as a file for `choose`."""
    from probekit.files import atomic_text, check_file_target

    if output is not None:
        check_file_target(output, "--output")  # before minutes of timing
    batches, places = options.counts(rows, "--rows"), options.counts(contexts, "--contexts", options.MOST_TOKENS)
    lengths, exits = options.counts(draft_lengths, "--draft-lengths"), options.counts(exit_layers, "--exit-layers")
    from probekit.models.loaded import load  # with torch: after what can be refused without
    from probekit.validation.engine_costs import CostPlan, measure_home
    from probekit.validation.open_engine import EngineHome

    loaded = load(model, device=device, dtype=dtype)
    helper = None if draft_model is None else load(draft_model, device=device, dtype=dtype)
    exits = exits or [1, loaded.depth - 1]
    for exit_layer in exits:
        loaded.anatomy.check_exit(exit_layer)
    together = engine != "vllm" if together is None else together
    plan = CostPlan(
        tuple(exits),
        tuple(lengths or ()),
        tuple(batches or ()),
        tuple(places or ()),
        sweeps,
        clock,
        together,
        drafter=None if helper is None else helper.name,
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bars = stack.enter_context(progress_bars(quiet or as_json))
        home = EngineHome(
            engine, loaded, folder, engine_path, gguf, options=engine_options, longest=plan.longest_text,
            rows=plan.rows[-1], helper=helper,
        )  # fmt: skip
        profile = measure_home(home, plan, progress=bars)
    if output is not None:
        atomic_text(output, json.dumps(profile.to_json(), indent=1) + "\n")
    if as_json:
        print_json(profile.to_json())
        return
    print_table(
        f"{profile.engine}, {profile.device}, {profile.dtype}",
        ["step", "drafts", "tokens", "rows", "context", "ms"],
        [
            [step.step, step.exit_layer or step.drafter, step.tokens, step.rows, step.context, 1000 * step.seconds]
            for step in profile.steps
        ],
        "Of the whole batch. first: what the first draft of a round takes longer. verify: a pass over so many tokens a "
        "row.",
    )
    error = profile.details["largest_error"]
    if error is not None:
        notice(f"The texts that were timed took what these steps say to within {100 * error:.1f} %.", quiet=quiet)
    if output is not None:
        out.print(f"{output}: probekit choose RUN --costs {output}", markup=False, highlight=False)
