"""`probekit trace`."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probekit.cli import options
from probekit.cli.signals import keeping
from probekit.cli.terminal import notice, print_json, progress_bars, say_remarks
from probekit.cli.trace_plan import say_described, say_plan
from probekit.errors import InputError

if TYPE_CHECKING:
    from probekit.settings import KeptResiduals
    from probekit.traces.manifest import Manifest

HELD_BYTES = 32 * 2**20  # of a file of prompts that is read at once


def trace(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")],
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 96,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    given: Annotated[bool, typer.Option("--given", help="Score the given text instead of generating one.")] = False,
    from_logprobs: Annotated[
        Path | None,
        typer.Option("--from-logprobs", metavar="FILE", help="An engine's log of token ids: the model's text."),
    ] = None,
    statistics: Annotated[str, typer.Option("--statistics", help="all, or agreement (several times faster).")] = "all",
    keep_residuals: Annotated[
        str | None,
        typer.Option("--keep-residuals", metavar="LAYERS", help="Write these layers' residuals: 6,12, or all."),
    ] = None,
    residual_dtype: Annotated[
        str | None, typer.Option("--residual-dtype", help="float32, bfloat16 or float16. [default: as computed]")
    ] = None,
    residual_rows: Annotated[
        str, typer.Option("--residual-rows", help="all, or scored: only rows that predict a continuation's token.")
    ] = "all",
    residual_share: Annotated[
        float, typer.Option("--residual-share", help="Keep so many of those rows, drawn by the seed.")
    ] = 1.0,
    draft_model: options.DraftModel = None,
    draft_vocabulary: options.DraftVocabulary = None,
    exit_heads: options.ExitHeads = None,
    backend: Annotated[
        str, typer.Option("--backend", help="hooks, nnsight, or nnsight:ndif, where a service runs the model.")
    ] = "hooks",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave out prompts that do not fit into the context.")
    ] = False,
    batch_size: options.BatchSize = None,
    batch_invariant: options.BatchInvariant = False,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Say what it will take (time, memory, disk), and do nothing.")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", metavar="DEVICES", help="With --plan, on devices elsewhere: h200x8; h200x8/4: split by 4."
        ),
    ] = None,
    processes: Annotated[int, typer.Option("--processes", help="With --plan, how many share the run.")] = 1,
    prompt_count: Annotated[
        int | None, typer.Option("--prompt-count", help="With --plan, as if there were so many prompts like these.")
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens",
            help="With --plan --on, prompts of so many tokens, of a MODEL that is only described: a config.json, or "
            "llama:layers=80,width=8192,...",
        ),
    ] = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue each prompt, read every layer of every token once, and keep the figures."""
    from probekit.files import check_unlocked
    from probekit.models.device_map import is_splitting
    from probekit.models.loaded import Loaded, load
    from probekit.ranks import Ranks, joined
    from probekit.settings import Sampling, TraceSettings
    from probekit.traces.storage import check_run_target
    from probekit.tracing.plan import plan_trace
    from probekit.tracing.prompts import Prompt, bundled_prompts_for, load_log, load_prompts, stream_prompts
    from probekit.tracing.tracer import trace as trace_prompts

    options.at_least_one(max_new_tokens, "--max-new-tokens")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if statistics == "agreement" and (given or not sampling.greedy):
        raise InputError(
            "a run of agreement only answers for greedy text, and this one would be "
            f"{'given' if given else 'sampled'}: `probekit predict` could not read it.",
            "Leave out --statistics agreement.",
        )
    if not plan_only and (on, processes, prompt_count, prompt_tokens) != (None, 1, None, None):
        raise InputError("--on, --processes, --prompt-count and --prompt-tokens describe a plan.", "Add --plan.")
    options.at_least_one(processes, "--processes")
    options.at_least_one(1 if prompt_count is None else prompt_count, "--prompt-count")
    if prompt_tokens is not None:
        options.at_least_one(prompt_tokens, "--prompt-tokens")
        if on is None or prompts or from_logprobs:
            raise InputError(
                "--prompt-tokens describes prompts that are not at hand, for devices that are not.",
                "Name the devices (--on h200x8), and no prompts.",
            )
        if Ranks.of_environment().first:
            say_described(
                model, on, prompts=prompt_count or 1, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens,
                batch_size=batch_size, statistics=statistics, given=given, dtype=dtype, as_json=as_json,
            )  # fmt: skip
        return
    kept = kept_of_options(keep_residuals, residual_dtype, residual_rows, residual_share)
    if from_logprobs and prompts:
        raise InputError("--prompts and --from-logprobs both name the prompts.", "Give one of the two.")

    def read_inputs() -> tuple[Iterable[Prompt] | None, Loaded, Loaded | None]:
        if ranks.first:
            check_unlocked(output)
            check_run_target(output, resume=resume)
        given_prompts: Iterable[Prompt] | None = None
        if prompts:
            read = stream_prompts if _is_large(prompts) else load_prompts  # what is small is checked before the model
            given_prompts = read(prompts, chat=chat, given=given)
        if from_logprobs:
            given_prompts = load_log(from_logprobs)
        place = ranks.device(device)
        loaded = load(model, adapter=adapter, device=place, dtype=dtype)
        return given_prompts, loaded, load(draft_model, device=place, dtype=dtype) if draft_model else None

    with joined(replace(Ranks.of_environment(), in_step=is_splitting())) as ranks:
        quiet = quiet or not ranks.first
        given_prompts, loaded, drafter = ranks.agreed(read_inputs)
        chosen = given_prompts if given_prompts is not None else bundled_prompts_for(loaded.name)
        if plan_only and ranks.first:
            settings = TraceSettings(
                max_new_tokens=max_new_tokens, sampling=sampling, given=given, statistics=statistics,
                keep_residuals=kept, backend=backend, chat=chat, batch_size=batch_size, skip_long=skip_long,
                logged=from_logprobs is not None, batch_invariant=batch_invariant,
            )  # fmt: skip
            plan = plan_trace(
                loaded, chosen, settings, draft_model=drafter, draft_vocabulary=draft_vocabulary, exit_heads=exit_heads
            )
            say_plan(plan, on=on, processes=processes, prompts=prompt_count, batch_size=batch_size, as_json=as_json)
        if plan_only:
            return
        with keeping(lambda: kept_of(output), again=("--resume",)), progress_bars(quiet or as_json) as bars:
            result = trace_prompts(
                loaded,
                chosen,
                output,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                given=given,
                statistics=statistics,
                keep_residuals=kept,
                draft_model=drafter,
                draft_vocabulary=draft_vocabulary,
                exit_heads=exit_heads,
                backend=backend,
                resume=resume,
                chat=chat,
                batch_size=batch_size,
                skip_long=skip_long,
                logged=from_logprobs is not None,
                batch_invariant=batch_invariant,
                ranks=ranks,
                progress=bars,
            )
    if not ranks.first:
        return
    if loaded.remark:
        notice(loaded.remark, quiet=quiet)
    manifest = result.manifest
    ties, bits = result.near_tie_count()
    if as_json:
        print_json(
            {
                "schema": "probekit/trace/1",
                "run": str(output),
                "near_ties": {"near_ties": ties, "of": bits},
                "manifest": manifest.to_json(),
            }
        )
        return
    say_remarks(manifest, quiet)
    if from_logprobs:
        notice(_of_log(manifest), quiet=quiet)
    asked = len(given_prompts) if isinstance(given_prompts, Sized) else manifest.prompt_count
    if asked > manifest.prompt_count:
        notice(f"left out {asked - manifest.prompt_count} of {asked} prompts, which are too long.", quiet=quiet)
    notice(
        f"traced {manifest.prompt_count} prompts of {manifest.model.name} into {output}. "
        f"{ties:,} of {bits:,} agreements are near-ties, which a decoder may see either way.",
        quiet=quiet,
    )
    if manifest.measured.savings is not None:
        spared = manifest.measured.savings["products_avoided"]
        notice(f"Witnesses spared {spared:.1%} of the products with the head; the bits are the same.", quiet=quiet)
    notice(f"Next: probekit predict {output}", quiet=quiet)


