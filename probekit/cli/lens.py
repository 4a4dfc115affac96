"""`probekit lens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from probekit.cli import options
from probekit.cli.terminal import notice, out, print_json, progress_bars, say_remarks
from probekit.presentation.tokens import clipped, columns, shown


def lens(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on with.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Tokens that the model goes on with; 0 reads the prompt alone.")
    ] = 12,
    raw: Annotated[bool, typer.Option("--raw", help="head(h), without the final norm.")] = False,
    attribution: Annotated[
        bool, typer.Option("--attribution", help="Also: which layer's attention and MLP wrote the model's token.")
    ] = False,
    exit_heads: options.ExitHeads = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the table as a self-contained page.")] = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The table of top tokens, layer by position."""
    from probekit.files import check_file_target
    from probekit.models.loaded import load
    from probekit.presentation.tables import lens_table
    from probekit.tracing.prompts import Prompt
    from probekit.tracing.tracer import trace as trace_prompts

    options.at_least(0, max_new_tokens, "--max-new-tokens")
    if html is not None:
        check_file_target(html, "--html")
    loaded = load(model, adapter=adapter, device=device, dtype=dtype)
    with progress_bars(quiet or as_json) as bars:
        # The row of a prompt's last token says the first new one: a budget of 1 reads the prompt alone.
        budget = max(1, max_new_tokens)
        trace = trace_prompts(
            loaded, [Prompt(0, prompt)], max_new_tokens=budget, top_prompts=1, exit_heads=exit_heads, progress=bars
        )
    say_remarks(trace.manifest, quiet)
    if loaded.remark:
        notice(loaded.remark, quiet=quiet)
    table = lens_table(trace, 0, lens="raw" if raw else "final-norm")
    shares = _shares(loaded, trace) if attribution else None
    if html is not None and shares is None:
        shares = _shares_if_known(loaded, trace)
    if html is not None:
        from probekit.presentation.report import write_lens_page

        write_lens_page(trace, html, None if shares is None else {0: shares})
        notice(f"wrote {html}", quiet=quiet)
    if as_json:
        extra = {} if shares is None or not attribution else {"attribution": shares.to_json()}
        print_json({"schema": "probekit/lens/1", **table.to_json(), "exit_heads": trace.manifest.heads_name, **extra})
    else:
        _print_lens(table, "" if exit_heads is None or raw else ", exits through their heads")
        if shares is not None and attribution:
            _print_shares(shares, len(trace.prompt_ids(0)) - 1)


def _shares(loaded: Any, trace: Any) -> Any:
    """Who wrote the logits of the model's tokens: at each token that it reads."""
    from probekit.probing.attribution import attribute

    return attribute(loaded, [*trace.prompt_ids(0).tolist(), *trace.outputs(0).tolist()][:-1])


def _shares_if_known(loaded: Any, trace: Any) -> Any:
    """The same, or None of a family whose layers' parts are not known."""
    from probekit.errors import InputError

    try:
        return _shares(loaded, trace)
    except InputError:
        return None


def _print_shares(shares: Any, first: int) -> None:
    """Terms from the last to the first, generated positions from left to right, folded to the window."""
    out.print()
    names = max(map(len, shares.terms)) + 1
    fit = max(1, (out.width - names) // 8)
    for start in range(first, len(shares.tokens), fit):
        places = range(start, min(start + fit, len(shares.tokens)))
        header = Text("writes".ljust(names), style="bold")
        for place in places:
            header.append(_filled(shares.token_texts[place], 7) + " ")
        _print_row(header)
        for term in reversed(range(len(shares.terms))):
            values = "".join(f"{shares.values[place, term]:7.2f} " for place in places)
            _print_row(Text(shares.terms[term].ljust(names) + values))
        _print_row(Text("logit".ljust(names) + "".join(f"{shares.logits[place]:7.2f} " for place in places), "bold"))
        out.print()
    out.print(Text("Shares of the token's logit, the final norm's scale held: each column adds up.", style="dim"))


def _print_lens(table: Any, through: str = "") -> None:
    """Layers from the last to the first, positions from left to right, folded to the window."""
    cells = table.cells  # (layers, positions): token shown, probability
    texts = [[table.inputs[place], *(row[place][0] for row in cells)] for place in range(len(cells[0]))]
    widths = [max(4, min(12, max(columns(shown(text)) for text in column))) for column in texts]
    first = 0
    while first < len(widths):
        last, used = first, len(_row_name(table, 0))
        while last < len(widths) and (last == first or used + widths[last] + 1 <= out.width):
            used += widths[last] + 1
            last += 1
        _print_lens_columns(table, range(first, last), widths)
        first = last
    out.print(
        Text(
            f"{table.lens} lens, {table.convention}{through}. Columns: the token that is read; rows: layers. "
            "Brighter is more probable; a dot marks agreement with the last layer; prompt columns are grey.",
            style="dim",
        )
    )


def _print_lens_columns(table: Any, places: range, widths: list[int]) -> None:
    header = Text("reads".rjust(len(_row_name(table, 0)) - 1) + " ", style="bold")
    for place in places:
        style = "bold" if table.generated[place] else "dim"
        header.append(_filled(table.inputs[place], widths[place]) + " ", style=style)
    _print_row(header)
    for layer in reversed(range(len(table.cells))):
        line = Text(_row_name(table, layer))
        for place in places:
            token, probability = table.cells[layer][place]
            dot = "·" if token == table.cells[-1][place][0] else " "
            line.append(_filled(token, widths[place]) + dot, style=_shade(probability, table.generated[place]))
        _print_row(line)
    out.print()


def _print_row(line: Text) -> None:
    """One line of the table, which is folded already: a window narrower than one cell cuts it."""
    out.print(line, no_wrap=True, overflow="crop")


def _row_name(table: Any, layer: int) -> str:
    last = len(table.cells) - 1
    return f"{'model' if layer == last else 'layer'} {layer:>{max(2, len(str(last)))}} "


def _filled(token: str, width: int) -> str:
    """A token's visible text in exactly `width` columns."""
    text = clipped(token, width)
    return text + " " * (width - columns(text))


# Letters and their ground are both set: they can be read on light and on dark terminals.
_BLUES = ("color(255) on color(17)", "color(255) on color(18)", "color(255) on color(25)", "color(16) on color(39)",
          "color(16) on color(117)")  # fmt: skip
_GREY = "color(250) on color(236)"


def _shade(probability: float, generated: bool) -> str:
    """Grey for the prompt; from dark to bright blue with the probability."""
    return _BLUES[min(4, int(probability * 5))] if generated else _GREY
