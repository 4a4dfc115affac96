"""trace, fit-heads, decode, study: the commands that run a model for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.terminal import err, out, print_json, print_table, progress_bars, remark
from probekit.errors import InputError
from probekit.presentation.tokens import shown

if TYPE_CHECKING:
    from probekit.decoding.results import Decoded
    from probekit.models.loading import Loaded


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
    statistics: Annotated[str, typer.Option("--statistics", help="all, or agreement (several times faster).")] = "all",
    keep_residuals: Annotated[
        str | None, typer.Option("--keep-residuals", metavar="LAYERS", help="Write these layers' residuals: 6,12.")
    ] = None,
    draft_model: options.DraftModel = None,
    draft_vocabulary: options.DraftVocabulary = None,
    exit_heads: options.ExitHeads = None,
    backend: Annotated[str, typer.Option("--backend", help="hooks or nnsight.")] = "hooks",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="[default: from the memory at hand]")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue each prompt, read every layer of every token once, and keep the figures."""
    from probekit.decoding.sampling import Sampling
    from probekit.models.loading import load
    from probekit.tracing.prompts import bundled_prompts_for, load_prompts
    from probekit.tracing.tracer import trace as trace_prompts

    options.at_least_one(max_new_tokens, "--max-new-tokens")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    layers = options.integers(keep_residuals, "--keep-residuals") or ()
    given_prompts = load_prompts(prompts, chat=chat, given=given) if prompts else None
    loaded = load(model, device=device, dtype=dtype)
    drafter = load(draft_model, device=device, dtype=dtype) if draft_model else None
    with progress_bars(quiet or as_json) as bars:
        result = trace_prompts(
            loaded,
            given_prompts if given_prompts is not None else bundled_prompts_for(loaded.name),
            output,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            given=given,
            statistics=statistics,
            keep_residuals=layers,
            draft_model=drafter,
            draft_vocabulary=draft_vocabulary,
            exit_heads=exit_heads,
            backend=backend,
            resume=resume,
            chat=chat,
            batch_size=batch_size,
            progress=bars,
        )
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
    remark(
        f"traced {manifest.prompt_count} prompts of {manifest.model.name} into {output}. "
        f"{ties:,} of {bits:,} agreements are near-ties, which a decoder may see either way.",
        quiet=quiet,
    )
    if manifest.savings is not None:
        spared = manifest.savings["products_avoided"]
        remark(f"Witnesses spared {spared:.1%} of the products with the head; the bits are the same.", quiet=quiet)
    remark(f"Next: probekit predict {output}", quiet=quiet)


