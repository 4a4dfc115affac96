"""The tutorials as notebooks: `python docs/tools/notebook.py` makes each from its page, runs it, keeps what it shows.

The page is the one source. Its Python blocks become code cells and what stands between them text, so the notebook says
the same; `shown.py` puts the pictures and tables that were kept back under the page's blocks when the site is built.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

PAGES = [Path(__file__).parent.parent / "tutorials" / f"{name}.md" for name in ("early-exit", "inside")]
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r'^!!! \w+ "(.*?)"\n((?:    .*\n|\n)+)', re.MULTILINE)
OPENING = (
    "Where probekit is not installed (in Colab, say), run this in a cell of its own first: `%pip install probekit`"
)
KEPT = ("text/plain", "text/html", "image/png")


class Cell(NamedTuple):
    kind: str  # "code" or "markdown"
    source: str


def cells_of(page: str) -> list[Cell]:
    """How to install it, then the page's text and Python blocks, in order."""
    pieces = BLOCK.split(page)  # text, code, text, code, ..., text
    found = [
        Cell("code", piece.rstrip()) if place % 2 else Cell("markdown", _text(piece))
        for place, piece in enumerate(pieces)
    ]
    return [Cell("markdown", OPENING), *(cell for cell in found if cell.source)]


def _text(markdown: str) -> str:
    """A note of the site is a quotation in a notebook."""

    def quoted(note: re.Match[str]) -> str:
        lines = [f"**{note[1]}**", "", *(line.removeprefix("    ") for line in note[2].strip("\n").split("\n"))]
        return "\n".join(f"> {line}".rstrip() for line in lines) + "\n"

    return NOTE.sub(quoted, markdown).strip()


def executed(cells: list[Cell], folder: Path) -> dict[str, Any]:
    """Run the cells in a kernel of this Python, in `folder`: the notebook as nbformat's JSON, with what it showed."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(cells):
        make = nbformat.v4.new_code_cell if cell.kind == "code" else nbformat.v4.new_markdown_cell
        notebook.cells.append(make(cell.source, id=f"cell-{number:02}"))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # when it ran is nobody's concern, and would change with every run
        for output in cell.get("outputs", ()):
            if "data" in output:
                output["data"] = {kind: shown for kind, shown in output["data"].items() if kind in KEPT}
        if "outputs" in cell:  # what libraries have to remark on the machine is not the page's
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    import nbformat

    for page in [page for page in PAGES if page.stem in sys.argv[1:] or not sys.argv[1:]]:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(cells_of(page.read_text(encoding="utf-8")), Path(folder))
        path = page.with_suffix(".ipynb")
        nbformat.write(notebook, path)
        print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
