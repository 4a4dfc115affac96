"""Tables over exit layer and draft length: rows from the top down, the draft model below, the choice in a frame."""

from __future__ import annotations

import re

from probekit.html_tables import HtmlCell, grid_html


def test_exits_from_bottom_to_top_and_the_draft_model_below():
    values = {(1, 2): 0.5, (2, 1): 0.75, (1, 1): None, (None, 1): 1.0, (None, 2): 0.25}
    page = grid_html("rates", values, lambda rate: HtmlCell(f"{rate:.2f}", rate), framed=(2, 1), drafter="small")
    heads = re.findall(r'<th scope="(?:col|row)">([^<]*)</th>', page)
    assert heads == ["E \\ K", "1", "2", "2", "1", "small"]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page) == ["0.75", "-", "-", "0.50", "1.00", "0.25"]
    assert page.count("outline:") == 1
    assert "outline" in next(cell for cell in re.findall(r"<td[^>]*>[^<]*</td>", page) if "0.75" in cell)
