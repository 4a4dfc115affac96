"""How long does a study take, and where does the time go? Runs `probekit study` afresh and reads its own clock.

python analyses/where_the_time_goes.py -o docs/results/study_time            # the bundled models
python analyses/where_the_time_goes.py path/to/model.gguf --max-new-tokens 64 -o docs/results/study_time_smollm2
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import pandas as pd
import torch
import typer
from rich.console import Console

import probekit


def main(
    models: Annotated[list[str] | None, typer.Argument(help="[default: the bundled models]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives OUTPUT.json, .csv and .pdf.")] = Path("time"),
    prompts: Annotated[Path | None, typer.Option()] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Whole studies to run.")] = 1,
) -> None:
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            summary = probekit.run_study(models, folder, prompts=prompts, max_new_tokens=max_new_tokens).summary
        runs += [
            {"run": len(runs), "model": model["name"], "phase": phase, "seconds": seconds}
            for model in summary["models"]
            for phase, seconds in model["seconds"].items()
        ] + [
            {"run": len(runs), "model": "all", "phase": phase, "seconds": seconds}
            for phase, seconds in summary["seconds"].items()
        ]
    rows = pd.DataFrame(runs).groupby(["model", "phase"], sort=False)["seconds"].quantile([0.2, 0.5, 0.8]).unstack()
    rows = rows.rename(columns=lambda share: f"p{share * 100:.0f}").reset_index()
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(
        json.dumps({"machine": machine, "versions": summary["versions"], "settings": summary["settings"],
                    "repeats": repeats, "rows": rows.to_dict("records")}, indent=2) + "\n"
    )  # fmt: skip
    rows.to_csv(output.with_suffix(".csv"), index=False)
    draw(rows, output.with_suffix(".pdf"))
    Console().print(rows.to_string(index=False), markup=False, highlight=False)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Seconds of each phase, stacked by model."""
    table = rows[rows["model"] != "all"].pivot(index="model", columns="phase", values="p50")
    axes = table.plot.barh(stacked=True, figsize=(6.9, 0.6 + 0.5 * len(table)), colormap="viridis")
    axes.set_xlabel("seconds")
    axes.set_ylabel("")
    axes.legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    plt.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    typer.run(main)
