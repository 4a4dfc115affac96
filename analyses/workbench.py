"""What the numbered analyses share: their options, the traces that they read, and the files that they write.

Each analysis asks one question of some models, and leaves one table (CSV and JSON) and one figure (PDF, SVG, PNG).
Traces are kept under `--traces` and read again, so that the next analysis of the same models starts at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import pandas as pd
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probekit.errors import ProbekitError
from probekit.models.loaded import Loaded, load
from probekit.models.shipped import TALES
from probekit.presentation.plots.style import STYLE
from probekit.settings import KeptResiduals, Sampling
from probekit.traces.trace import Trace
from probekit.tracing.prompts import Prompt, bundled_prompts_for
from probekit.tracing.tracer import trace
from probekit.tying.text_kinds import before_loops

SCHEMA = "probekit/analysis/1"
SAMPLING = Sampling(temperature=1.0, seed=0)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL ...]", help="Bundled names, folders, GGUF files or hub ids; by default the tales models."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder that receives the table and the figure.")]
Traces = Annotated[Path, typer.Option("--traces", help="Folder of the traces; those that are there are read.")]
Limit = Annotated[int, typer.Option("--prompts", min=2, help="How many of the bundled prompts to use.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=2, help="Tokens of each continuation.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N.")]


@dataclass(frozen=True)
class Bench:
    """The settings of one analysis."""

    models: tuple[str, ...]
    output: Path
    traces: Path
    prompts: int
    max_new_tokens: int
    device: str | None
    question: str

    def loaded(self) -> Iterator[Loaded]:
        """Each model in turn."""
        for reference in self.models:
            say(f"{reference}: loading")
            yield load(reference, device=self.device)

    def prompts_for(self, loaded: Loaded) -> list[Prompt]:
        """An even spread of the bundled prompts that suit a model, with their own indices."""
        every = bundled_prompts_for(loaded.name)
        count = min(self.prompts, len(every))
        return [every[place * len(every) // count] for place in range(count)]

    def trace(self, loaded: Loaded, text: str = "greedy", *, residuals: bool = False) -> Trace:
        """Greedy or sampled text of the model after each prompt; or the prompts themselves, as given text.

        residuals: keep those of all layers where a token of the continuation is predicted.
        """
        kind = f"{text}-residuals" if residuals else text
        folder = self.traces / f"{loaded.name}-{kind}-{self.prompts}x{self.max_new_tokens}"
        say(f"{loaded.name}: {text} text of {self.prompts} prompts")
        return trace(
            loaded, self.prompts_for(loaded), folder, max_new_tokens=self.max_new_tokens, given=text == "given",
            sampling=SAMPLING if text == "sampled" else Sampling(), top_prompts=0, resume=True,
            keep_residuals=KeptResiduals(None if residuals else (), rows="scored" if residuals else "all"),
        )  # fmt: skip

    def write(self, name: str, table: pd.DataFrame, figure: Figure, **more: Any) -> None:
        """Leave the table as CSV and JSON, and the figure as PDF, SVG and PNG."""
        self.output.mkdir(parents=True, exist_ok=True)
        models = [Path(reference).name for reference in self.models]  # a kept table names no machine's folders
        settings = asdict(self) | {"models": models, "output": None, "traces": None, "question": None}
        record = {
            "schema": SCHEMA,
            "analysis": name,
            "question": self.question,
            "settings": {key: value for key, value in settings.items() if value is not None} | more,
            "versions": {package: version(package) for package in ("probekit", "torch", "transformers", "numpy")},
            "columns": list(table.columns),
            "rows": json.loads(table.to_json(orient="values", double_precision=6)),
        }
        table.to_csv(self.output / f"{name}.csv", index=False, float_format="%.6g")
        (self.output / f"{name}.json").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        for kind in ("pdf", "svg", "png"):
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            figure.savefig(self.output / f"{name}.{kind}", metadata=metadata, bbox_inches="tight")
        say(f"wrote {self.output / name}.csv, .json, .pdf, .svg, .png")


def analysis(question: Callable[..., None]) -> Callable[..., None]:
    """The command of an analysis: the options that all of them have, then those of its own.

    question: takes a Bench, and its own options by name; its docstring is the question. What goes wrong is one clear
    line.
    """

    def command(
        models: Models = None, output: Output = Path("build/analyses"), traces: Traces = Path("build/analyses/traces"),
        prompts: Limit = 24, max_new_tokens: Tokens = 96, device: Device = None, **own: Any,
    ) -> None:  # fmt: skip
        try:
            with matplotlib.rc_context(STYLE):
                asked = question.__doc__ or ""
                question(Bench(tuple(models or TALES), output, traces, prompts, max_new_tokens, device, asked), **own)
        except ProbekitError as error:
            say(f"error: {error}")
            raise typer.Exit(error.exit_status) from None

    # typer reads a command's options from its signature
    common = list(signature(command, eval_str=True).parameters.values())[:-1]
    _, *own_options = signature(question, eval_str=True).parameters.values()
    command.__signature__ = Signature([*common, *own_options])  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in (*common, *own_options)}
    command.__doc__ = question.__doc__
    return command


def check_costs(costs: str) -> None:
    if costs not in ("measured", "roofline"):
        raise typer.BadParameter(f"costs are {costs!r}; expected measured or roofline")


def with_and_without_loops(whole: Trace) -> Iterator[tuple[str, Trace]]:
    """("with", the trace) and ("without", its texts cut where they begin to loop)."""
    yield "with", whole
    yield "without", before_loops(whole)


# --------------------------------------------------------------------------------------------------- figures
def figure(
    columns: int, rows: int = 1, *, width: float = 2.4, height: float = 2.1, beside: float = 0.0
) -> tuple[Figure, Any]:
    """A figure and its Axes, (rows, columns); inches for each panel, and for what stands beside the last column."""
    drawn = Figure(figsize=(width * columns + beside, height * rows), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False)


def curve(ax: Axes, rows: pd.DataFrame, x: str, colour: Any, label: str | None = None, **style: Any) -> None:
    """A line of `value` over `x`, in the band of its interval (`low`, `high`)."""
    rows = rows.sort_values(x)
    places, values, low, high = (rows[name].to_numpy(float) for name in (x, "value", "low", "high"))
    ax.plot(places, values, color=colour, label=label, **style)
    ax.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)


def whole_numbers(ax: Axes) -> None:
    """Ticks of layers and the like: no halves."""
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def legend_beside(ax: Axes, **more: Any) -> None:
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), **more)


def say(message: str) -> None:
    typer.echo(message, err=True)
