"""`probekit study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.config import config_text, read_config
from probekit.cli.signals import keeping
from probekit.cli.terminal import err, out, print_json, print_table, progress_bars


def study(
    context: typer.Context,
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="[default: the bundled models]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the study.")] = Path("study"),
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 96,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    exit_layers: options.ExitLayers = None,
    draft_lengths: options.DraftLengths = None,
    draft_model: options.DraftModel = None,
    draft_rows: options.DraftRows = None,
    fit_heads: Annotated[
        bool, typer.Option("--fit-heads", help="Fit exit heads on the model's own text, and draft through them.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    probes: Annotated[
        bool, typer.Option("--probes", help="Keep residuals, and probe them for what the lens does not say.")
    ] = False,
    step_context: Annotated[
        int, typer.Option("--context", help="Tokens in the cache when a step is timed.")
    ] = 128,
    batch_size: options.BatchSize = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Write each model's choice for use in transformers.")
    ] = None,
    log_to: Annotated[
        str | None, typer.Option("--log-to", metavar="TRACKER", help="Log settings and figures to wandb or mlflow.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", is_eager=True, callback=read_config,
            help="TOML with options by their long names; the command line comes before it.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as TOML for --config, and do nothing.")
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Say what it will take (time, memory, disk), and do nothing.")
    ] = False,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """The main job: trace, predict, choose on the even prompts, validate on the odd ones, report."""
    from probekit.settings import Sampling

    options.at_least_one(max_new_tokens, "--max-new-tokens")
    options.at_least_one(step_context, "--context")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    exits = options.integers(exit_layers, "--exit-layers")
    lengths = options.integers(draft_lengths, "--draft-lengths") or range(1, 9)
    if print_config:
        out.print(config_text(context), markup=False, soft_wrap=True, end="")
        return

    from probekit.engines.export import check_export
    from probekit.study.estimate import estimate_study
    from probekit.study.log_to import check_tracker, log_study
    from probekit.study.plan import plan_study, study_settings
    from probekit.study.run import run_study

    if log_to is not None:
        check_tracker(log_to)
    if export is not None:
        check_export(export, several=True)
    if plan_only:
        settings = study_settings(
            models, prompts=prompts, max_new_tokens=max_new_tokens, draft_lengths=lengths, draft_model=draft_model,
            draft_rows=draft_rows, fit_heads=fit_heads, chat=chat, device=device, dtype=dtype, sampling=sampling,
            context=step_context, exit_layers=exits, batch_size=batch_size, adapter=adapter,
            probes=probes,
        )  # fmt: skip
        with progress_bars(quiet or as_json) as bars:
            estimates = estimate_study(plan_study(settings, output), bars)
        _print_plan([each.to_json() for each in estimates], as_json)
        return
    with keeping(lambda: f"Finished steps are kept in {output}."), progress_bars(quiet or as_json) as bars:
        result = run_study(
            models or None,
            output,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            exit_layers=exits,
            draft_lengths=lengths,
            context=step_context,
            batch_size=batch_size,
            draft_model=draft_model,
            draft_rows=draft_rows,
            fit_heads=fit_heads,
            chat=chat,
            adapter=adapter,
            probes=probes,
            device=device,
            dtype=dtype,
            progress=bars,
        )
    if export is not None:
        _export(result, export)
    if log_to is not None:
        log_study(log_to, output, result.summary)
    if as_json:
        print_json(result.summary)
        return
    _print_study(result.summary, output, quiet)


def _print_plan(estimates: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"schema": "probekit/plan/1", "models": estimates, "total_s": sum(e["total_s"] for e in estimates)})
        return
    minutes = sum(each["total_s"] for each in estimates) / 60
    rows = [
        [f"{phase}, s", *(round(each["seconds"][phase]) for each in estimates)] for phase in estimates[0]["seconds"]
    ]
    rows += [
        ["prompts", *(each["prompts"] for each in estimates)],
        ["all, s", *(round(each["total_s"]) for each in estimates)],
        ["memory, GB", *(_gigabytes(each["memory_bytes"]) for each in estimates)],
        ["free, GB", *(_gigabytes(each["memory_free"]) for each in estimates)],
        ["disk, MB", *(round(each["disk_bytes"] / 1e6) for each in estimates)],
    ]
    print_table(
        f"what this study will take: about {minutes:.1f} minutes",
        ["", *(each["model"] for each in estimates)],
        rows,
        "measured on two prompts of each model, and multiplied. Nothing was written.",
    )


def _gigabytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e9:.1f}"


def _export(result: Any, folder: Path) -> None:
    """One folder a model."""
    from probekit.engines.export import export_choice
    from probekit.engines.pretrained import pretrained_of

    for model in result.models:
        export_choice(model.choice, folder / model.name, pretrained_of(model.trace))


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