def fit_heads(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that `probekit trace` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Receives the heads, safetensors.")],
    exit_layers: options.ExitLayers = None,
    ridge: Annotated[float, typer.Option("--ridge", help="Pull towards the plain lens; above 0.")] = 1e-2,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit exit heads on the texts of runs: exit layers that draft through them are accepted more often."""
    import torch

    from probekit.lens.heads import fingerprint, fit_heads, save_heads
    from probekit.models.loading import load
    from probekit.tracing.traces import Trace

    traces = [Trace.open(run) for run in runs]
    record = traces[0].manifest.model
    if other := next((each for each in traces if each.manifest.model.weights_hash != record.weights_hash), None):
        raise InputError(
            f"these runs are of different models: {record.name} and {other.manifest.model.name}.",
            "Fit the heads of each model on its own runs.",
        )
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"{output} is no file that can be written: expected a file name in a folder that exists.")
    layers = options.integers(exit_layers, "--exit-layers")
    loaded = load(record.reference, device=device or traces[0].manifest.device, dtype=dtype or traces[0].manifest.dtype)
    texts = [[*each.prompt_ids(prompt), *each.outputs(prompt)] for each in traces for prompt in each.prompts]
    with progress_bars(quiet or as_json) as bars:
        batches = _counted((torch.tensor([text]) for text in texts), len(texts), "reading texts", bars)
        heads = fit_heads(loaded.anatomy, batches, layers, ridge=ridge)
    save_heads(output, heads)
    tokens = sum(map(len, texts))
    if as_json:
        print_json(
            {
                "schema": "probekit/fit-heads/1",
                "model": record.name,
                "output": str(output),
                "exit_layers": list(heads),
                "fingerprint": fingerprint(heads),
                "runs": [str(run) for run in runs],
                "texts": len(texts),
                "tokens": tokens,
                "ridge": ridge,
            }
        )
        return
    exits = len(heads)
    remark(f"fitted heads for {exits} exit layers of {record.name} on {tokens:,} tokens into {output}.", quiet=quiet)
    remark(f"Next: probekit trace {record.reference} --exit-heads {output} -o RUN, on other prompts.", quiet=quiet)


def _counted(items: Iterable[Any], total: int, phase: str, progress: Callable[..., None]) -> Iterator[Any]:
    """The same items, each reported when it has been used."""
    for done, item in enumerate(items, 1):
        yield item
        progress(phase, done, total)


def decode(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on with.")],
    method: Annotated[
        str, typer.Option("--method", help="autoregressive, self-speculative, speculative or early-exit.")
    ] = "autoregressive",
    exit_layer: Annotated[int | None, typer.Option("--exit-layer", help="Layer that drafts, 1..L-1.")] = None,
    draft_length: Annotated[int | None, typer.Option("--draft-length", help="Tokens drafted in a round.")] = None,
    draft_model: options.DraftModel = None,
    draft_vocabulary: options.DraftVocabulary = None,
    draft_rows: options.DraftRows = None,
    exit_heads: options.ExitHeads = None,
    max_new_tokens: options.MaxNewTokens = 96,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop at this text; may be repeated.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Decode one prompt; accepted drafts are marked as they stream."""
    from probekit.decoding.decode import decode as decode_prompt
    from probekit.decoding.sampling import Sampling
    from probekit.models.loading import load

    options.at_least_one(max_new_tokens, "--max-new-tokens")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if (draft_vocabulary is None) != (draft_rows is None):
        raise InputError("--draft-vocabulary and --draft-rows belong together: an order of tokens, and how many.")
    loaded = load(model, device=device, dtype=dtype)
    drafter = load(draft_model, device=device, dtype=dtype) if draft_model else None
    decoded = decode_prompt(
        loaded,
        prompt,
        method=method,
        exit_layer=exit_layer,
        draft_length=draft_length,
        draft_model=drafter,
        draft_vocabulary=None if draft_rows is None else _kept(draft_vocabulary, draft_rows, loaded),
        exit_heads=exit_heads,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=tuple(stop or ()),
        on_accept=None if as_json else _stream,
    )
    if as_json:
        print_json({"schema": "probekit/decode/1", **decoded.to_json()})
        return
    out.print()
    marked = " (underlined)" if out.is_terminal else ""
    remark(_figures(decoded, marked), quiet=quiet)


def _kept(run: Path | None, rows: int, loaded: Loaded) -> list[int]:
    """The most frequent tokens of a run: those that a draft head of so many rows keeps."""
    from probekit.tracing.draft_vocabulary import check_draft_rows
    from probekit.tracing.traces import Trace

    assert run is not None
    order = Trace.open(run).frequent_tokens().fit(loaded.anatomy.vocabulary).order(loaded.anatomy.vocabulary)
    return order[: check_draft_rows(rows, len(order))].tolist()


def _figures(decoded: Decoded, marked: str = "") -> str:
    """One line: how much, how fast, and how many drafts were accepted, and how they are marked."""
    seconds = decoded.seconds["total"] - decoded.seconds["prefill"]
    line = f"{len(decoded.tokens)} tokens, ended by {decoded.ended}"
    if decoded.emitted and seconds > 0:
        line += f", {decoded.emitted / seconds:.1f} tokens/s after the prefill"
    if sum(decoded.drafted):
        line += (
            f"; {decoded.rounds} rounds, {sum(decoded.accepted)} of {sum(decoded.drafted)} drafts accepted{marked} "
            f"({decoded.acceptance_rate:.0%}), {decoded.tokens_per_round:.2f} tokens per round"
        )
    return line + ("" if decoded.lossless else "; LOSSY: nothing was verified")


def _stream(text: str, how: str) -> None:
    """Accepted drafts underlined, what verification adds plain; a file gets the text as it is."""
    if not out.is_terminal:
        out.file.write(text)
        out.file.flush()
        return
    # A model may say anything, but what it says must not steer the terminal.
    harmless = "".join(sign if sign in "\n\t" or sign.isprintable() else shown(sign) for sign in text)
    out.print(Text(harmless, style="underline green" if how == "accepted" else ""), end="", soft_wrap=True)


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
    from probekit.study import run_study

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
