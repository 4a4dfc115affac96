"""Tables over exit layer and draft length: rows from the top down, the draft model below, the choice in a frame."""

from __future__ import annotations

import re

from probekit.drafting.keys import DrafterKey
from probekit.html_tables import HtmlCell
from probekit.prediction.grids import grid_html


def test_exits_from_bottom_to_top_and_the_draft_model_below():
    one, two, small = DrafterKey.exit(1), DrafterKey.exit(2), DrafterKey.draft_model("small")
    values = {(one, 2): 0.5, (two, 1): 0.75, (one, 1): None, (small, 1): 1.0, (small, 2): 0.25}
    page = grid_html("rates", values, lambda rate: HtmlCell(f"{rate:.2f}", rate), framed=(two, 1))
    heads = re.findall(r'<th scope="(?:col|row)">([^<]*)</th>', page)
    assert heads == ["E \\ K", "1", "2", "2", "1", "small"]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page) == ["0.75", "-", "-", "0.50", "1.00", "0.25"]
    assert page.count("outline:") == 1
    assert "outline" in next(cell for cell in re.findall(r"<td[^>]*>[^<]*</td>", page) if "0.75" in cell)