def _of_log(manifest: Manifest) -> str:
    """How much of a log's text is this model's own, as it was loaded here."""
    tokens, unlike = (sum(int(each[name]) for each in manifest.measured.logged) for name in ("tokens", "unlike"))
    if not unlike:
        return f"All {tokens:,} tokens of the log are this model's own."
    furthest = max(each["largest_gap"] for each in manifest.measured.logged)
    return (
        f"{unlike:,} of {tokens:,} tokens of the log are not this model's own here (the furthest lies {furthest:.3g} "
        "logits below it): rounds that meet them can differ, and predictions are not called exact."
    )


def kept_of_options(layers: str | None, dtype: str | None, rows: str, share: float) -> KeptResiduals:
    """Which residuals to keep."""
    from probekit.settings import KeptResiduals

    if layers is None:
        if (dtype, rows, share) != (None, "all", 1.0):
            raise InputError("these options say how residuals are kept, and none are.", "Name --keep-residuals LAYERS.")
        return KeptResiduals()
    sites = None if layers.strip() == "all" else tuple(options.integers(layers, "--keep-residuals") or ())
    return KeptResiduals(sites, dtype, rows, share)


def _is_large(path: Path) -> bool:
    """Whether prompts are read one after the other: more than so many bytes of them."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file()) > HELD_BYTES


def kept_of(folder: Path) -> str:
    """What of a run is on disk, as a sentence; empty where nothing is."""
    from probekit.errors import ProbekitError
    from probekit.traces.manifest import read_manifest
    from probekit.traces.storage import is_done

    try:
        manifest = read_manifest(folder)
    except ProbekitError:
        return ""
    parts = range(len(manifest.plan.batches))
    done = sum(len(manifest.plan.batches[part]) for part in parts if is_done(folder, manifest, part))
    return f"{done} of {manifest.prompt_count} prompts are kept in {folder}."
