"""`probekit study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.terminal import err, out, print_json, print_table, progress_bars


def study(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="[default: the bundled models]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the study.")] = Path("study"),
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 96,
    draft_lengths: options.DraftLengths = None,
    draft_model: options.DraftModel = None,
    draft_rows: options.DraftRows = None,
    fit_heads: Annotated[
        bool, typer.Option("--fit-heads", help="Fit exit heads on the model's own text, and draft through them.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The main job: trace, predict, choose on the even prompts, validate on the odd ones, report."""
    from probekit.study.run import run_study

    options.at_least_one(max_new_tokens, "--max-new-tokens")
    with progress_bars(quiet or as_json) as bars:
        result = run_study(
            models or None,
            output,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            draft_lengths=options.integers(draft_lengths, "--draft-lengths") or range(1, 9),
            draft_model=draft_model,
            draft_rows=draft_rows,
            fit_heads=fit_heads,
            chat=chat,
            device=device,
            dtype=dtype,
            progress=bars,
        )
    if as_json:
        print_json(result.summary)
        return
    _print_study(result.summary, output, quiet)


def _print_study(summary: dict[str, Any], folder: Path, quiet: bool) -> None:
    rows = []
    for model in summary["models"]:
        choice, chosen = model["choice"], model["chosen_validation"]
        rows.append(
            [
                model["name"],
                choice["exit_layer"],
                choice["draft_length"],
                choice["speedup"],
                choice["interval"],
                chosen["speedup_measured"] if chosen else None,
                model["timings"]["generation_s"],
                model["timings"]["agreement_trace_s"],
            ]
        )
    print_table(
        "which layer should draft, and how many tokens",
        ["model", "exit layer", "draft length", "speedup predicted", "95 %", "measured", "text, s", "its trace, s"],
        rows,
        "chosen on the even prompts; measured on the odd ones. text: time to generate a few texts, one prompt at a "
        "time; its trace: time to read them (agreement only) and to tabulate every exit and draft length.",
    )
    for model in summary["models"]:
        out.print(Text(model["sentence"]))
    if not quiet:
        took = summary["seconds"]["total"]
        err.print(f"\nreport: {folder / 'report.html'}   figures: {folder / 'figures'}   {took:.0f} s", markup=False)
