"""What a page's notebook shows, put under the page's Python blocks when the site is built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """mkdocs calls this with each page's text."""
    path = Path(config["docs_dir"], page.file.src_uri).with_suffix(".ipynb")
    if not path.is_file():
        return markdown
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    blocks = [block.rstrip() for block in BLOCK.findall(markdown)]
    if blocks != ["".join(cell["source"]) for cell in cells]:
        raise PluginError(f"{path.name} is not in step with its page: run `python docs/tools/notebook.py`.")
    left = iter(cells)
    return BLOCK.sub(lambda block: block[0] + "".join(_shown(next(left)["outputs"])), markdown)


def _shown(outputs: list[dict[str, Any]]) -> Iterator[str]:
    """Text, tables and pictures, each the richest kind that was kept."""
    for output in outputs:
        data = output.get("data", {})
        if output["output_type"] == "stream":
            yield _text(output["text"])
        elif "image/png" in data:
            picture = "".join(data["image/png"]).replace("\n", "")
            yield f'\n<div class="shown"><img alt="What the code draws" src="data:image/png;base64,{picture}"></div>\n'
        elif "text/html" in data:
            yield f'\n<div class="shown">\n{_without_blank_lines(data["text/html"])}\n</div>\n'
        elif "text/plain" in data:
            yield _text(data["text/plain"])


def _text(lines: str | list[str]) -> str:
    return "\n``` { .text .shown }\n" + "".join(lines).rstrip() + "\n```\n"


def _without_blank_lines(lines: str | list[str]) -> str:
    """A blank line would end the HTML in Markdown's eyes; the tables' own style sheet gives way to the site's."""
    html = re.sub(r"<style.*?</style>", "", "".join(lines), flags=re.DOTALL).replace(' border="1"', "")
    return "\n".join(line.strip() for line in html.split("\n") if line.strip())
