"""`probekit fit-heads`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from probekit.cli import options
from probekit.cli.terminal import notice, print_json, progress_bars
from probekit.errors import InputError


def fit_heads(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that `probekit trace` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Receives the heads, safetensors.")],
    exit_layers: options.ExitLayers = None,
    ridge: Annotated[
        float | None, typer.Option("--ridge", help="Pull towards the plain lens; above 0, 0.01 by default.")
    ] = None,
    jacobian: Annotated[
        bool,
        typer.Option("--jacobian", help="A Jacobian lens: the model's own average derivative, in place of a fit."),
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit exit heads on the texts of runs: exit layers that draft through them are accepted more often."""
    import torch

    from probekit.files import check_file_target
    from probekit.lens.exit_heads import RIDGE, fingerprint, fit_heads, save_heads
    from probekit.lens.jacobian import fit_jacobian
    from probekit.traces.trace import Trace
    from probekit.tracing.traced_models import model_of

    check_file_target(output, "--output")
    if jacobian and ridge is not None:
        raise InputError("a Jacobian lens is no fit, and has no --ridge.", "Leave one of the two out.")
    pull = RIDGE if ridge is None else ridge
    traces = [Trace.open(run) for run in runs]
    record = traces[0].manifest.model
    if other := next((each for each in traces if each.manifest.model.weights_hash != record.weights_hash), None):
        raise InputError(
            f"these runs are of different models: {record.name} and {other.manifest.model.name}.",
            "Fit the heads of each model on its own runs.",
        )
    layers = options.integers(exit_layers, "--exit-layers")
    loaded = model_of(record, traces[0].manifest.settings, device, dtype)
    texts = [[*each.prompt_ids(prompt), *each.outputs(prompt)] for each in traces for prompt in each.prompts]
    with progress_bars(quiet or as_json) as bars:
        batches = _counted((torch.tensor([text]) for text in texts), len(texts), "reading texts", bars)
        if jacobian:
            heads = fit_jacobian(loaded.anatomy, batches, layers)
        else:
            heads = fit_heads(loaded.anatomy, batches, layers, ridge=pull)
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
                "method": "jacobian" if jacobian else "ridge",
                "ridge": None if jacobian else pull,
            }
        )
        return
    exits = len(heads)
    kind = "a Jacobian lens" if jacobian else "heads"
    notice(f"fitted {kind} for {exits} exit layers of {record.name} on {tokens:,} tokens into {output}.", quiet=quiet)
    notice(f"Next: probekit trace {record.reference} --exit-heads {output} -o RUN, on other prompts.", quiet=quiet)


def _counted(items: Iterable[Any], total: int, phase: str, progress: Callable[..., None]) -> Iterator[Any]:
    """The same items, each reported when it has been used."""
    for done, item in enumerate(items, 1):
        yield item
        progress(phase, done, total)
