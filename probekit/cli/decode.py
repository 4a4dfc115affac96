"""`probekit decode`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.terminal import notice, out, print_json, warnings_as_notices
from probekit.errors import InputError
from probekit.presentation.tokens import shown

if TYPE_CHECKING:
    from probekit.decoding.results import Decoded
    from probekit.models.loaded import Loaded


def decode(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on with.")],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="autoregressive, self-speculative, speculative or early-exit. [default: as the other options say]",
        ),
    ] = None,
    exit_layer: Annotated[int | None, typer.Option("--exit-layer", help="Layer that drafts, 1..L-1.")] = None,
    draft_length: Annotated[int | None, typer.Option("--draft-length", help="Tokens drafted in a round.")] = None,
    drafter: Annotated[
        str | None,
        typer.Option("--drafter", help="Who drafts, if no exit or model: ngram:N, suffix; or tree:2x1 from the exit."),
    ] = None,
    draft_model: options.DraftModel = None,
    draft_vocabulary: options.DraftVocabulary = None,
    draft_rows: options.DraftRows = None,
    policy: options.Policy = "fixed",
    exit_heads: options.ExitHeads = None,
    max_new_tokens: options.MaxNewTokens = 96,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop at this text; may be repeated.")] = None,
    adapter: options.Adapter = None,
    engine: options.Engine = "host",
    batch_invariant: options.BatchInvariant = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Decode one prompt; accepted drafts are marked as they stream."""
    from probekit.decoding.decode import decode as decode_prompt
    from probekit.drafting.policies import policy_named
    from probekit.models.loaded import load
    from probekit.ranks import Ranks
    from probekit.settings import Sampling

    options.at_least_one(max_new_tokens, "--max-new-tokens")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if (draft_vocabulary is None) != (draft_rows is None):
        raise InputError("--draft-vocabulary and --draft-rows belong together: an order of tokens, and how many.")
    loaded = load(model, adapter=adapter, device=device, dtype=dtype)
    second = load(draft_model, device=device, dtype=dtype) if draft_model else None
    silent = not Ranks.of_environment().first  # processes that share a model decode in step; the first one speaks
    with warnings_as_notices(quiet or as_json or silent):
        decoded = decode_prompt(
            loaded,
            prompt,
            method=method,
            exit_layer=exit_layer,
            draft_length=draft_length,
            drafter=drafter,
            draft_model=second,
            draft_vocabulary=None
            if draft_rows is None or draft_vocabulary is None
            else _kept(draft_vocabulary, draft_rows, loaded),
            exit_heads=exit_heads,
            policy=None if policy == "fixed" else policy_named(policy),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=tuple(stop or ()),
            on_accept=None if as_json or silent else _stream,
            engine=engine,
            batch_invariant=batch_invariant,
        )
    if silent:
        return
    if as_json:
        print_json({"schema": "probekit/decode/1", **decoded.to_json()})
        return
    out.print()
    marked = " (underlined)" if out.is_terminal else ""
    notice(_figures(decoded, marked), quiet=quiet)


def _kept(run: Path, rows: int, loaded: Loaded) -> list[int]:
    """The most frequent tokens of a run: those that a draft head of so many rows keeps."""
    from probekit.traces.draft_vocabulary import check_draft_rows
    from probekit.traces.trace import Trace

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
    # What a model writes is data: it must not control the terminal.
    harmless = "".join(sign if sign in "\n\t" or sign.isprintable() else shown(sign) for sign in text)
    out.print(Text(harmless, style="underline green" if how == "accepted" else ""), end="", soft_wrap=True)
