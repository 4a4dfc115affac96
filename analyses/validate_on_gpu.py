"""Do the predictions hold at the scale of real models, and how near to the hardware's limit does the decoder come?

    python analyses/validate_on_gpu.py --plan                     # what would be run, what is on record
    python analyses/validate_on_gpu.py --all --device cuda        # run it; once more where it says that cells are left
    python analyses/validate_on_gpu.py --part smoke --part cells --device cuda
    python analyses/validate_on_gpu.py --page                     # fill the page from the records
    python analyses/validate_on_gpu.py --all --device cpu --miniature -o build/gpu-miniature

Shapes of published models with random weights; a dial sets how often the exit agrees. Six parts, in cells: each cell is
written when it is done and not run again, and no call begins one after `--minutes`. Every record names the device, the
versions, the settings and the order of attention kernels. `--miniature` takes the same way with shapes that a processor
answers for in seconds, to see that the way is clear; its figures mean nothing. Not yet run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from benchmarking import say
from gpu_page import draw, fill_page, judged
from gpu_parts import all_cells
from gpu_plan import Part, Records, full, miniature, missing, run

from probekit.errors import ProbekitError
from probekit.models.checkpoint import check_device

RESULTS = Path("docs/results/gpu")
PAGE = Path("docs/explanation/on-a-gpu.md")
RATES = "rates"  # what every other cell is held against


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu.")] = "cuda",
    dtype: Annotated[str | None, typer.Option(help="Of the shapes; bfloat16 by default.")] = None,
    show: Annotated[bool, typer.Option("--plan", help="Print the cells, and run nothing.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Run every part.")] = False,
    part: Annotated[list[Part] | None, typer.Option(help="Run this part; may be repeated.")] = None,
    page: Annotated[bool, typer.Option("--page", help="Fill the page from the records, and run nothing.")] = False,
    mini: Annotated[bool, typer.Option("--miniature", help="Tiny shapes: is the way clear?")] = False,
    minutes: Annotated[float, typer.Option(min=0.0, help="Begin no cell after so long.")] = 7.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the records.")] = RESULTS,
    page_file: Annotated[Path, typer.Option("--page-file", help="The page.")] = PAGE,
    work: Annotated[Path, typer.Option(help="Folder of the studies of real weights.")] = Path("build/gpu"),
) -> None:
    if page:
        page_file.write_text(fill_page(output), encoding="utf-8")
        say(f"wrote {page_file}")
        return
    try:
        if not show:
            check_device(device)
        plan = (miniature if mini else full)(device, dtype)
        cells = all_cells(plan, work)
        if show:
            for cell in cells:
                print(f"{cell.part:8} {cell.name}")
            print(f"{len(cells)} cells; calls of {minutes:g} minutes and the last cell of each")
            return
        wanted = set(Part) if every else set(part or ())
        if not wanted:
            raise typer.BadParameter("say --plan, --all, --part or --page")
        chosen = [cell for cell in cells if cell.part in wanted or cell.name == RATES]
        records = Records(output, plan, mini)
        left = run(chosen, records, 60 * minutes)
        for line in judged(records.cells(), plan):
            say(line)
        draw(output, records.cells())
        if left:
            say(f"{left} cells are left: run the same command again.")
            raise typer.Exit(3)
        assert not list(missing(chosen, records))
    except ProbekitError as error:
        say(f"error: {error}")
        raise typer.Exit(error.exit_status) from None


if __name__ == "__main__":
    typer.run(main)
